"""Both pools too small for what is asked of them: D preempts, P waits, everybody advances (E51, E52).

Blocks held here while room is awaited there are what deadlocks are made of; rule H8 is that P holds none before its
grant. Each story runs with many seeds; the engine's KV is a checksum, so a block that was given away too early is seen.
"""

from __future__ import annotations

import random
import threading
import time

import pytest

from tandem.decode_worker.limits import DecodeLimits
from tandem.decode_worker.reservation import Phase
from tests.faults.scenarios import assert_right, pair_of, prompt
from tests.worker_pair import Call, Pair

SEEDS = range(20)
SOON = 2.0  # seconds within which somebody advances, above all once there is room again


def long_requests(pair: Pair, seed: int, longest: int) -> list[Call]:
    """Handed-off and local ones; each alone fits D's pool, two of the larger ones do not."""
    rng = random.Random(seed)
    calls: list[Call] = []
    for index in range(6):
        tokens = prompt(rng.randint(longest // 3, longest), seed=100 * seed + index)
        start = pair.local if rng.random() < 0.25 else pair.request
        calls.append(start(f"{seed} {index}", tokens, max_tokens=rng.randint(8, 24)))
    return calls


def test_e51_long_prompts_fill_both_pools_and_all_are_answered() -> None:
    """D's 24 blocks hold one and a half of the prompts with their output, P's 20 just one."""
    preemptions = 0
    for seed in SEEDS:
        limits = DecodeLimits(max_num_batched_tokens=16, park=0.02 * (seed % 2))
        with pair_of("inproc", prefill_blocks=20, decode_blocks=24, decode_limits=limits) as pair:
            calls = long_requests(pair, seed, longest=64)
            wait_for_all(pair, calls, f"seed {seed}")
            preemptions += pair.d.worker.scheduler.preemptions
    assert preemptions > len(SEEDS) // 4, "the pools were not under pressure"


def wait_for_all(pair: Pair, calls: list[Call], what: str) -> None:
    """Somebody advances, always: a token or an end at least every SOON seconds. So nobody waits for each other."""
    seen, since = -1, time.monotonic()
    while not all(call.ended for call in calls):
        pair.turn()
        advanced = sum(len(call.output()) + call.ended for call in calls)
        if advanced != seen:
            seen, since = advanced, time.monotonic()
        assert time.monotonic() - since < SOON, f"{what}: nobody advanced for {SOON} s; {counts(pair)}"
    for call in calls:
        assert_right(call)


def counts(pair: Pair) -> str:
    return f"P {pair.p.pool.counts()}, D {pair.d.pool.counts()}, preempted {pair.d.worker.scheduler.preemptions}"


def fill_decode_worker(pair: Pair, seed: int) -> list[Call]:
    """Local sequences that together own every block of D, and a queue of more behind them."""
    calls = [pair.local(f"{seed} local {i}", prompt(20, seed=1000 * seed + i), max_tokens=40) for i in range(6)]
    pair.until(lambda: bool(pair.d.worker.scheduler.waiting) and pair.d.worker.scheduler.preemptions > 0)
    return calls


def test_e52_a_full_decode_worker_costs_p_no_block_and_room_is_used_at_once() -> None:
    """Back-pressure: P asks, waits, and holds nothing. When the sequences on D are gone, all come through."""
    for seed in SEEDS:
        with pair_of("inproc", decode_blocks=24, decode_limits=DecodeLimits(park=0.02)) as pair:
            local = fill_decode_worker(pair, seed)
            handed = [pair.request(f"{seed} {i}", prompt(30, seed=77 * seed + i), max_tokens=6) for i in range(4)]
            for _ in range(12):
                pair.turn()
                assert pair.p.pool.counts().owned == 0, "P holds blocks for prompts that D has no room for"
            for call in local:
                call.cancel()
            wait_for_all(pair, handed, f"seed {seed}")


@pytest.mark.parametrize("connector", ["inproc", "shm"])
def test_e52_p_holds_every_block_while_d_has_a_queue(connector: str) -> None:
    """Every block of P is pinned by a transfer whose payload does not move; more prompts wait on both sides."""
    for seed in SEEDS:
        with pair_of(connector, prefill_blocks=20, decode_blocks=32) as pair:
            pair.hold = threading.Event()
            pinned = [pair.request(f"{seed} pin {i}", prompt(40, seed=9 * seed + i), max_tokens=6) for i in range(2)]
            pair.until(lambda pair=pair: pair.p.pool.counts().owned == 20)
            queued = [pair.request(f"{seed} {i}", prompt(36, seed=31 * seed + i), max_tokens=6) for i in range(3)]
            queued += [pair.local(f"{seed} local {i}", prompt(30, seed=51 * seed + i), max_tokens=12) for i in range(3)]
            pair.until(lambda pair=pair: waits_for_room(pair))
            pair.hold.set()
            wait_for_all(pair, pinned + queued, f"seed {seed}")


def waits_for_room(pair: Pair) -> bool:
    """Some Reserve is parked on D, or some prompt granted there waits for blocks of P."""
    phases = {reservation.phase for reservation in pair.d.worker.handoffs._reservations.values()}
    return Phase.PARKED in phases or pair.d.worker.handoffs.count > 2
