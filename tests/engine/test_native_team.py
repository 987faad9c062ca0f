"""The threads of the CPU kernels, and the cores that workers of one machine lend each other.

Regions and the number of threads that are welcome have no entry in the kernels' own interface: `PROBE` gives them one.
"""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.engine.kernels import compile as compiler
from tandem.engine.kernels import cores, native
from tandem.engine.kernels.cores import CoreTable

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiler for the CPU kernels")

DEADLINE = 30.0  # seconds for anything another process or thread does
PROBE = """
#include "team.h"
using namespace tandem;
extern "C" {
Team* probe_team(int threads, void* table, int lines, int mine, int cores) {
    if (table) ((Line*)table)[mine].cores.store(cores);
    return new Team(threads, 3, (Line*)table, lines, mine);
}
void probe_begin(Team* team) { team->begin(); }
void probe_end(Team* team) { team->end(); }
void probe_disband(Team* team) { delete team; }
int probe_welcome(Team* team) { return team->welcome(nanoseconds()); }
// Wakes the helpers, as the first product of a prompt finds them: the norm of its rows had no need of scratch memory.
void probe_wake(Team* team) {
    std::atomic<int> turns{0};
    team->run(1000, [&](int64_t, int) { turns++; });
}
// Adds 1 to counts[task]; task i takes i % 7 turns of a loop. Not atomic: only its thread may touch a task's count.
int64_t probe_run(Team* team, int64_t tasks, int32_t* counts) {
    std::atomic<int64_t> helped{0};
    team->run(tasks, [&](int64_t task, int thread) {
        for (volatile int turn = 0; turn < task % 7 * 40; turn = turn + 1) {}
        team->scratch(thread, 16 + task % 3 * 1000)[task % 16] = 1.0f;
        counts[task]++;
        if (thread) helped++;
    });
    return helped;
}
// Tasks of a millisecond; whose[task] becomes the thread that did it, in the order in which they ended.
void probe_long(Team* team, int64_t tasks, int32_t* whose) {
    std::atomic<int64_t> ended{0};
    team->run(tasks, [&](int64_t, int thread) {
        for (int64_t begin = nanoseconds(); nanoseconds() - begin < 1'000'000;) {}
        whose[ended.fetch_add(1)] = thread;
    });
}
}
"""
NEIGHBOUR = """
import ctypes, sys
from pathlib import Path
from tandem.engine.kernels.cores import CoreTable
table, probe = CoreTable.join(int(sys.argv[3]), Path(sys.argv[1])), ctypes.CDLL(sys.argv[2])
probe.probe_team.restype = ctypes.c_void_p
team = ctypes.c_void_p(probe.probe_team(2, ctypes.c_void_p(table.address), table.lines, table.mine, table.own))
counts = (ctypes.c_int32 * 64)()
print(table.mine, flush=True)
while line := sys.stdin.readline():
    what, count = line.split()
    if what == "prompts":
        table.post_prompts(int(count))
    elif what == "work":  # until it is killed
        print("working", flush=True)
        while True:
            probe.probe_run(team, ctypes.c_int64(64), counts)
    else:
        probe.probe_run(team, ctypes.c_int64(64), counts)
        probe.probe_end(team)
    print("done", flush=True)
"""
FIRST_REGIONS = """
import ctypes, sys
probe = ctypes.CDLL(sys.argv[1])
probe.probe_team.restype = ctypes.c_void_p
for _ in range(300):
    team = ctypes.c_void_p(probe.probe_team(4, None, 0, 0, 0))
    counts = (ctypes.c_int32 * 8)()
    probe.probe_begin(team)
    probe.probe_wake(team)
    probe.probe_run(team, ctypes.c_int64(8), counts)
    probe.probe_disband(team)
    assert list(counts) == [1] * 8
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("probe")
    source, made = directory / "probe.cpp", directory / "probe.so"
    source.write_text(PROBE)
    gxx = shutil.which("g++")
    assert gxx is not None
    subprocess.run([gxx, *compiler.FLAGS, "-I", str(compiler.SOURCES), str(source), "-o", str(made)], check=True)
    return made


class Regions:
    """A team that runs raw regions."""

    def __init__(self, probe: Path, threads: int, table: CoreTable | None = None) -> None:
        self._probe: Any = ctypes.CDLL(str(probe))
        self._probe.probe_team.restype = ctypes.c_void_p
        self._probe.probe_run.restype = ctypes.c_int64
        line = (table.address, table.lines, table.mine, table.own) if table else (None, 0, 0, 0)
        self._team = ctypes.c_void_p(self._probe.probe_team(threads, ctypes.c_void_p(line[0]), *line[1:]))

    def begin(self) -> None:
        self._probe.probe_begin(self._team)

    def end(self) -> None:
        self._probe.probe_end(self._team)

    def welcome(self) -> int:
        return self._probe.probe_welcome(self._team)

    def run(self, tasks: int) -> tuple[torch.Tensor, int]:
        """How often each task was done, and how many of them by helpers."""
        counts = torch.zeros(tasks, dtype=torch.int32)
        helped = self._probe.probe_run(self._team, ctypes.c_int64(tasks), ctypes.c_void_p(counts.data_ptr()))
        return counts, helped

    def run_long(self, whose: torch.Tensor) -> None:
        """As many tasks of a millisecond; `whose` (tasks,) int32 is filled with the threads that did them."""
        self._probe.probe_long(self._team, ctypes.c_int64(len(whose)), ctypes.c_void_p(whose.data_ptr()))

    def close(self) -> None:
        self._probe.probe_disband(self._team)


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"{DEADLINE:.0f} seconds passed without: {what}"
        time.sleep(0.001)


def threads_of_this_process() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_every_task_of_thousands_of_regions_is_done_once(probe: Path, threads: int) -> None:
    """With more threads than cores too, inside one long step and in many short ones, with 0, 1 and many tasks."""
    regions, helped = Regions(probe, threads), 0
    for index in range(4000):
        if index % 100 == 0:
            regions.begin()
        counts, by_helpers = regions.run((64, 0, 5, 1, 2, 200)[index % 6])
        assert (counts == 1).all(), f"region {index}: {counts.tolist()}"
        helped += by_helpers
        if index % 100 == 50 and index % 3:  # some steps never end before the next begins
            regions.end()
    regions.end()

    def helpers_come() -> bool:
        regions.begin()
        found = regions.run(2000)[1] > 0
        regions.end()
        return found

    assert threads > 1 or helped == 0
    if threads > 1:
        until(helpers_come, "a task done by a helper")
    regions.close()


def test_the_first_region_of_a_team_may_be_shared(probe: Path) -> None:
    """Two threads enlarged the list of scratch memories at once: memory was corrupted, the process died."""
    command = [sys.executable, "-c", FIRST_REGIONS, str(probe)]
    assert subprocess.run(command, timeout=DEADLINE, check=False).returncode == 0


@contextmanager
def all_teams_at_once(work: list[Callable[[], None]]) -> Iterator[None]:
    failures = list[BaseException]()

    def guarded(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as exc:
            failures.append(exc)

    started = [threading.Thread(target=guarded, args=(task,)) for task in work]
    for thread in started:
        thread.start()
    yield
    for thread in started:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


def adds_up(seed: int, threads: int, regions: int) -> None:
    """Products of small integers, added up: exact, so a task left out or done twice shows in the sum."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-4, 5, (200, 40), generator=generator).float()
    team, packed = native.Team(threads), native.pack(weight)
    for rows in (1, 13, 250):
        x = torch.randint(-4, 5, (rows, 40), generator=generator).float()
        total = torch.zeros(rows, 200)
        team.begin()
        for _ in range(regions):
            team.product(packed, x, total, native.ADD)
        team.end()
        assert torch.equal(total, regions * (x @ weight.T)), f"seed {seed}, {rows} rows, {threads} threads"


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_products_add_up(threads: int) -> None:
    adds_up(threads, threads, 700)


