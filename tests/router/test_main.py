"""The router as a process: how it starts, what stops it from starting, how it ends, what it weighs."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from tandem.common.errors import ConfigError
from tandem.router.__main__ import listen, parse_settings
from tests.router.fake_cluster import KEY

ENVIRONMENT = os.environ | {"TANDEM_CLUSTER_KEY": KEY.hex()}
NO_REDIS = "redis://127.0.0.1:1/0"


def command(model_dir: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "tandem.router", "--model-dir", str(model_dir), "--redis-url", NO_REDIS, *flags]


@contextmanager
def running(model_dir: Path, *flags: str) -> Generator[tuple[subprocess.Popen[str], str]]:
    """The process and its URL."""
    process = subprocess.Popen(
        command(model_dir, "--port", "0", *flags), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        url = next(match[0] for line in lines if (match := re.search(r"http://127\.0\.0\.1:\d+", line)))
        yield process, url
    finally:
        process.kill()
        process.communicate()


def test_starts_weighs_little_and_ends_on_sigterm(model_dir: Path) -> None:
    with running(model_dir, "--served-model-name", "a", "b", "--api-key", "secret-key") as (process, url):
        deadline = time.monotonic() + 20
        while True:
            try:
                assert httpx.get(f"{url}/livez").status_code == 200
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
        assert httpx.get(f"{url}/readyz").status_code == 503
        models = httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer secret-key"}).json()
        assert [model["id"] for model in models["data"]] == ["a", "b"]
        assert psutil.Process(process.pid).memory_info().rss < 200 << 20
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def fails(model_dir: Path, *flags: str) -> str:
    done = subprocess.run(command(model_dir, *flags), capture_output=True, text=True, timeout=20, env=ENVIRONMENT)
    assert done.returncode == 1
    line = done.stderr.strip()
    assert "\n" not in line, line
    assert line.startswith("tandem.router: error: ")
    return line


def test_a_busy_port_is_told_in_one_line(model_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in fails(model_dir, "--port", str(port))


def test_two_routers_cannot_share_a_port() -> None:
    """SO_REUSEADDR lets two sockets bind one port as long as neither listens: ours listens at once."""
    with listen("127.0.0.1", 0) as first, pytest.raises(ConfigError):
        listen("127.0.0.1", first.getsockname()[1])


def test_a_broken_tokenizer_is_told_in_one_line(model_dir: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model_dir, tmp_path / "model")
    (broken / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in fails(broken, "--port", "0")
    assert "config.json" in fails_in_process(model_dir, tmp_path / "other", "config.json")


def fails_in_process(model_dir: Path, target: Path, name: str) -> str:
    from tandem.common.errors import ModelError
    from tandem.router.app import Services
    from tests.router.fake_cluster import FakeCluster, Script

    shutil.copytree(model_dir, target)
    (target / name).write_text('{"vocab_size": "many"}')
    fake = FakeCluster(target, Script([[1]]), (0, 0))
    with pytest.raises(ModelError) as error:
        Services.create(fake.settings, fake.registry)
    return error.value.message


def test_settings_come_from_flags_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_CLUSTER_KEY", KEY.hex())
    monkeypatch.setenv("TANDEM_API_KEY", "from-environment")
    settings = parse_settings(["--model-dir", "/models/tiny/", "--max-model-len", "99", "--api-key", "a", "b"])
    assert settings.served_model_names == ("tiny",)
    assert settings.api_keys == ("a", "b", "from-environment")
    assert (settings.max_model_len, settings.port, settings.cluster_key) == (99, 8000, KEY)
    assert "from-environment" not in repr(settings) and KEY.hex() not in repr(settings)
    monkeypatch.delenv("TANDEM_CLUSTER_KEY")
    with pytest.raises(ConfigError, match="TANDEM_CLUSTER_KEY"):
        parse_settings(["--model-dir", "x"])


def test_who_still_waits_when_the_process_ends_is_told_so(model_dir: Path) -> None:
    """The answer is on its way before the event loop ends, also behind uvicorn's cancellation."""
    body = b'{"model": "m", "prompt": "hi"}'
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    with running(model_dir, "--served-model-name", "m", "--shutdown-timeout", "0.1") as (process, url):
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=20) as client:
            client.sendall(head)
            answer = client.makefile("rb")
            assert b"100 Continue" in answer.readline()  # it is inside; there is no worker, so it waits
            process.send_signal(signal.SIGTERM)
            client.sendall(body)
            told = answer.read()
        assert process.wait(10) == 0
    assert b"HTTP/1.1 503" in told and b"the server is shutting down" in told and b"retry-after: 1" in told, told


async def test_streams_get_a_grace_and_then_one_clean_end(model_dir: Path, tokenizer: object) -> None:
    """SIGTERM's path through uvicorn: a stream still running behind the grace ends with an error event."""
    from tests.router.fake_cluster import FakeCluster, Script
    from tests.router.test_failures import sending, stream

    fake = FakeCluster(model_dir, Script([[40, 41, 42, 43]]))
    async with fake:
        fake.decode[0].on_leg = sending(1, 2, then_hang=True)
        client = asyncio.create_task(stream(fake))
        await fake.until(lambda: fake.decode[0].active == 1)
        fake.server.should_exit = True
        texts, others = await client
        assert texts[0] and others[-1] == "[DONE]" and "shutting down" in others[0]
        async with asyncio.timeout(2):
            await fake.decode[0].all_left.wait()
