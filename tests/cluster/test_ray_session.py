"""What Ray is told before it is imported, and when it is refused: nothing here starts or imports Ray."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tandem.cluster import ray_session
from tandem.common.errors import ConfigError

METRICS = "RAY_enable_metrics_collection"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's variables as in a fresh shell; whatever `prepare` sets is taken back."""
    own = ("RAY_AUTH_MODE", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_DEDUP_LOGS", "RAY_COLOR_PREFIX")
    for name in (*own, METRICS):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize("address", [None, "127.0.0.1:6379", "10.0.0.7:6379", "auto", "ray://head:10001"])
def test_token_authentication_is_on_unless_the_user_says_otherwise(address: str | None) -> None:
    ray_session.prepare(address)
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_rays_own_metrics_are_off_unless_the_user_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ray_session.prepare(None)
    assert os.environ[METRICS] == "0"
    monkeypatch.setenv(METRICS, "1")
    ray_session.prepare(None)
    assert os.environ[METRICS] == "1"


@pytest.mark.parametrize("address", [None, "127.0.0.1:6379"])
def test_a_ray_of_this_machine_alone_may_go_without_a_token(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ray_session.prepare(address)
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"  # what makes it listen on 127.0.0.1 only


@pytest.mark.parametrize("mode", ["disabled", "DISABLED", "", "nonsense"])
@pytest.mark.parametrize("address", ["10.0.0.7:6379", "auto", "ray://head:10001", "0.0.0.0:6379", "127.0.0.1.evil:1"])
def test_e58_no_token_off_loopback_is_refused_with_what_to_set(
    monkeypatch: pytest.MonkeyPatch, mode: str, address: str
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    with pytest.raises(ConfigError, match="set RAY_AUTH_MODE=token") as caught:
        ray_session.join(address, "tandem", logs=False)  # before it connects to anything
    assert address in caught.value.message and "RAY_AUTH_TOKEN" in caught.value.message


def test_a_local_ray_that_listens_to_everyone_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")
    with pytest.raises(ConfigError, match="set RAY_AUTH_MODE=token"):
        ray_session.prepare(None)


def test_preparing_does_not_import_ray() -> None:
    """It reads its environment then, so the settings would come too late."""
    code = (
        "import sys; from tandem.cluster import ray_session; ray_session.prepare(None); sys.exit('ray' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
