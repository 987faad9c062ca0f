"""The shell around a worker, as far as it needs no model."""

from __future__ import annotations

import pytest

from tandem.common.errors import ConfigError
from tandem.common.service import WorkerShell, describe, new_incarnation
from tandem.common.worker_config import WorkerConfig
from tandem.common.worker_watch import WatchHub
from tests.worker_pair import KEY, Pair


def test_a_redis_url_that_cannot_be_is_an_error_at_the_start() -> None:
    """Not a worker that runs and that no router ever hears of."""
    decode = Pair().d
    config = WorkerConfig(name="decode-0", role="decode", redis_url="nonsense", cluster_key=KEY)
    about = describe(config, new_incarnation(), decode.engine.layout, max_model_len=64, max_num_seqs=4)
    shell = WorkerShell(config, about, decode.worker, WatchHub(about, decode.worker.load, decode.pool))
    with pytest.raises(ConfigError, match="Redis URL"):
        shell.start(lambda server, shell: None)
    shell.stop()
