"""kill -9 at every failpoint of every role, under load: nothing hangs, nothing is told twice or wrongly, nothing leaks,
and nobody has to do anything but start the process again.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tandem.common.failpoints import NAMES
from tests.common.trained import write_chatml
from tests.engine.model_zoo import build
from tests.faults.clients import (
    MANY,
    PATIENT,
    PLAIN,
    VOCAB,
    Answer,
    Crowd,
    Json,
    check,
    follow,
    make_bodies,
    record,
    with_stops,
)
from tests.faults.process_cluster import ROUTER, ProcessCluster, until
from tests.faults.scale import SCALE

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

SEED = 20261
KV_BYTES = 12 << 20
ABORT = 2.0  # seconds in which workers end the legs of a router that died
SERVES = 3.0  # seconds from a router's death until its successor serves, a fork of the template included
ANSWERS = 80  # at least, of the kills at random moments
GAP = 3.0  # seconds between two tokens of a stream that moves to a worker that is there
FALLBACK = 2.0  # seconds in which a request is answered behind the death of the last prefill worker
WORKER_CASES = [
    *[(name.partition(".")[0], name) for name in NAMES if name.startswith(("prefill.", "decode."))],
    *[(role, name) for name in NAMES if name.startswith("link.") for role in ("prefill", "decode")],
]
ROUTER_CASES = [name for name in NAMES if name.startswith("router.")]
PROVOKED = {  # what does not happen by itself: which worker has to die for it
    ("prefill", "link.opened"): "decode-0",
    ("decode", "link.opened"): "prefill-0",
    (ROUTER, "router.retry"): "decode-0",
}


class Oracle:
    """A model directory, requests, and their answers without faults."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        build("llama-llama3-rope-tied", directory, vocab_size=VOCAB, max_position_embeddings=1280)
        write_chatml(directory)
        self.bodies: list[Json] = make_bodies(SEED)
        self.answers: list[Answer] = []

    def record(self, cluster: ProcessCluster) -> None:
        self.bodies = with_stops(self.bodies, record(cluster.url, self.bodies))
        self.answers = record(cluster.url, self.bodies)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cluster(oracle: Oracle) -> Iterator[ProcessCluster]:
    worker_flags = ("--kv-cache-memory-bytes", str(KV_BYTES), "--max-num-batched-tokens", "128")
    with ProcessCluster(
        oracle.directory, 2, 2, worker_flags=worker_flags, router_flags=("--request-timeout", "30")
    ) as cluster:
        with cluster.explained():
            oracle.record(cluster)
        yield cluster


@pytest.fixture(autouse=True)
def whole_again(cluster: ProcessCluster) -> Iterator[None]:
    """Each test begins and ends with every worker there, and its blocks free or cached."""
    with cluster.explained():
        cluster.wait_ready()
        cluster.assert_at_rest()
        yield
        cluster.wait_ready()
        cluster.assert_at_rest()


def make_crowd(cluster: ProcessCluster, oracle: Oracle, case: str) -> Crowd:
    return Crowd(cluster.url, oracle.bodies, seed=random.Random(f"{SEED} {case}").randrange(1 << 32))


def strike(cluster: ProcessCluster, role: str, name: str) -> None:
    """Arm a kill, provoke what does not come by itself, and wait until it struck."""
    provoked = PROVOKED.get((role, name))
    count = 1 if provoked else random.Random(f"{SEED} {role} {name}").randint(1, 4)
    cluster.arm(role, name, f"kill@{count}")
    if provoked:
        cluster.kill(provoked)
    cluster.wait_hit(role, name)


def test_without_faults_the_crowd_gets_what_was_recorded(cluster: ProcessCluster, oracle: Oracle) -> None:
    with make_crowd(cluster, oracle, "none") as crowd:
        crowd.wait_served(60)
    crowd.check(oracle.answers)
    assert crowd.ends()["left"] > 0


@pytest.mark.parametrize(("role", "name"), WORKER_CASES, ids=lambda value: value)
def test_kill_a_worker_at(role: str, name: str, cluster: ProcessCluster, oracle: Oracle) -> None:
    with make_crowd(cluster, oracle, f"{role} {name}") as crowd:
        crowd.wait_served(5)
        strike(cluster, role, name)
        cluster.wait_ready()
        crowd.wait_served(15)
    crowd.check(oracle.answers)


@pytest.mark.parametrize("name", ROUTER_CASES)
def test_kill_the_router_at(name: str, cluster: ProcessCluster, oracle: Oracle) -> None:
    with make_crowd(cluster, oracle, name) as crowd:
        crowd.wait_served(5)
        pid = cluster.pid(ROUTER)
        assert pid is not None
        strike(cluster, ROUTER, name)
        cluster.wait_ended(ROUTER, pid)
        died = time.monotonic()
        crowd.wait_lost()
        until(lambda: idle(cluster), ABORT, f"{name}: legs outlived their router")
        assert time.monotonic() - died < ABORT
        cluster.wait_ready()
        serves = time.monotonic() - died
        crowd.resume()
        crowd.wait_served(15)
    crowd.check(oracle.answers, lost=True)
    print(f"{serves:.2f} s from the router's death until its successor saw every worker ready")
    assert serves < SERVES


