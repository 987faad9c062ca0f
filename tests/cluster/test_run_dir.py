from __future__ import annotations

import os
from pathlib import Path

import pytest

from tandem.cluster import run_dir
from tandem.cluster.run_dir import Record, RunDir, find
from tandem.common.errors import ConfigError


@pytest.fixture(autouse=True)
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(run_dir, "_parent", lambda: str(tmp_path))
    return tmp_path


def record(port: int, pid: int | None = None) -> Record:
    return Record(pid or os.getpid(), f"http://127.0.0.1:{port}", "127.0.0.1:6379", "tandem")


def test_it_is_private_and_goes_away(parent: Path) -> None:
    directory = RunDir()
    assert directory.path.stat().st_mode & 0o777 == 0o700
    directory.remove()
    assert list(parent.iterdir()) == []


def test_a_serve_is_found_by_its_port() -> None:
    for port in (8000, 8001):
        RunDir().write(record(port))
    assert find("http://localhost:8001").url == "http://127.0.0.1:8001"
    with pytest.raises(ConfigError, match="http://localhost:8002"):
        find("http://localhost:8002")
    with pytest.raises(ConfigError, match="no `tandem serve` of yours"):
        find("http://elsewhere.example:8001")  # another machine's, of the same port
    with pytest.raises(ConfigError, match="not the URL of a server"):
        find("http://localhost:99999")


def test_what_a_killed_serve_left_is_swept_by_the_next(parent: Path) -> None:
    dead = RunDir()
    (dead.path / "pid").write_text(str(2**22 + 1))  # beyond the largest process id
    dead.write(record(8000, pid=2**22 + 1))
    with pytest.raises(ConfigError):
        find("http://127.0.0.1:8000")
    alive = RunDir()
    assert list(parent.iterdir()) == [alive.path]


def test_a_running_serve_is_not_swept(parent: Path) -> None:
    first = RunDir()
    second = RunDir()
    assert sorted(parent.iterdir()) == sorted([first.path, second.path])


def test_a_damaged_record_is_no_serve(parent: Path) -> None:
    directory = RunDir()
    (directory.path / "serve.json").write_text('{"pid": ')
    with pytest.raises(ConfigError):
        find("http://127.0.0.1:8000")
