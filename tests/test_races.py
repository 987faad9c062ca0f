"""Two threads or two messages that meet at the wrong moment, each forced: every one of these was wrong once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tandem.common import rpc
from tandem.common.errors import TransferFailed
from tandem.common.handoff import Grant, Manifest, Message, Reserve
from tandem.common.kv_layout import MAX_BLOCK_SIZE
from tandem.common.proto import tandem_pb2 as pb
from tandem.common.proto import tandem_pb2_grpc as services
from tandem.common.request import LegUpdate
from tandem.common.worker_loop import Inbox
from tandem.decode_worker.limits import DecodeLimits
from tandem.decode_worker.service import ask_prefill_worker
from tandem.decode_worker.undertaker import Peer, Undertaker
from tandem.kv_transfer.heart import Heart
from tandem.kv_transfer.payload import Payload
from tandem.prefill_worker.transfer import Transfer
from tandem.prefill_worker.worker import PrefillLimits
from tests.common.test_service import make_shell
from tests.faults.scenarios import a_held_transfer, assert_right, pair_of, prompt
from tests.worker_pair import KEY, Pair


def warmed_up(pair: Pair) -> None:
    first = pair.request("warm", prompt(12), max_tokens=2)
    pair.until(lambda: first.ended)


@pytest.mark.parametrize("connector", ["inproc", "shm"])
def test_pins_are_released_on_the_workers_own_thread(connector: str) -> None:
    """D may acknowledge before P's link thread comes back from sending the manifest."""
    with pair_of(connector) as pair:
        warmed_up(pair)
        channel, released = pair.p.links[0]._channel, list[str]()
        send, release = channel.send, pair.p.worker._release

        def slow(message: Message) -> None:
            send(message)
            if isinstance(message, Manifest):
                time.sleep(0.05)  # the thread loses its turn here

        def noted(transfer: Transfer) -> None:
            released.append(threading.current_thread().name)
            release(transfer)

        channel.send, pair.p.worker._release = slow, noted
        call = pair.request("r", prompt(20, seed=1), max_tokens=2)
        pair.until(lambda: call.ended and bool(released))
        assert released == [threading.current_thread().name]
        assert_right(call)


def test_a_slow_link_is_not_taken_for_a_d_that_does_not_answer() -> None:
    """Everything before the manifest takes longer than D may take to answer it."""
    limits = PrefillLimits(ack_timeout=0.3, max_num_batched_tokens=8, pipelined_from=0, layer_groups=2)

    def slow(frame: object, payload: object) -> Payload | None:
        time.sleep(0.03)
        return None

    with pair_of("shm", prefill_limits=limits) as pair:
        pair.fault = slow
        call = pair.request("slow", prompt(120), max_tokens=2)

        def turn() -> None:
            pair.turn()
            for link in (*pair.p.links, *pair.d.links):
                link.beat()

        pair.until(lambda: call.ended, turn=turn)
        assert_right(call)


def test_a_reserve_behind_the_end_of_its_link_is_granted_nothing() -> None:
    """D's link thread had taken it off its queue when another thread ended the link."""
    with pair_of("shm", decode_limits=DecodeLimits(lease=0.1, quarantine=0.1)) as pair:
        warmed_up(pair)
        link, taken, go = pair.d.links[0], threading.Event(), threading.Event()
        deliver = link._on_message

        def late(message: Message) -> None:
            if isinstance(message, Reserve):
                taken.set()
                assert go.wait(5.0)
            deliver(message)

        link._on_message = late
        call = pair.request("late", prompt(40, seed=1), max_tokens=2)
        pair.p.worker.step()
        assert taken.wait(5.0)
        link.lose("P was killed")
        go.set()
        assert link.join(5.0)
        for _ in range(5):
            pair.turn_decode()
        assert pair.d.pool.counts().reserved == pair.d.pool.counts().quarantined == 0
        call.cancel()


def test_a_new_link_ends_the_one_before_whether_d_noticed_or_not() -> None:
    """P opens it when the thread of the former one has ended, so nothing of that is in flight."""
    with pair_of("shm", decode_limits=DecodeLimits(quarantine=0.1)) as pair:
        call = a_held_transfer(pair)
        former = pair.d.links[0]
        told, kept = former._on_lost, list[str]()
        former._on_lost = kept.append  # D learns nothing of its end: a lost RST, a partition
        pair.p.links[0].lose("its data path failed")
        assert pair.hold is not None
        pair.hold.set()
        assert pair.p.links[0].join(5.0)
        pair.hold = None
        pair.until(lambda: not pair.p.worker._links)
        again = pair.request("new", prompt(12), max_tokens=2)
        pair.until(lambda: again.ended)
        assert_right(again)
        assert call.ended and pair.d.pool.counts().reserved == pair.d.pool.counts().quarantined == 0
        told("silence")  # and now D notices