def idle(cluster: ProcessCluster) -> bool:
    """Asked of the workers themselves, and of all but one that was killed as well."""
    loads = cluster.loads()
    return len(loads) >= len(cluster.workers) - 1 and all(
        load.running + load.waiting + load.blocks_owned + load.blocks_reserved == 0 for load in loads.values()
    )


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_kill_at_random_moments(victim: str, cluster: ProcessCluster, oracle: Oracle) -> None:
    """E2, E4: 80 answers and more by default, 800 and more with TANDEM_FAULT_SCALE=10; as many kills as attempts."""
    rng = random.Random(f"{SEED} {victim}")
    with make_crowd(cluster, oracle, victim) as crowd:
        for _ in range(3):
            crowd.wait_served(rng.randint(1, 20))
            cluster.kill(f"{victim}-{rng.randrange(2)}")
            cluster.wait_ready()
        crowd.wait_served(max(20, ANSWERS * SCALE - crowd.whole))
    crowd.check(oracle.answers)


# ---------------------------------------------------------------------- a whole pool


@contextmanager
def dead(cluster: ProcessCluster, role: str) -> Generator[None]:
    """Every worker of `role` is killed together, as the only one; outside, they are started again."""
    names = [name for name in cluster.workers if name.startswith(role)]
    for name in names:
        cluster.release(name)
    killed = {name: cluster.kill(name) for name in names}
    try:
        yield
    finally:
        for name, pid in killed.items():
            cluster.wait_ended(name, pid)
            cluster.keep(name)


def test_without_the_only_prefill_worker_decode_workers_prefill(cluster: ProcessCluster, oracle: Oracle) -> None:
    """E3: from the moment of its death on; and when it is back, everything is as before."""
    with dead(cluster, "prefill"):
        answers = record(cluster.url, oracle.bodies[:8])  # raises unless all are whole
        again = record(cluster.url, oracle.bodies[:8])
    started = time.monotonic()
    cluster.wait_ready()
    check(answers + again, oracle.answers)
    slowest = max(answer.seconds for answer in answers)
    print(
        f"16 of 16 answered by decode workers, the slowest of the first 8 in {slowest:.2f} s, of the next in "
        f"{max(answer.seconds for answer in again):.2f} s; both roles ready {time.monotonic() - started:.2f} s behind "
        "the restart"
    )
    assert slowest < FALLBACK


async def test_streams_of_the_only_decode_worker_go_on_behind_it(cluster: ProcessCluster) -> None:
    """E5: none ends while it is away; they, and who came meanwhile, go on with its successor."""
    bodies = long_bodies(12)
    expected = await asyncio.to_thread(record, cluster.url, bodies)
    answers = [Answer(index) for index in range(len(bodies))]
    async with httpx.AsyncClient(base_url=cluster.url, timeout=PATIENT, limits=MANY, verify=PLAIN) as client:
        running = await begin(client, bodies[:8], answers[:8])
        with dead(cluster, "decode"):
            await asyncio.to_thread(until, lambda: not decode_workers(cluster), 5.0, "the router did not notice")
            before = [answer.events for answer in answers[:8]]
            late = asyncio.gather(*(follow(client, bodies[index], answers[index]) for index in range(8, 12)))
        started = time.monotonic()
        await asyncio.gather(running, late)
    check(answers, expected)
    assert all(answer.events > count for answer, count in zip(answers[:8], before, strict=True))
    gaps = [answer.gap for answer in answers[:8]]
    print(
        f"8 of 8 streams went on behind a gap of {min(gaps):.2f} to {max(gaps):.2f} s; 4 of 4 that came while there "
        f"was no decode worker were answered; all of it {time.monotonic() - started:.2f} s behind the restart"
    )


def decode_workers(cluster: ProcessCluster) -> list[str]:
    return [name for name in cluster.status() if name.startswith("decode")]


# ---------------------------------------------------------------------- gaps


def long_bodies(count: int) -> list[Json]:
    """Greedy and seeded ones, with penalties too."""
    return [
        body | {"prompt": [index, *body["prompt"][:40]], "max_tokens": 150, "n": 1}
        for index, body in enumerate(make_bodies(SEED + 1)[:count])
    ]


async def begin(client: httpx.AsyncClient, bodies: list[Json], answers: list[Answer]) -> asyncio.Future[list[None]]:
    """What ends with the last of the streams, all of which have begun."""
    streams = [follow(client, body, answer) for body, answer in zip(bodies, answers, strict=True)]
    running = asyncio.gather(*streams)
    while not all(answer.events > 3 for answer in answers):
        assert not running.done(), "the streams ended before all had begun"
        await asyncio.sleep(0.005)
    return running


async def test_eight_streams_of_a_dead_decode_worker_go_on(cluster: ProcessCluster) -> None:
    """E4: sixteen on two workers, and the one with more dies."""
    bodies = long_bodies(16)
    expected = await asyncio.to_thread(record, cluster.url, bodies)
    answers = [Answer(index) for index in range(len(bodies))]
    async with httpx.AsyncClient(base_url=cluster.url, timeout=PATIENT, limits=MANY, verify=PLAIN) as client:
        running = await begin(client, bodies, answers)
        workers = await asyncio.to_thread(cluster.status)
        victim = max(("decode-0", "decode-1"), key=lambda name: workers[name]["running"])
        cluster.kill(victim)
        assert workers[victim]["running"] >= 8, workers
        await running
    check(answers, expected)
    gaps = sorted((answer.gap for answer in answers), reverse=True)
    moved = workers[victim]["running"]
    print(f"{moved} streams moved; their longest gaps between two tokens: {gaps[moved - 1]:.2f} to {gaps[0]:.2f} s")
    assert gaps[0] < GAP
