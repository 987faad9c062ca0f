"""The soak (E53): a cluster under half of what it can do, a fault every half minute, for as long as you like.

    python tests/faults/soak.py [--minutes 60] [--every 30] [--seed N]        or: make soak ARGS='--minutes 60'

    schedule ──one fault at a time──► Redis, router, 2 P, 2 D ◄──asked── Crowd ──compared──► answers without faults

Only who lives long shows that it grows: the router dies in the first quarter of the run only, nobody in the last.
Ctrl-C ends the run with the report so far. Exit code 1 tells of violations: answers that are wrong, hang, or fail and
no fault explains it; a cluster not ready again, or not at rest; a process that ends by itself, or grows.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])  # for `tests`, as pytest does it

from tests.faults.clients import PLAIN, Crowd, End, check
from tests.faults.process_cluster import ROUTER, ProcessCluster, until
from tests.faults.test_kill_matrix import KV_BYTES, PROVOKED, ROUTER_CASES, WORKER_CASES, Oracle
from tests.faults.test_processes import standing_still, stopped_one

REDIS, WORKERS = "redis", ("prefill-0", "prefill-1", "decode-0", "decode-1")
PROCESSES = [(name, "") for name in (ROUTER, *WORKERS)]
FAILPOINTS = [*WORKER_CASES, *((ROUTER, name) for name in ROUTER_CASES)]
DROPPED = ("link.beat", "prefill.finished", "decode.admitted")  # what is sent there can be lost
CLIENTS, LEAVERS = 3, 1  # as few as get half of what twenty get
REST_EVERY, SAMPLE = 10, 2.0  # faults; seconds
PATIENCE = 40.0  # seconds until all is well again; a worker may wait for a lost message for 30
HIT, ENDING = 10.0, 3.0  # seconds until somebody comes to a failpoint; until a worker whose loop ended is gone
LONG_LIFE = 1 / 6  # hours, below which growth says nothing
MAX_SLOPE, MAX_GROWTH = 1.0, 8.0  # MB an hour, of a router, in a run of an hour; fds or threads, in half a life


class Fault(NamedTuple):
    target: str  # a process, or Redis; of a failpoint, a role
    action: str
    name: str = ""  # of a failpoint
    seconds: float = 0.0  # that something stands still or is away

    def __str__(self) -> str:
        return " ".join(str(part) for part in self if part)

    @property
    def fatal(self) -> bool:
        killed = self.target != REDIS and self.action.startswith(("kill", "raise"))
        return killed or (self.target, self.name) in PROVOKED

    @property
    def allowed(self) -> dict[End, int]:
        """How many answers may end otherwise than whole or because the client left."""
        explained: dict[str, dict[End, int]] = {"kill": {"lost": CLIENTS}, "raise": {"error": 1}}
        return explained.get(self.action.partition("@")[0], {}) if self.target == ROUTER else {}


def schedule(seed: int, count: int) -> list[Fault]:
    rng = random.Random(seed)
    return [_draw(rng, router_dies=4 * i < count, workers_die=4 * i < 3 * count) for i in range(count)]


def _draw(rng: random.Random, *, router_dies: bool, workers_die: bool) -> Fault:
    places = rng.choice([PROCESSES, PROCESSES, FAILPOINTS, FAILPOINTS, [(REDIS, "")]])
    target, name = rng.choice([place for place in places if workers_die or place not in PROVOKED])
    dies = {ROUTER: router_dies, REDIS: True}.get(target, workers_die)
    fails = name and (dies or target == ROUTER)  # it ends a worker
    action = rng.choice(["stop", *["kill"] * dies, *["raise"] * bool(fails), *["drop"] * (name in DROPPED)])
    count = f"@{rng.randint(1, 4)}" if name and (target, name) not in PROVOKED else ""
    seconds = round(rng.uniform(0.5, 3.0 if name or target == ROUTER else 6.0), 1)
    return Fault(target, action + count, name, seconds if action == "stop" or target == REDIS else 0.0)


class Sample(NamedTuple):
    hours: float
    rss: float  # MB
    fds: float
    threads: float


def slope(samples: Sequence[Sample], what: str) -> float:
    """Least squares over the second half, an hour."""
    late = samples[len(samples) // 2 :]
    return statistics.linear_regression([s.hours for s in late], [getattr(s, what) for s in late]).slope


def growth(name: str, samples: Sequence[Sample], long_run: bool) -> list[str]:
    """What must not grow and does."""
    few = 2 * MAX_GROWTH / (samples[-1].hours - samples[0].hours)
    limits = {"rss": MAX_SLOPE if name == ROUTER and long_run else math.inf, "fds": few, "threads": few}
    rates = {what: slope(samples, what) for what in limits}
    return [f"{name}: {rates[what]:+.1f} {what} an hour" for what in limits if rates[what] > limits[what]]


class Soak:
    def __init__(self, cluster: ProcessCluster, oracle: Oracle, seed: int) -> None:
        self.violations: list[str] = []
        self._cluster, self._oracle, self._seed = cluster, oracle, seed
        self._series: dict[tuple[str, int], list[Sample]] = defaultdict(list)  # by name and pid
        self._ends = Counter[str]()
        self._start = time.monotonic()

    def run(self, faults: list[Fault], every: float) -> None:
        for number, fault in enumerate(faults, 1):
            with self._watched(str(fault)):
                self._suffer(fault, self._start + number * every, self._seed + number)
            if number % REST_EVERY == 0 or number == len(faults):
                with self._watched("at rest"):
                    self._cluster.wait_ready(PATIENCE)
                    self._cluster.assert_at_rest(PATIENCE)

    def _suffer(self, fault: Fault, end: float, seed: int) -> None:
        """The fault and the calm behind it, until `end`, with a crowd of their own."""
        self._cluster.wait_ready(PATIENCE)
        pids = self._pids()
        with Crowd(self._cluster.url, self._oracle.bodies, clients=CLIENTS, leavers=LEAVERS, seed=seed) as crowd:
            crowd.wait_served(1)
            note, over = self._strike(fault), time.monotonic()
            self._cluster.wait_ready(PATIENCE)
            recovery = time.monotonic() - over
            crowd.resume()
            crowd.wait_served(CLIENTS)
            self._sample()
            while (left := end - time.monotonic()) > 0:
                time.sleep(min(left, SAMPLE))  # the pace
                self._sample()
        print(f"{time.strftime('%X')} {fault}{note}: served {crowd.whole}, ready after {recovery:.1f} s", flush=True)
        self._ends.update(ends := crowd.ends())
        check(crowd.answers, self._oracle.answers, {"done", "left", *fault.allowed})
        assert all(ends[end] <= count for end, count in fault.allowed.items()), f"too many of {fault.allowed}: {ends}"
        assert fault.fatal or self._pids() == pids, f"{pids} became {self._pids()}"

    def _pids(self, role: str = "") -> list[int | None]:
        return [self._cluster.pid(name) for name in (ROUTER, *WORKERS) if name.startswith(role)]

    @contextmanager
    def _watched(self, what: str) -> Generator[None]:
        """Whatever breaks inside is a violation; the run goes on."""
        try:
            yield
        except (AssertionError, OSError, httpx.TransportError, psutil.Error) as exc:
            self.violations.append(f"{time.strftime('%X')} {what}: {exc!r}")
            print(f"VIOLATION {self.violations[-1]}\n{self._cluster.logs()}", file=sys.stderr, flush=True)

    def _strike(self, fault: Fault) -> str:
        """Until who was to die is dead, and who stood still goes on. A remark."""
        if fault.name:
            return self._strike_at_failpoint(fault)
        if fault.target == REDIS:
            self._strike_redis(fault)
        elif fault.action == "kill":
            self._cluster.wait_ended(fault.target, self._cluster.kill(fault.target))
        else:
            with standing_still(self._cluster, fault.target):
                time.sleep(fault.seconds)  # the fault
        return ""

    def _strike_redis(self, fault: Fault) -> None:
        redis, url = self._cluster._redis, self._cluster.url + "/status"
        os.kill(redis.pid, signal.SIGKILL if fault.action == "kill" else signal.SIGSTOP)
        time.sleep(fault.seconds)  # the fault
        if fault.action == "kill":
            redis.restart()
        else:
            os.kill(redis.pid, signal.SIGCONT)
        until(
            lambda: httpx.get(url, verify=PLAIN).json()["registry"] == "up", PATIENCE, "the registry was not up again"
        )

    def _strike_at_failpoint(self, fault: Fault) -> str:
        cluster, role, name = self._cluster, fault.target, fault.name
        pids, directory = self._pids(role), cluster._directory / role
        cluster.arm(role, name, fault.action)
        if victim := PROVOKED.get((role, name)):
            cluster.wait_ended(victim, cluster.kill(victim))
        with suppress(AssertionError):
            cluster.wait_hit(role, name, HIT)
        (directory / f"{name}.arm").unlink(missing_ok=True)
        if not (directory / f"{name}.hit").exists():
            return " (nobody came there)"
        if fault.action.startswith("stop"):
            with standing_still(cluster, ROUTER if role == ROUTER else stopped_one(cluster, role)):
                time.sleep(fault.seconds)  # the fault
        elif fault.fatal:
            with suppress(AssertionError):  # perhaps a request or a link ended, and no process
                until(lambda: self._pids(role) != pids, ENDING, "")
        return ""

    def _sample(self) -> None:
        for name in (ROUTER, *WORKERS):
            with suppress(psutil.NoSuchProcess):  # it has just ended
                if pid := self._cluster.pid(name):
                    process, now = psutil.Process(pid), (time.monotonic() - self._start) / 3600
                    sample = Sample(now, process.memory_info().rss / 1e6, process.num_fds(), process.num_threads())
                    self._series[name, pid].append(sample)

    def report(self) -> None:
        """Of those who lived long, and of the last of each name."""
        hours, last = (time.monotonic() - self._start) / 3600, dict(self._series.keys())
        print("process pid minutes MB/h, MB fds threads at the begin, MB fds threads at the end")
        for (name, pid), samples in sorted(self._series.items()):
            lived = samples[-1].hours - samples[0].hours
            rate = f"{slope(samples, 'rss'):.2f}" if lived > LONG_LIFE else ""
            self.violations += growth(name, samples, long_run=hours >= 1) if rate else []
            if rate or last[name] == pid:
                print(name, pid, f"{60 * lived:.1f}", rate or "-", *map(round, (*samples[0][1:], *samples[-1][1:])))
        print(f"seed {self._seed}, {hours * 60:.1f} minutes, {len(self._series)} processes, answers {dict(self._ends)}")
        print(f"{len(self.violations)} violations", *self.violations, sep="\n", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="A cluster under load, one fault at a time (E53).")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=30.0, help="seconds from one fault to the next")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    flags = parser.parse_args()
    with ExitStack() as stack:
        oracle = Oracle(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-soak-"))))
        worker = ("--kv-cache-memory-bytes", str(KV_BYTES), "--max-num-batched-tokens", "128")
        router = ("--request-timeout", str(PATIENCE))
        cluster = ProcessCluster(oracle.directory, worker_flags=worker, router_flags=router)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: a terminal's Ctrl-C is for us alone
        stack.enter_context(cluster)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        oracle.record(cluster)
        print(f"seed {flags.seed}", flush=True)
        soak = Soak(cluster, oracle, flags.seed)
        stack.callback(soak.report)
        with suppress(KeyboardInterrupt):
            soak.run(schedule(flags.seed, max(1, round(flags.minutes * 60 / flags.every))), flags.every)
    return 1 if soak.violations else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
