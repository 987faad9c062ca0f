"""What every link keeps, whatever its connector: lost once, heard of regularly, and a bug is no dead thread."""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tandem.common.errors import TransferFailed
from tandem.common.handoff import Ack, Frame, Grant, Heartbeat, Manifest, Rendezvous, Reserve
from tandem.kv_transfer import link as link_module
from tandem.kv_transfer.context import Context
from tandem.kv_transfer.frame import piece_digests
from tandem.kv_transfer.inproc import InprocReceiver, InprocSender, channel_pair
from tandem.kv_transfer.land import LandLink
from tandem.kv_transfer.payload import Payload
from tandem.kv_transfer.push import Piece, PushLink
from tandem.kv_transfer.rendezvous import MAX_VALUE_BYTES
from tests.kv_transfer.pairs import SMALL, until

WAIT = 10.0
CPU = torch.device("cpu")
ID = b"i" * 16


class Ends:
    """Both ends over `inproc`, and what each was told."""

    def __init__(self, **callbacks: Callable[[Any], None]) -> None:
        self.channel, right = channel_pair()
        context = Context(self.channel, SMALL, CPU)
        self.to_push: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.to_land: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.lost: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.land_lost: queue.SimpleQueue[str] = queue.SimpleQueue()
        on_message = callbacks.get("push", self.to_push.put)
        self.push = PushLink(context, InprocSender(context), on_message, self.lost.put, WAIT)
        context = Context(right, SMALL, CPU)
        on_message, on_frame = callbacks.get("land", self.to_land.put), callbacks.get("frame", self.to_land.put)
        receiver = InprocReceiver(context)
        self.land = LandLink(
            context, receiver, on_message, lambda frame, payload: on_frame(frame), self.land_lost.put, WAIT
        )

    def open(self) -> Ends:
        self.push.open()
        self.land.open()
        return self

    def close(self) -> None:
        for link in (self.push, self.land):
            link.close()
            assert link.join(WAIT)


@pytest.fixture
def ends():
    ends = Ends().open()
    yield ends
    ends.close()


def fail(message: object) -> None:
    raise ZeroDivisionError("a bug")


@pytest.mark.parametrize("side", ["push", "land"])
def test_a_bug_in_a_callback_loses_the_link_and_is_logged(side, caplog):
    ends = Ends(**{side: fail}).open()
    (ends.land if side == "push" else ends.push).post(Ack(ID, 1))
    mine, theirs = (ends.lost, ends.land_lost) if side == "push" else (ends.land_lost, ends.lost)
    assert "ZeroDivisionError" in mine.get(timeout=WAIT) and "a bug" in caplog.text
    assert theirs.get(timeout=WAIT)
    ends.close()
    assert ends.lost.empty() and ends.land_lost.empty()


def test_a_peer_that_misuses_the_rendezvous_loses_the_link(ends):
    ends.push.post(Rendezvous("k", bytes(MAX_VALUE_BYTES + 1)))
    assert "rendezvous value" in ends.land_lost.get(timeout=WAIT)
    assert ends.lost.get(timeout=WAIT)


def test_messages_both_ways_keep_their_order(ends):
    acks = [Ack(ID, number) for number in range(50)]
    for ack in acks:
        ends.push.post(ack)
        ends.land.post(ack)
    assert [ends.to_push.get(timeout=WAIT) for _ in acks] == acks
    assert [ends.to_land.get(timeout=WAIT) for _ in acks] == acks


def test_a_link_closed_before_it_was_opened_ends():
    ends = Ends()
    ends.push.close()
    assert ends.push.join(WAIT) and not ends.push.beat()


def test_a_closed_channel_refuses_to_send():
    left, right = channel_pair()
    right.close()
    with pytest.raises(TransferFailed):
        left.send(Ack(ID, 1))


def test_inproc_refuses_a_peer_of_another_process():
    context = Context(channel_pair()[0], SMALL, CPU)
    context.mailbox.deliver(Rendezvous("inproc/pipe", bytes(16)))
    with pytest.raises(TransferFailed, match="one process"):
        InprocReceiver(context).open(WAIT)


