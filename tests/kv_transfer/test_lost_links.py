"""How a link over any connector ends: once, within its deadline, waking who is blocked, and leaving nothing behind."""

from __future__ import annotations

import dataclasses
import gc
import os
import queue
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.common.handoff import Ack, Frame, Manifest, Message, Reserve
from tandem.common.kv_layout import KVLayout
from tandem.kv_transfer import link as link_module
from tandem.kv_transfer.payload import Payload
from tandem.kv_transfer.push import Piece, PushLink
from tandem.kv_transfer.registry import CONNECTORS
from tests.kv_transfer import peer
from tests.kv_transfer.pairs import SMALL, WAIT, Child, Forwarding, Pair, Wrap, kinds, need, transfer, until

pytestmark = pytest.mark.timeout(90)
ALL = ("inproc", "tcp", "shm", "nixl", "torch")
BETWEEN = ("tcp", "shm", "nixl", "torch")  # processes
TWO_SIDED = ("inproc", "tcp", "torch")  # whose ends wait for each other
LARGE = KVLayout("test", "float32", 16, 8, 8, 128)  # 1 MiB a block
NOTICED = 2.0  # seconds within which a dead peer must be noticed; the operation's own deadline is 20


@pytest.fixture(params=kinds(*ALL, where=["threads"]))
def local(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=kinds(*TWO_SIDED, where=["threads"]))
def two_sided(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=kinds(*BETWEEN, where=["processes"]))
def connector(request: pytest.FixtureRequest) -> str:
    return need(request.param)


def announce(pair: Pair, **changes: Any) -> Frame:
    """A header of a granted block, without its payload."""
    frame = Frame(transfer(1), 1, 0, 1, 0, pair.layout.layers, pair.layout.block_bytes, (b"d" * 16,))
    return dataclasses.replace(frame, **changes)


# ------------------------------------------------------------------------------------------------- closed, or no peer


def test_a_closed_peer_is_a_lost_link_once(local, make_pair):
    pair: Pair = make_pair(local).open()
    pair.reserve(1, [1])
    pair.send(1, pair.fill([1]))
    pair.get(Manifest)
    pair.land.close()
    assert pair.lost.get(timeout=WAIT)
    pair.push.post(Ack(transfer(1), 1))  # on a lost link: goes nowhere, says nothing more
    pair.close()
    assert pair.lost.empty() and pair.land_lost.empty()  # who closes is not told that the link is lost


def test_open_fails_at_its_deadline_when_nobody_answers(local, make_pair):
    """D's end of `inproc` takes what P published, everybody else's P what D did; each alone waits for the other."""
    pair: Pair = make_pair(local, timeout=0.2)
    end, lost = (pair.land, pair.land_lost) if local.startswith("inproc") else (pair.push, pair.lost)
    started = time.monotonic()
    end.open()
    assert "did not publish" in lost.get(timeout=WAIT)
    assert end.join(WAIT) and 0.15 < time.monotonic() - started < 5


@pytest.mark.parametrize("end", ["push", "land"])
def test_close_ends_the_wait_for_a_peer_that_does_not_open(local, make_pair, end):
    pair: Pair = make_pair(local, timeout=20.0)
    link, lost = (pair.push, pair.lost) if end == "push" else (pair.land, pair.land_lost)
    link.open()
    assert_silent(lost, 0.05)  # it waits by now; earlier would pass as well
    started = time.monotonic()
    link.close()
    assert link.join(WAIT)
    assert time.monotonic() - started < NOTICED and lost.empty()


def test_an_idle_link_has_no_operation_that_could_time_out(local, make_pair):
    pair: Pair = make_pair(local, wrap=Wrap(sender=Quick, receiver=Quick)).open()
    for number in range(2):
        pair.reserve(number, [number])
        pair.send(number, pair.fill([number]))
        pair.get(Manifest)
        if number == 0:
            assert_silent(pair.lost, 0.5)  # longer than the deadline of any frame


