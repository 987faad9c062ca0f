"""The environment every test runs in: offline, one thread per library, nothing sent home.

A test that hangs is ended by pytest-timeout; one stuck in native code, by faulthandler_timeout (pyproject.toml).
"""

from __future__ import annotations

import gc
import os

import pytest

os.environ.update(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    RAY_USAGE_STATS_ENABLED="0",
)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    """Workers in this process froze what there was; the compiler's part of it would be called a leak at the end."""
    gc.unfreeze()
    gc.collect()