def test_two_teams_of_one_process_work_at_once() -> None:
    with all_teams_at_once([lambda: adds_up(10, 2, 400), lambda: adds_up(11, 3, 400)]):
        pass


def test_teams_that_are_gone_leave_no_threads() -> None:
    weight, x, y = native.pack(torch.ones(64, 8)), torch.ones(3, 8), torch.empty(3, 64)
    gc.collect()
    before = threads_of_this_process()
    for index in range(100):
        team = native.Team(4)
        assert threads_of_this_process() >= before + 3
        if index % 3:
            team.begin()
            team.product(weight, x, y)
            assert (y == 8).all()
        if index % 3 == 2:
            team.end()
        del team
    until(lambda: threads_of_this_process() == before, "helpers end")


def test_helpers_are_nice_and_sleep_between_steps(probe: Path) -> None:
    before = set(os.listdir("/proc/self/task"))
    regions = Regions(probe, 3)
    helpers = sorted(set(os.listdir("/proc/self/task")) - before)
    assert len(helpers) == 2

    def fields(helper: str) -> list[str]:
        return Path(f"/proc/self/task/{helper}/stat").read_text().rpartition(")")[2].split()

    regions.begin()
    regions.run(500)
    regions.end()
    until(lambda: all(fields(helper)[0] == "S" for helper in helpers), "helpers sleep")
    nicer = min(19, os.getpriority(os.PRIO_PROCESS, 0) + 3)
    assert [os.getpriority(os.PRIO_PROCESS, int(helper)) for helper in helpers] == [nicer, nicer]
    regions.close()


