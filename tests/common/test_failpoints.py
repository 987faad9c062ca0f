"""Failpoints act where and when they are armed, in one process of many, and cost and do nothing otherwise."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tandem.common import failpoints
from tandem.common.errors import ConfigError
from tandem.common.failpoints import DIRECTORY, ENVIRONMENT, NAMES, Action, arm, configure, failpoint, parse_action

ROOT = Path(__file__).parents[2]
PACKAGES = ("common", "kv_transfer", "prefill_worker", "decode_worker", "router")
NAME = "decode.landed"

HITS = """
import sys
from tandem.common.failpoints import failpoint
for number in range(int(sys.argv[1])):
    print(number, failpoint("decode.landed"), flush=True)
"""


@pytest.fixture(autouse=True)
def off_afterwards() -> Iterator[None]:
    yield
    configure({})


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.005)


def start(hits: int, environ: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HITS, str(hits)]
    return subprocess.Popen(command, env={**os.environ, **environ}, stdout=subprocess.PIPE, stderr=-1, text=True)


def run(hits: int, environ: dict[str, str]) -> tuple[int, list[str]]:
    process = start(hits, environ)
    output, errors = process.communicate(timeout=30)
    return process.returncode, output.splitlines() + errors.splitlines()


# ---------------------------------------------------------------------------------------------------------- arming


def test_off_unless_armed() -> None:
    configure({})
    assert [failpoint(name) for name in NAMES] == [False] * len(NAMES)


def test_every_call_in_the_source_names_a_listed_failpoint() -> None:
    text = "\n".join(
        path.read_text(encoding="utf-8")
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "failpoints.py"
    )
    calls = re.findall(r"failpoint\(([^)]*)\)", text)
    called = [name for call in calls for name in re.findall(r'"([^"]+)"', call)]
    assert called and set(called) <= set(NAMES)
    assert all('"' in call for call in calls), "a name that is computed cannot be found by reading"


@pytest.mark.parametrize("text", ["nonsense=kill", "decode.landed", "decode.landed=explode", "=kill"])
def test_a_wrong_arming_is_an_operators_error(text: str) -> None:
    with pytest.raises(ConfigError):
        configure({ENVIRONMENT: text})


@pytest.mark.parametrize(
    "text", ["", "kill:1", "delay", "delay:x", "delay:-1", "delay:inf", "delay:nan", "kill@0", "kill@x"]
)
def test_a_wrong_action_is_an_operators_error(text: str) -> None:
    with pytest.raises(ConfigError, match="failpoint action"):
        parse_action(text)


def test_actions_are_parsed() -> None:
    assert parse_action("kill") == Action("kill")
    assert parse_action(" delay:0.5@3 ") == Action("delay", 0.5, 3)


def test_wrong_names_by_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no failpoint 'nonsense'"):
        arm(tmp_path, "nonsense", "kill")
    with pytest.raises(ConfigError, match="no directory"):
        configure({DIRECTORY: str(tmp_path / "missing")})
    (tmp_path / "nonsense.arm").write_text("kill")
    with pytest.raises(ConfigError, match="no failpoint 'nonsense'"):
        configure({DIRECTORY: str(tmp_path)})


def test_an_unlisted_name_in_the_code_is_our_bug() -> None:
    configure({ENVIRONMENT: f"{NAME}=drop"})
    with pytest.raises(AssertionError, match="not listed"):
        failpoint("nonsense")


# ---------------------------------------------------------------------------------------------------------- actions


def test_drop_on_every_hit_or_on_one() -> None:
    configure({ENVIRONMENT: f"{NAME}=drop, link.beat=drop@3"})
    assert [failpoint(NAME) for _ in range(3)] == [True, True, True]
    assert [failpoint("link.beat") for _ in range(5)] == [False, False, True, False, False]
    assert not failpoint("prefill.asked")


def test_raise_is_no_error_of_ours() -> None:
    configure({ENVIRONMENT: f"{NAME}=raise@2"})
    failpoint(NAME)
    with pytest.raises(RuntimeError, match=NAME):
        failpoint(NAME)


def test_kill_ends_the_process_on_the_hit_it_names() -> None:
    assert run(5, {ENVIRONMENT: f"{NAME}=kill@3"}) == (-signal.SIGKILL, ["0 False", "1 False"])


def test_stop_waits_for_sigcont() -> None:
    process = start(2, {ENVIRONMENT: f"{NAME}=stop@2"})
    try:
        state = Path(f"/proc/{process.pid}/stat")
        until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T", "the stop")
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=30)[0].splitlines() == ["0 False", "1 False"]
    finally:
        process.kill()
        process.wait()


def test_delay_lasts() -> None:
    configure({ENVIRONMENT: f"{NAME}=delay:0.05@1"})
    started = time.monotonic()
    failpoint(NAME)
    delayed = time.monotonic()
    failpoint(NAME)
    assert delayed - started >= 0.05 > time.monotonic() - delayed


@pytest.mark.parametrize("action", ["hold", "delay:50"])
def test_a_release_ends_the_wait(tmp_path: Path, action: str) -> None:
    configure({DIRECTORY: str(tmp_path)})
    arm(tmp_path, NAME, action)
    waiter = threading.Thread(target=failpoint, args=(NAME,))
    waiter.start()
    until((tmp_path / f"{NAME}.hit").exists, "the hit")
    assert waiter.is_alive()
    (tmp_path / f"{NAME}.release").touch()
    waiter.join(5.0)
    assert not waiter.is_alive()


def test_hold_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failpoints, "HOLD_LIMIT", 0.02)
    configure({DIRECTORY: str(tmp_path)})
    arm(tmp_path, NAME, "hold")
    assert not failpoint(NAME)


# ---------------------------------------------------------------------------------------------------------- by file


def test_a_file_means_one_hit(tmp_path: Path) -> None:
    configure({DIRECTORY: str(tmp_path)})
    assert not failpoint(NAME)
    arm(tmp_path, NAME, "drop")
    assert not failpoint("prefill.asked")
    assert [failpoint(NAME), failpoint(NAME)] == [True, False]
    assert [path.name for path in tmp_path.iterdir()] == [f"{NAME}.hit"]


def test_arming_anew_counts_anew(tmp_path: Path) -> None:
    configure({DIRECTORY: str(tmp_path)})
    for _ in range(2):
        arm(tmp_path, NAME, "drop@3")
        assert not (tmp_path / f"{NAME}.hit").exists()
        assert [failpoint(NAME) for _ in range(4)] == [False, False, True, False]
    arm(tmp_path, NAME, "drop@3")
    assert [failpoint(NAME) for _ in range(2)] == [False, False]
    arm(tmp_path, NAME, "drop@2")
    assert [failpoint(NAME) for _ in range(3)] == [False, True, False]


def test_one_process_of_many_takes_it(tmp_path: Path) -> None:
    arm(tmp_path, NAME, "kill@20")
    processes = [start(2000, {DIRECTORY: str(tmp_path)}) for _ in range(4)]
    for process in processes:
        process.communicate(timeout=60)
    assert sorted(process.returncode for process in processes) == [-signal.SIGKILL, 0, 0, 0]


def test_a_wrong_arming_of_the_environment_ends_the_process() -> None:
    code, lines = run(1, {ENVIRONMENT: "nonsense=kill"})
    assert code == 1 and "there is no failpoint 'nonsense'" in lines[-1]
