"""The shell around a worker, as far as it needs no model."""

from __future__ import annotations

import gc
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tandem.common.errors import ConfigError
from tandem.common.service import WorkerShell, describe, new_incarnation
from tandem.common.worker_config import WorkerConfig
from tandem.common.worker_watch import WatchHub
from tests.fakes import Client, make_leg
from tests.worker_pair import KEY, Pair


def make_shell(pair: Pair, redis_url: str) -> WorkerShell:
    decode = pair.d
    config = WorkerConfig(name="decode-0", role="decode", redis_url=redis_url, cluster_key=KEY)
    about = describe(config, new_incarnation(), decode.engine.layout, max_model_len=64, max_num_seqs=4)
    return WorkerShell(config, about, decode.worker, WatchHub(about, decode.worker.load, decode.pool))


def test_a_redis_url_that_cannot_be_is_an_error_at_the_start() -> None:
    """Not a worker that runs and that no router ever hears of."""
    shell = make_shell(Pair(), "nonsense")
    with pytest.raises(ConfigError, match="Redis URL"):
        shell.start(lambda server, shell: None)
    shell.stop()


def test_stop_answers_whoever_waits_for_the_drain_and_closes_the_loop(tmp_path: Path) -> None:
    """An unclosed loop is a leaked socket pair; a drain that waits on would hold up the process's exit."""
    pair = Pair()
    shell = make_shell(pair, f"unix://{tmp_path}/none.sock")
    shell.start(lambda server, shell: None)
    client = Client()
    leg = make_leg("r", [1, 2, 3], ticket=pair.ticket("r"))  # its KV never comes
    pair.d.worker.inbox.put(lambda: pair.d.worker.submit(1, leg, client))
    with ThreadPoolExecutor(1) as executor:
        drained = executor.submit(shell.drain, 60.0)
        shell.stop()
        assert drained.result(timeout=10.0) is False
    assert client.ended and client.error is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del shell
        gc.collect()  # an unclosed loop would warn here, as an unraisable error
