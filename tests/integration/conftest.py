"""One 1P1D cluster with the demo model for the tests of a module that only talk to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem.engine.config import EngineConfig
from tests.integration.local_cluster import LocalCluster

DEMO_MODEL = Path(__file__).parents[2] / "engine" / "demo_model"


@pytest.fixture(scope="module")
def demo_cluster() -> Iterator[LocalCluster]:
    engine = EngineConfig(model=str(DEMO_MODEL), device="cpu", kv_cache_memory_bytes=64 << 20)
    with LocalCluster(engine, 1, 1) as cluster:
        yield cluster


@pytest.fixture
def demo(demo_cluster: LocalCluster) -> Iterator[LocalCluster]:
    """The cluster, with its blocks counted behind the test: free + cached = pool on every worker."""
    yield demo_cluster
    demo_cluster.assert_at_rest()
