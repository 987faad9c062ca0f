"""Trained tokenizer directories, made once per run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.common.tokenizer import Tokenizer
from tests.common.trained import WRITERS, write_words


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: write(root / name) for name, write in {**WRITERS, "words": write_words}.items()}


@pytest.fixture(scope="session")
def loaded(directories: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: Tokenizer.load(directory) for name, directory in directories.items()}