@pytest.mark.parametrize(
    "changes",
    [{"num_blocks": 0}, {"num_blocks": 1 << 40}, {"first_layer": 1}, {"num_bytes": 1 << 50}, {"digests": ()}],
    ids=str,
)
def test_a_header_that_does_not_fit_the_layout_loses_the_link_before_anything_is_received(ends, changes):
    ends.land.grant(Grant(ID, 1, 0, 1, 4, ()), [5])
    good = Frame(ID, 1, 0, 1, 0, SMALL.layers, SMALL.block_bytes, (b"d" * 16,))
    ends.channel.send(dataclasses.replace(good, **changes))
    assert "frame of blocks [0, " in ends.land_lost.get(timeout=WAIT)
    assert ends.lost.get(timeout=WAIT)  # P hears of it by the closed channel


# -------------------------------------------------------------------------------------------------------- heartbeats


def test_p_names_the_transfers_it_still_works_on(ends):
    def beat() -> Any:
        assert ends.push.beat()
        return ends.to_land.get(timeout=WAIT)

    assert beat() == Heartbeat(())
    for name in (b"a" * 16, b"b" * 16):
        ends.push.reserve(Reserve(name, b"ticket", 1))
        assert isinstance(ends.to_land.get(timeout=WAIT), Reserve)
    assert beat() == Heartbeat((b"a" * 16, b"b" * 16))
    ends.push.forget(b"a" * 16, lambda: None)
    assert beat() == Heartbeat((b"b" * 16,))
    assert ends.land.beat()
    assert ends.to_push.get(timeout=WAIT) == Heartbeat(())


def test_a_silent_peer_is_given_up_and_one_that_beats_is_not(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(link_module.time, "monotonic", lambda: now[0])
    ends = Ends().open()
    for _ in range(5):
        now[0] += 0.9 * link_module.SILENCE
        assert ends.push.beat()
        ends.to_land.get(timeout=WAIT)
        assert ends.land.beat()
        ends.to_push.get(timeout=WAIT)
    now[0] += link_module.SILENCE + 0.1
    assert not ends.land.beat()
    assert "no sign of life from the peer for 5.1 s" in ends.land_lost.get(timeout=WAIT)
    assert ends.lost.get(timeout=WAIT)
    assert not ends.push.beat() and ends.lost.empty()
    monkeypatch.undo()
    ends.close()


# ------------------------------------------------------------------------------------------------------ what is granted


def test_frames_are_delivered_only_while_their_grant_lasts(ends):
    memory = torch.zeros(2, SMALL.block_bytes, dtype=torch.uint8)

    def send(first_block: int) -> None:
        ends.push.push(ID, 3, Piece(first_block, Payload(memory, [0], 0, SMALL.block_bytes), 0, SMALL.layers))

    def taken() -> bool:
        return ends.push.backlog_bytes == 0

    send(0)  # before the grant
    until(taken)
    ends.land.grant(Grant(ID, 3, 1, 2, 4, ()), [5, 6])
    assert isinstance(ends.to_push.get(timeout=WAIT), Grant)
    send(1)
    assert ends.to_land.get(timeout=WAIT).first_block == 1
    send(3)  # behind what was granted
    until(taken)
    ends.land.revoke(ID)
    send(2)
    until(taken)
    ends.push.finish(Manifest(ID, 3, 0, (), (), ()))
    manifest = ends.to_land.get(timeout=WAIT)
    assert isinstance(manifest, Manifest) and len(manifest.digests) == 4
    assert ends.to_land.empty() and ends.lost.empty() and ends.land_lost.empty()


def test_what_waits_for_the_device_is_waited_for_before_it_is_digested(ends):
    """The layer group is handed over while the device still writes it."""
    memory = torch.zeros(1, SMALL.block_bytes, dtype=torch.uint8)
    ends.land.grant(Grant(ID, 1, 0, 1, 4, ()), [0])
    ends.to_push.get(timeout=WAIT)

    def write() -> None:
        memory.fill_(9)

    ends.push.push(ID, 1, Piece(0, Payload.whole(memory), 0, SMALL.layers, ready=write))
    frame = ends.to_land.get(timeout=WAIT)  # and no Abort: it was sent as it was digested
    assert frame.digests == piece_digests(Payload.whole(torch.full_like(memory, 9)), ID)