def test_a_late_answer_about_one_link_frees_nothing_of_the_next() -> None:
    with pair_of("shm", decode_blocks=16) as pair:
        warmed_up(pair)
        former = pair.d.links[0]
        pair.p.links[0].lose("cut")
        assert pair.p.links[0].join(5.0)
        pair.until(lambda: not pair.p.worker._links)
        assert pair.p.worker.quiet("d-1")  # the answer is under way …
        pair.hold = threading.Event()
        call = pair.request("next", prompt(40, seed=1), max_tokens=4)
        pair.until(lambda: len(pair.senders) > 1 and pair.senders[1].held.is_set())  # … P writes over another link …
        pair.d.worker.cancel(call.decode_leg)
        pair.d.worker.handoffs.is_quiet(former)  # … and only then the answer arrives
        assert pair.d.pool.counts().quarantined == 10
        pair.hold.set()


def test_a_grant_of_absurd_blocks_ends_its_transfer_only() -> None:
    with pair_of("inproc") as pair:
        warmed_up(pair)
        call = pair.request("r", prompt(12), max_tokens=2)
        pair.p.worker.step()
        transfer = next(iter(pair.p.worker._transfers.values()))
        pair.p.worker._on_message(Grant(transfer.id, 7, 0, 1, MAX_BLOCK_SIZE + 1, ()))
        assert isinstance(call.prefill.error, TransferFailed)
        call.cancel()


def test_a_flood_of_commands_lets_the_worker_work() -> None:
    inbox, stop = Inbox(), threading.Event()

    def flood() -> None:
        while not stop.is_set():
            inbox.put(lambda: time.sleep(0.0005))
            time.sleep(0.0002)

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        started = time.monotonic()
        for _ in range(3):
            inbox.run_pending(1.0)
        assert time.monotonic() - started < 2.0
    finally:
        stop.set()
        thread.join()


def test_one_links_bug_stops_no_other_links_heartbeats() -> None:
    class Broken:
        lost = ""

        def beat(self) -> bool:
            raise OSError("says the test")

        def lose(self, reason: str) -> None:
            self.lost = reason

    class Sound(Broken):
        beats = 0

        def beat(self) -> bool:
            self.beats += 1
            return True

    heart, broken, sound = Heart(), Broken(), Sound()
    heart.add(broken)
    heart.add(sound)
    heart._beat()
    heart._beat()
    assert sound.beats == 2 and "says the test" in broken.lost


async def test_a_cancellation_that_meets_an_answer_is_not_lost(tmp_path: Path) -> None:
    """asyncio.wait_for lost it: a leg whose client left went on, and a stop waited for who asked the stopped worker."""
    shell, replies = make_shell(Pair(), f"unix://{tmp_path}/none.sock"), list[Callable[[], None]]()
    shell._worker.inbox.put = replies.append  # pyright: ignore[reportAttributeAccessIssue]
    updates: asyncio.Queue[LegUpdate] = asyncio.Queue()
    asking = asyncio.create_task(shell.ask(lambda: None))
    waiting = asyncio.create_task(shell._next(updates, time.monotonic() + 10.0))
    while not replies:
        await asyncio.sleep(0)
    replies[0]()
    asyncio.get_running_loop().call_soon(asking.cancel)
    updates.put_nowait(LegUpdate())
    waiting.cancel()
    await asyncio.wait({asking, waiting})
    assert asking.cancelled() and waiting.cancelled()
    shell._loop.close()


# --------------------------------------------------------------------------------------- whose word ends a quarantine


async def follow(peer: Peer) -> bool:
    """Whether the undertaker releases the blocks of `peer` within two seconds."""
    held = True

    async def quarantined() -> bool:
        return held

    def release() -> None:
        nonlocal held
        held = False

    undertaker = Undertaker(quarantined, release, lambda address: ask_prefill_worker(address, KEY, "d-1"))
    task = asyncio.create_task(undertaker.follow(peer))
    await asyncio.wait({task}, timeout=2.0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return not held


class Quiet(services.PrefillWorkerServicer):
    def __init__(self, incarnation: str, quiet: bool) -> None:
        self._answer = pb.QuietReply(incarnation=incarnation, quiet=quiet)

    async def Quiet(self, request: Any, context: Any) -> Any:
        return self._answer


@pytest.fixture
async def server() -> AsyncIterator[Any]:
    server = rpc.create_server()
    yield server
    await server.stop(0)


@pytest.mark.parametrize(
    ("incarnation", "quiet", "over"), [("p-1", False, False), ("p-1", True, True), ("p-2", False, True)]
)
async def test_p_itself_ends_a_quarantine_or_its_successor(
    server: Any, incarnation: str, quiet: bool, over: bool
) -> None:
    services.add_PrefillWorkerServicer_to_server(Quiet(incarnation, quiet), server)
    port = rpc.bind(server, "127.0.0.1", 0, KEY)
    await server.start()
    assert await follow(Peer("p-1", f"127.0.0.1:{port}")) is over


async def test_a_worker_of_another_role_at_ps_address_means_that_p_is_gone(server: Any) -> None:
    services.add_HandoffServicer_to_server(services.HandoffServicer(), server)
    port = rpc.bind(server, "127.0.0.1", 0, KEY)
    await server.start()
    assert await follow(Peer("p-1", f"127.0.0.1:{port}"))


async def test_nobody_at_ps_address_means_that_p_is_gone(server: Any) -> None:
    port = rpc.bind(server, "127.0.0.1", 0, KEY)
    await server.start()
    await server.stop(0)
    assert await follow(Peer("p-1", f"127.0.0.1:{port}"))
