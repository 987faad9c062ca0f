"""What a worker's configuration refuses, and that it never shows its secrets."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.common.errors import ConfigError
from tandem.common.worker_config import WorkerConfig, cluster_key_from_env

GOOD: dict[str, Any] = {
    "name": "decode-1",
    "role": "decode",
    "redis_url": "redis://:hunter2@localhost/0",
    "cluster_key": b"0123456789abcdef",
}


def test_defaults() -> None:
    config = WorkerConfig(**GOOD)
    assert (config.host, config.port, config.cluster, config.kv_connector) == ("127.0.0.1", 0, "default", "auto")


def test_secrets_are_not_shown() -> None:
    shown = repr(WorkerConfig(**GOOD))
    assert "hunter2" not in shown
    assert "0123456789abcdef" not in shown


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"role": "both"}, "prefill, decode"),
        ({"name": ""}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"port": 65536}, "65536"),
        ({"port": -1}, "-1"),
        ({"cluster_key": b"short"}, "TANDEM_CLUSTER_KEY"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        WorkerConfig(**{**GOOD, **changes})


def test_cluster_key_from_the_environment() -> None:
    assert cluster_key_from_env({"TANDEM_CLUSTER_KEY": "ab" * 16}) == b"\xab" * 16


@pytest.mark.parametrize("text", ["", "ab" * 15, "s3cr3t" * 8])
def test_a_bad_key_is_refused_without_being_shown(text: str) -> None:
    with pytest.raises(ConfigError, match="openssl rand") as caught:
        cluster_key_from_env({"TANDEM_CLUSTER_KEY": text})
    assert not text or text not in str(caught.value)
    assert caught.value.__cause__ is None


def test_an_unset_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TANDEM_CLUSTER_KEY", raising=False)
    with pytest.raises(ConfigError, match="not set"):
        cluster_key_from_env()
