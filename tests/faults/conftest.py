"""A model directory without weights for the tests that need no engine."""

from __future__ import annotations

from tests.router.conftest import model_dir, tokenizer

__all__ = ["model_dir", "tokenizer"]
