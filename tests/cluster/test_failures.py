"""What cannot work ends the real command with one line, and leaves nothing.

Time is counted as CPU seconds of the command and its children, which a busy machine does not change.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tandem.common.worker_config import KEY_VARIABLE


def tandem(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    command = [sys.executable, "-m", "tandem", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_directories() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob(f"tandem-{os.getuid()}-*"))


def refused(*arguments: str) -> str:
    """The one line of a serve that must not start."""
    started, before = cpu_seconds(), run_directories()
    result = tandem("serve", *arguments)
    assert result.returncode == 1, result.stdout + result.stderr
    assert cpu_seconds() - started < 14.0  # seen: 7, and 8.3 on a slow machine
    assert not [path for path in run_directories() - before if (path / "serve.json").exists()]
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture
def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def test_a_busy_port() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert f"127.0.0.1:{port}" in refused("--port", str(port))


def test_a_model_that_is_not_there(tmp_path: Path, free_port: str) -> None:
    missing = str(tmp_path / "missing")
    assert missing in refused(missing, "--port", free_port)


def test_an_unknown_architecture(tmp_path: Path, free_port: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["AbacusForCausalLM"], "model_type": "abacus"}))
    line = refused(str(tmp_path), "--port", free_port)
    assert str(tmp_path) in line
    assert "safetensors" in line or "AbacusForCausalLM" in line


def test_scaling_what_does_not_run() -> None:
    result = tandem("scale", "prefill=2", "--url", "http://127.0.0.1:9")
    assert result.returncode == 1
    assert "http://127.0.0.1:9" in result.stderr and len(result.stderr.splitlines()) == 1


def test_status_of_what_does_not_run() -> None:
    result = tandem("status", "--url", "http://127.0.0.1:9")
    assert result.returncode == 1
    assert "http://127.0.0.1:9" in result.stderr and len(result.stderr.splitlines()) == 1