class Neighbour:
    """Another worker of this machine, which owns `own` cores."""

    def __init__(self, table: Path, probe: Path, own: int = 1) -> None:
        command = [sys.executable, "-c", NEIGHBOUR, str(table), str(probe), str(own)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.mine = int(self._answer())

    def do(self, what: str, count: int = 0) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what} {count}\n")
        self._process.stdin.flush()
        assert self._answer() == ("working" if what == "work" else "done")

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        assert self._process.wait(DEADLINE) == -signal.SIGKILL
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "table"


def joined(path: Path, own: int = 1) -> CoreTable:
    table = CoreTable.join(own, path)
    assert table is not None
    return table


@pytest.fixture
def neighbour(path: Path, probe: Path) -> Iterator[Callable[..., Neighbour]]:
    started = list[Neighbour]()

    def start(own: int = 1) -> Neighbour:
        started.append(Neighbour(path, probe, own))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def test_a_busy_neighbour_takes_its_cores_a_resting_or_dead_one_lends_them(
    path: Path, probe: Path, neighbour: Callable[..., Neighbour]
) -> None:
    table = joined(path)
    regions, other = Regions(probe, 4, table), neighbour(own=2)
    assert other.mine != table.mine
    assert regions.welcome() == 4  # it has joined, and rests
    other.do("step")
    assert regions.welcome() == 4  # at once: it said that its step is over
    other.do("prompts", 3)
    other.do("work")
    until(lambda: regions.welcome() == 2, "a busy neighbour's two cores taken")
    until(lambda: table.prompts_elsewhere() == 3, "a busy neighbour's prompts seen")
    regions.begin()
    for _ in range(200):
        assert (regions.run(50)[0] == 1).all()
    regions.end()
    other.kill()
    until(lambda: regions.welcome() == 4, "a dead neighbour's cores lent")
    assert table.prompts_elsewhere() == 0
    assert neighbour().mine == other.mine  # its line is free
    regions.close()