class Quick(Forwarding):
    """A frame has 0.4 s; the set-up keeps its own time."""

    def send(self, frame: Frame, payload: Payload, targets: Sequence[int], timeout: float) -> None:
        self.inner.send(frame, payload, targets, 0.4)

    def receive(self, frame: Frame, targets: Sequence[int], timeout: float) -> Payload:
        return self.inner.receive(frame, targets, 0.4)


def assert_silent(inbox: queue.SimpleQueue, seconds: float) -> None:
    with pytest.raises(queue.Empty):
        inbox.get(timeout=seconds)


# ------------------------------------------------------------------------------------- blocked in the middle of a frame


def test_a_send_nobody_receives_fails_at_its_deadline(two_sided, make_pair):
    stuck = threading.Event()

    class Stuck(Forwarding):
        def receive(self, frame: Frame, targets: Sequence[int], timeout: float) -> Payload:
            stuck.wait(WAIT)
            return self.inner.receive(frame, targets, timeout)

    pair: Pair = make_pair(two_sided, LARGE, 32, wrap=Wrap(sender=Quick, receiver=Stuck)).open()
    pair.reserve(1, range(32))
    for first in range(0, 32, 8):  # 32 MiB: more than the buffers of sockets hold
        pair.send(1, Payload(pair.store.memory, range(first, first + 8), 0, LARGE.block_bytes), first)
    started = time.monotonic()
    reason = pair.lost.get(timeout=WAIT)
    assert time.monotonic() - started < 5
    stuck.set()
    assert "0.4 s" in reason or "Timed out waiting 400ms" in reason
    assert pair.land_lost.get(timeout=WAIT)


def test_a_header_without_payload_fails_at_its_deadline(two_sided, make_pair):
    pair: Pair = make_pair(two_sided, wrap=Wrap(receiver=Quick)).open()
    pair.reserve(1, [1])
    pair.channel.send(announce(pair))
    reason = pair.land_lost.get(timeout=WAIT)
    assert "0.4 s" in reason or "Timed out waiting 400ms" in reason
    assert pair.lost.get(timeout=WAIT)
    pair.close()
    assert pair.land_lost.empty() and pair.lost.empty()


@pytest.mark.parametrize("end", ["push", "land"])
def test_close_from_another_thread_wakes_a_blocked_end(two_sided, make_pair, end):
    """P in send as D never receives (push), or D in receive as P never sends (land)."""
    blocked, release = threading.Event(), threading.Event()

    class Held(Forwarding):
        def send(self, frame: Frame, payload: Payload, targets: Sequence[int], timeout: float) -> None:
            if end == "land":
                release.wait(WAIT)
            self.inner.send(frame, payload, targets, timeout)

        def receive(self, frame: Frame, targets: Sequence[int], timeout: float) -> Payload:
            blocked.set()
            if end == "push":
                release.wait(WAIT)
            return self.inner.receive(frame, targets, timeout)

    pair: Pair = make_pair(two_sided, LARGE, 32, timeout=20.0, wrap=Wrap(sender=Held, receiver=Held)).open()
    pair.reserve(1, range(32))
    for first in range(0, 32, 8):
        pair.send(1, Payload(pair.store.memory, range(first, first + 8), 0, LARGE.block_bytes), first)
    assert blocked.wait(WAIT)
    assert_silent(pair.lost, 0.1)  # the other thread is inside by now; earlier would pass as well
    link, mine, theirs = (
        (pair.push, pair.lost, pair.land_lost) if end == "push" else (pair.land, pair.land_lost, pair.lost)
    )
    started = time.monotonic()
    link.close()
    assert link.join(WAIT)
    assert time.monotonic() - started < 1.0
    assert mine.empty()
    release.set()
    assert theirs.get(timeout=WAIT)


# --------------------------------------------------------------------------------------------- a peer dead or silent


