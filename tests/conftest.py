"""The environment every test runs in: offline, one thread per library, nothing sent home.

A test that hangs is ended by pytest-timeout; one stuck in native code, by faulthandler_timeout (pyproject.toml).
"""

from __future__ import annotations

import os

os.environ.update(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    RAY_USAGE_STATS_ENABLED="0",
)