def test_one_keeps_its_own_cores_however_many_others_are_busy(
    path: Path, probe: Path, neighbour: Callable[..., Neighbour]
) -> None:
    table = joined(path, own=2)
    regions = Regions(probe, 4, table)
    table._table["seen"][table.mine] = time.monotonic_ns() + 10**12
    assert regions.welcome() == 4  # that it is busy itself takes nothing away
    neighbour(own=7).do("work")
    until(lambda: regions.welcome() == 2, "all lent cores taken")
    regions.begin()
    until(lambda: regions.run(2000)[1] > 0, "a task done by the helper on the core of its own")
    regions.close()


def test_prompts_are_seen_only_while_their_worker_is_busy(path: Path, neighbour: Callable[..., Neighbour]) -> None:
    table, other = joined(path), neighbour()
    other.do("prompts", 5)
    assert table.prompts_elsewhere() == 0
    other.do("step")
    assert table.prompts_elsewhere() == 0  # its step is over
    table.post_prompts(9)
    table._table["seen"][table.mine] = time.monotonic_ns()
    assert table.prompts_elsewhere() == 0  # one's own do not count
    table._table["seen"][other.mine] = time.monotonic_ns() - cores.BUSY
    assert table.prompts_elsewhere() == 0
    table._table["seen"][other.mine] = time.monotonic_ns() + 10**12
    assert table.prompts_elsewhere() == 5


def test_joining_clears_what_a_dead_worker_left(path: Path, neighbour: Callable[..., Neighbour]) -> None:
    dead = neighbour()
    dead.do("prompts", 5)
    dead.kill()
    table = joined(path)
    assert table.mine == dead.mine
    team = native.Team(2, table)
    assert tuple(table._table[table.mine]) == (0, 1, 0)
    assert team.threads == 2


def test_no_table_means_none(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "other"
    target.write_bytes(b"precious")
    link = tmp_path / "link"
    link.symlink_to(target)
    assert CoreTable.join(1, link) is None
    assert target.read_bytes() == b"precious"
    assert CoreTable.join(1, tmp_path / "nowhere" / "table") is None
    assert CoreTable.join(1, tmp_path) is None
    os.mkfifo(tmp_path / "fifo")
    assert CoreTable.join(1, tmp_path / "fifo") is None
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"theirs")
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    assert CoreTable.join(1, foreign) is None
    assert foreign.read_bytes() == b"theirs"


def test_a_full_table_means_none_and_leaks_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "LINES", 2)
    code = (
        "import sys; from pathlib import Path; from tandem.engine.kernels import cores; cores.LINES = 2;"
        "table = cores.CoreTable.join(1, Path(sys.argv[1])); print(table.mine, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(path)]
    others = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        assert sorted(int(other.stdout.readline()) for other in others if other.stdout) == [0, 1]
        before = os.listdir("/proc/self/fd")
        assert CoreTable.join(1, path) is None
        assert os.listdir("/proc/self/fd") == before
    finally:
        for other in others:
            other.communicate(timeout=DEADLINE)
    assert joined(path).mine == 0


def test_only_its_user_reads_the_table(path: Path) -> None:
    joined(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size == cores.LINE * cores.LINES


def test_helpers_come_and_go_within_a_long_region(path: Path, probe: Path) -> None:
    """A neighbour's last task has just begun: 5 ms later its core is lent. When it is back it gets its core back."""
    mine = joined(path)
    regions, whose = Regions(probe, 2, mine), torch.full((1500,), -1, dtype=torch.int32)
    neighbour = mine._table[mine.mine + 1]  # a view
    neighbour["cores"], neighbour["seen"] = 1, time.monotonic_ns()

    def come_back() -> None:
        until(lambda: bool((whose == 1).any()), "a helper's task")
        neighbour["seen"] = time.monotonic_ns() + 10**12

    regions.begin()
    with all_teams_at_once([lambda: regions.run_long(whose), come_back]):
        pass
    regions.end()
    helped = (whose == 1).nonzero().flatten()
    assert len(helped) > 0 and helped[-1] < len(whose) - 1, "a helper came, and went before the end"
    regions.close()
