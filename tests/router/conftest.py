"""A model directory without weights, and fake clusters over it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tandem.common.tokenizer import Tokenizer
from tests.common.trained import write_chatml
from tests.router.fake_cluster import FakeCluster, Script

MakeCluster = Callable[..., FakeCluster]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_chatml(tmp_path_factory.mktemp("model"))
    (directory / "config.json").write_text(json.dumps({"vocab_size": 600}))
    return directory


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.load(model_dir)


@pytest.fixture
def cluster(model_dir: Path, tokenizer: Tokenizer) -> MakeCluster:
    """`cluster("what choice 0 says", "what choice 1 says", …, pools=(1, 1), **settings)`; each ends with EOS."""

    def make(*texts: str, pools: tuple[int, int] = (1, 1), **settings: object) -> FakeCluster:
        eos = tokenizer.eos_token_ids[0]
        script = Script([[*tokenizer.encode(text, False), eos] for text in texts])
        return FakeCluster(model_dir, script, pools, **settings)

    return make