def push_to(victim: Child, connector: str, mode: str, num_blocks: int) -> tuple[PushLink, queue.SimpleQueue, list[str]]:
    """A link that pushes `num_blocks` of LARGE to a process of its own."""
    channel = victim.connect(mode, connector, LARGE, num_blocks)
    device = torch.device("cuda" if connector == "cuda_ipc" else "cpu")
    store = peer.make_store(LARGE, num_blocks, device)
    context = peer.context_of(channel, store)
    got: queue.SimpleQueue[Message] = queue.SimpleQueue()
    reasons: list[str] = []
    push = PushLink(context, CONNECTORS[connector]().sender(context), got.put, reasons.append, 20.0)
    push.open()
    push.reserve(peer.wish(transfer(1), 1, 0, range(num_blocks)))
    grant: Any = got.get(timeout=WAIT)
    for block in range(num_blocks):
        payload = Payload(store.memory, [block], 0, LARGE.block_bytes)
        push.push(transfer(1), 1, Piece(block, payload, 0, LARGE.layers, grant.targets[block : block + 1]))
    return push, got, reasons


def test_a_peer_killed_under_load_is_one_lost_link(connector, victim):
    push, got, reasons = push_to(victim, connector, "report", 64)
    assert isinstance(got.get(timeout=WAIT), Manifest)
    victim.kill()
    started = time.monotonic()
    until(lambda: bool(reasons))
    assert time.monotonic() - started < NOTICED, "the worker is told at once"
    assert push.join(WAIT)
    assert len(reasons) == 1 and push.backlog_bytes == 0


def test_a_peer_killed_with_a_frame_half_sent_is_one_lost_link(connector, victim):
    """D's side. P stops behind the header (two-sided), or behind the bytes (one-sided), and is killed there."""
    channel = victim.connect("stop_in_send", connector, SMALL)
    store = peer.make_store(SMALL, 4, torch.device("cuda" if connector == "cuda_ipc" else "cpu"))
    context, reasons = peer.context_of(channel, store), []
    decoder = peer.Decoder(context, CONNECTORS[connector]().receiver(context), store, reasons.append, 20.0)
    decoder.link.open()
    victim.wait_stopped()
    assert isinstance(decoder.seen[0], Reserve) and not reasons
    victim.kill()
    started = time.monotonic()
    until(lambda: bool(reasons))
    assert decoder.link.join(WAIT)
    assert time.monotonic() - started < NOTICED and len(reasons) == 1


def test_a_silent_peer_ends_the_link_after_a_while(connector, victim, monkeypatch):
    """D stops and its sockets stay open: only the heartbeats that do not come tell (rule H10)."""
    monkeypatch.setattr(link_module, "SILENCE", 0.6)
    push, _, reasons = push_to(victim, connector, "stop_in_receive", 48)
    victim.wait_stopped()
    assert not reasons
    started = time.monotonic()
    until(lambda: not push.beat(), every=0.05)
    assert push.join(WAIT)
    assert time.monotonic() - started < 0.6 + NOTICED
    assert len(reasons) == 1 and "no sign of life from the peer for" in reasons[0]
    os.kill(victim.pid, signal.SIGCONT)


# ------------------------------------------------------------------------------------------------------------- leaks


def held() -> dict[str, int]:
    """What this process holds."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "shared mappings": sum(line.split()[1].endswith("s") for line in maps),
        "names of shared memory": len(os.listdir("/dev/shm")),
    }


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_nothing_is_left_of_closed_links(local, make_pair, pairs):
    def use(number: int) -> None:
        pair: Pair = make_pair(local).open()
        pair.reserve(1, [1])
        pair.send(1, pair.fill([1]))
        pair.get(Manifest)
        if number % 2:  # one end closes, and the other one loses the link
            pair.push.close()
            assert pair.land_lost.get(timeout=WAIT)
        pair.close()
        pairs.clear()

    use(0)
    gc.collect()
    before = held()
    for number in range(4):
        use(number)

    def gone() -> bool:
        gc.collect()
        return all(now <= then for now, then in zip(held().values(), before.values(), strict=True))

    until(gone)  # the channels' threads end by themselves
