"""What an operating system does to processes: kills them, stops them, starves them, takes their memory and disk away.

Real processes under load (process_cluster.py); what a crowd of clients gets is compared with the same requests without
faults. Experiments E1, E6, E9, E10, E12, E28 and E30 to E32.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tandem.engine.config import EngineConfig
from tests.faults.clients import VOCAB, Answer, Crowd, Json, check, record
from tests.faults.local import DEMO_MODEL, pace, worker_of
from tests.faults.process_cluster import ROUTER, ProcessCluster, until
from tests.faults.test_kill_matrix import KV_BYTES, Oracle
from tests.integration.local_cluster import LocalCluster

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

SEED = 6
CLIENTS = 8
AT_ONCE = 1.0  # seconds; a reset connection, and the news of it in the router's list
LEASE = 5.0  # seconds, of a reservation without a sign of life
NOTICED = 6.0  # seconds; gRPC's keep-alive takes 5 at most
STANDSTILL = 6.0  # seconds; a link gives its peer up after 5
PULSE = (0.45, 0.05)  # seconds stopped and running: 10 % of a core at most
LOG_DISK = 4 << 20  # bytes


class LoggingCluster(ProcessCluster):
    """Its logs are in a directory of their own."""

    def __init__(self, logs: Path, model: Path) -> None:
        super().__init__(
            model, 2, 2, worker_flags=("--kv-cache-memory-bytes", str(KV_BYTES), "--max-num-batched-tokens", "128"),
            router_flags=("--request-timeout", "30"),
        )  # fmt: skip
        self._logs = logs

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"


@pytest.fixture(scope="module")
def log_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small file system of its own where mounting is allowed."""
    path = tmp_path_factory.mktemp("logs")
    command = ["mount", "-t", "tmpfs", "-o", f"size={LOG_DISK}", "none", str(path)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    yield path
    if mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    oracle = Oracle(tmp_path_factory.mktemp("model"))
    oracle.bodies = oracle.bodies[8:]
    return oracle


@pytest.fixture(scope="module")
def cluster(oracle: Oracle, log_disk: Path) -> Iterator[ProcessCluster]:
    with LoggingCluster(log_disk, oracle.directory) as cluster:
        with cluster.explained():
            oracle.record(cluster)
        yield cluster


@pytest.fixture(autouse=True)
def whole_again(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test with the cluster begins and ends with every worker there, and its blocks free or cached."""
    if "cluster" not in request.fixturenames:
        yield
        return
    cluster: ProcessCluster = request.getfixturevalue("cluster")
    with cluster.explained():
        cluster.wait_ready()
        cluster.assert_at_rest()
        yield
        cluster.wait_ready()
        cluster.assert_at_rest()


def make_crowd(cluster: ProcessCluster, oracle: Oracle, case: str) -> Crowd:
    seed = random.Random(f"{SEED} {case}").randrange(1 << 32)
    return Crowd(cluster.url, oracle.bodies, clients=CLIENTS, leavers=1, seed=seed)


def stopped_one(cluster: ProcessCluster, role: str) -> str:
    """The process of `role` that a failpoint has stopped."""

    def find() -> str | None:
        names = [name for name in cluster.workers if name.startswith(role)]
        return next((name for name in names if is_stopped(cluster.pid(name))), None)

    until(lambda: find() is not None, 5.0, f"no {role} worker stands still")
    return find() or ""


def is_stopped(pid: int | None) -> bool:
    return pid is not None and psutil.Process(pid).status() == psutil.STATUS_STOPPED


@contextmanager
def standing_still(cluster: ProcessCluster, name: str) -> Generator[int]:
    """Its pid. Whatever happens, it goes on afterwards."""
    pid = cluster.pid(name)
    assert pid is not None
    with stopped(pid):
        yield pid


@contextmanager
def stopped(pid: int) -> Generator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


# ------------------------------------------------------------------------------------------------ whose blocks are back


@contextmanager
def one_caught(cluster: ProcessCluster, role: str, failpoint: str) -> Generator[tuple[str, Future[list[Answer]]]]:
    """A long prompt alone on the cluster, whose worker of `role` stands still at the failpoint; and its answer."""
    body: Json = {
        "model": "m", "prompt": random.Random(f"{SEED} {failpoint}").choices(range(VOCAB), k=500), "max_tokens": 16,
        "temperature": 0, "ignore_eos": True, "return_token_ids": True, "stream": True,
    }  # fmt: skip
    with ThreadPoolExecutor(1) as pool:
        cluster.arm(role, failpoint, "stop")
        asking = pool.submit(record, cluster.url, [body])
        cluster.wait_hit(role, failpoint)
        yield stopped_one(cluster, role), asking
        caught = asking.result()
    check(record(cluster.url, [body]), caught)


def held(cluster: ProcessCluster, role: str, *kinds: str) -> int:
    """Blocks of the two workers of `role` that are owned, reserved or quarantined; nobody else may have died."""
    workers = [worker for name, worker in cluster.status().items() if name.startswith(role)]
    assert len(workers) == 2, f"the router tells of {len(workers)} {role} workers"
    return sum(worker["kv"][kind] for worker in workers for kind in kinds)


def test_e1_an_idle_prefill_worker_dies(cluster: ProcessCluster, oracle: Oracle) -> None:
    """It leaves the list at once, and the next request is as good as any."""
    cluster.kill("prefill-0")
    died = time.monotonic()
    until(lambda: 0 < len(cluster.status()) < 4, AT_ONCE, "the dead worker is still in the list")
    noticed = time.monotonic() - died
    check(record(cluster.url, oracle.bodies[:1]), oracle.answers[:1])
    print(f"an idle P's death was noticed after {noticed:.2f} s, and the next request answered {since(died)} after it")


def since(moment: float) -> str:
    return f"{time.monotonic() - moment:.2f} s"


def test_e6_a_dead_decode_worker_gives_p_its_pins_back_at_once(cluster: ProcessCluster) -> None:
    with one_caught(cluster, "decode", "decode.landed") as (victim, asking):
        until(lambda: held(cluster, "prefill", "owned") > 0, 3.0, "P pinned nothing")
        cluster.kill(victim)
        died = time.monotonic()
        until(lambda: held(cluster, "prefill", "owned") == 0, AT_ONCE, "P keeps blocks for a dead decode worker")
        print(f"P's pins were back {time.monotonic() - died:.2f} s after D's death")
        asking.result()


def test_e6_a_dead_prefill_worker_gives_d_its_reservation_back(cluster: ProcessCluster) -> None:
    """Over shm, where P writes by itself: the blocks are quarantined until P's death is certain."""
    with one_caught(cluster, "prefill", "prefill.computed") as (victim, asking):
        until(lambda: held(cluster, "decode", "reserved") > 0, 3.0, "D reserved nothing")
        cluster.kill(victim)
        died = time.monotonic()
        until(lambda: held(cluster, "decode", "reserved", "quarantined") == 0, LEASE + 2.0, "D keeps a dead P's blocks")
        print(f"D's reservation was back {time.monotonic() - died:.2f} s after P's death")
        asking.result()


# ------------------------------------------------------------------------------------------------------ standing still


@pytest.mark.parametrize("failpoint", ["prefill.computed", "decode.landed"])
def test_e9_e10_a_worker_stands_still_in_a_transfer_and_comes_back(
    failpoint: str, cluster: ProcessCluster, oracle: Oracle
) -> None:
    """Longer than its peers believe in it. Its requests go elsewhere, and what it does when it wakes harms nobody."""
    role = failpoint.partition(".")[0]
    with make_crowd(cluster, oracle, failpoint) as crowd:
        crowd.wait_served(5)
        cluster.arm(role, failpoint, "stop")
        cluster.wait_hit(role, failpoint)
        victim = stopped_one(cluster, role)
        with standing_still(cluster, victim) as pid:
            began = time.monotonic()
            until(lambda: not is_ready(cluster, victim), NOTICED, f"{victim} stands still and is called ready")
            print(f"{victim} stands still: the router noticed after {since(began)}")
            while time.monotonic() < began + STANDSTILL:
                crowd.wait_served(1)
        cluster.wait_ready()
        assert cluster.pid(victim) == pid, "it was to come back, not to be replaced"
        crowd.wait_served(20)
    crowd.check(oracle.answers)


def is_ready(cluster: ProcessCluster, name: str) -> bool:
    workers = cluster.status()
    assert workers, "the router does not answer"
    return workers.get(name, {}).get("state") == "ready"


def test_e12_the_router_stands_still(cluster: ProcessCluster, oracle: Oracle) -> None:
    """Shorter than anybody's patience: every stream goes on, and clients that left meanwhile are forgotten."""
    with make_crowd(cluster, oracle, "router") as crowd:
        crowd.wait_served(5)
        with standing_still(cluster, ROUTER):
            before = len(crowd.answers)
            time.sleep(3.0)  # the fault
            left = len(crowd.answers) - before
        crowd.wait_served(10)
    crowd.check(oracle.answers)
    assert left > 0, "nobody left meanwhile"


def test_e12_a_deadline_passes_while_the_router_stands_still() -> None:
    """P ends the work itself, in the middle, with nobody there to tell it; the client gets one error, when it can."""
    engine = EngineConfig(str(DEMO_MODEL), max_num_batched_tokens=32, kv_cache_memory_bytes=32 << 20)
    with LocalCluster(engine, router_flags=("--request-timeout", "1")) as cluster, ThreadPoolExecutor(1) as pool:
        server = cluster.workers["prefill-0"]
        pace(server, 0.1)  # 2.3 s for the prompt
        begun = count_steps(server)
        body = {"model": "m", "prompt": "so it goes on and on " * 120, "max_tokens": 4}
        asking = pool.submit(httpx.post, cluster.url + "/v1/completions", json=body, timeout=20.0)
        until(lambda: bool(begun), 5.0, "P did not begin")
        with stopped(cluster._router.pid):
            until(lambda: server.pool.counts().at_rest, 1.8, "P computes for a request whose deadline has passed")
            computed = len(begun)
        answer = asking.result()
        assert (answer.status_code, list(answer.json())) == (504, ["error"]), answer.text
        assert len(begun) == computed, "P went on with the router"
        print(
            f"P ended expired work by itself, {time.monotonic() - begun[0]:.1f} s and {computed} steps after its begin"
        )


def count_steps(server: Any) -> list[float]:
    """When each step of its engine began."""
    begun, engine = list[float](), worker_of(server)._engine
    forward = engine.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        begun.append(time.monotonic())
        return forward(*args, **kwargs)

    engine.forward = counted
    return begun


def test_e32_a_starved_decode_worker(cluster: ProcessCluster, oracle: Oracle) -> None:
    """A tenth of a core for 5 s. Whether it is still believed in or not, nobody gets a wrong token or none."""
    pid = cluster.pid("decode-0")
    assert pid is not None
    with make_crowd(cluster, oracle, "starved") as crowd:
        crowd.wait_served(5)
        deadline = time.monotonic() + 5.0
        while time.monotonic() < deadline:
            for signum, seconds in zip((signal.SIGSTOP, signal.SIGCONT), PULSE, strict=True):
                os.kill(pid, signum)
                time.sleep(seconds)  # the fault
        cluster.wait_ready()
        crowd.wait_served(10)
    crowd.check(oracle.answers)
    assert cluster.pid("decode-0") == pid


# ------------------------------------------------------------------------------------------------------------ memory


def test_e31_no_kv_with_a_name_is_shared_so_nothing_stale_is_left(cluster: ProcessCluster, oracle: Oracle) -> None:
    """KV is shared as files without a name: when all who map them are killed at once, they are gone.

    The one file with a name is the table of cores, 4 KiB, whose lines grow old with those who wrote them.
    """
    with make_crowd(cluster, oracle, "shared") as crowd:
        crowd.wait_served(5)
        maps = {name: Path(f"/proc/{cluster.pid(name)}/maps").read_text() for name in cluster.workers}
        assert "/memfd:" in maps["prefill-0"] + maps["prefill-1"], "no prefill worker writes into D's memory"
        named = {line.split()[-1] for text in maps.values() for line in text.splitlines() if "/dev/shm" in line}
        assert named <= {f"/dev/shm/tandem-cores-{os.getuid()}"}
        for name in cluster.workers:
            cluster.kill(name)
        cluster.wait_ready()
        crowd.wait_served(5)
    ends = {"done", "left", "error"}  # for a moment there is nobody to serve
    check(crowd.answers, oracle.answers, ends)


@contextmanager
def memory_group() -> Generator[tuple[Path, str]]:
    """A cgroup of version 1 or 2, and the name of its limit."""
    found: tuple[Path, str] | None = None
    for parent, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(parent) / f"tandem-test-{os.getpid()}"
        with suppress(OSError):
            group.mkdir()
            if (group / limit).exists():
                found = group, limit
                break
            group.rmdir()
    if found is None:
        pytest.skip("this machine lets us make no memory cgroup")
    try:
        yield found
    finally:
        until(lambda: not (found[0] / "cgroup.procs").read_text(), 5.0, "somebody is left in the cgroup")
        found[0].rmdir()


def test_e30_the_kernel_kills_a_decode_worker_for_its_memory(cluster: ProcessCluster, oracle: Oracle) -> None:
    pid = cluster.pid("decode-0")
    assert pid is not None
    with make_crowd(cluster, oracle, "memory") as crowd, memory_group() as (group, limit):
        crowd.wait_served(5)
        (group / limit).write_text(str(64 << 10))
        (group / "cgroup.procs").write_text(str(pid))
        cluster.wait_ended("decode-0", pid, 20.0)
        cluster.wait_ready()
        crowd.wait_served(15)
    crowd.check(oracle.answers)


# -------------------------------------------------------------------------------------------------------------- disk


def test_e28_a_full_disk_costs_log_lines_only(cluster: ProcessCluster, oracle: Oracle, log_disk: Path) -> None:
    if not log_disk.is_mount():
        pytest.skip("this machine lets us mount no small file system")
    filler = log_disk / "filler"
    with make_crowd(cluster, oracle, "disk") as crowd:
        crowd.wait_served(5)
        fill(filler)
        crowd.wait_served(10)
        cluster.wait_ended("decode-0", cluster.kill("decode-0"))  # everybody has something to log now
        cluster.wait_ready()
        crowd.wait_served(10)
        sizes = log_sizes(cluster)
        filler.unlink()
        cluster.wait_ended("prefill-0", cluster.kill("prefill-0"))
        cluster.wait_ready()
        assert log_sizes(cluster) > sizes, "nobody logs again"
    crowd.check(oracle.answers)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError as exc:
            assert exc.errno == errno.ENOSPC


def log_sizes(cluster: ProcessCluster) -> int:
    return sum(len(cluster.log(name)) for name in (ROUTER, *cluster.workers))
