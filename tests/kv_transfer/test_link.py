"""The rule that a link is lost once, and that a bug in a callback is a lost link, not a dead thread."""

from __future__ import annotations

import queue

import pytest
import torch

from tandem.common.errors import TransferFailed
from tandem.common.handoff import Ack, Rendezvous
from tandem.common.kv_layout import KVLayout
from tandem.kv_transfer.context import Context
from tandem.kv_transfer.inproc import InprocReceiver, InprocSender, channel_pair
from tandem.kv_transfer.land import LandLink
from tandem.kv_transfer.push import PushLink
from tandem.kv_transfer.rendezvous import MAX_VALUE_BYTES

WAIT = 10.0
LAYOUT = KVLayout("test", "float32", 4, 2, 2, 8)
CPU = torch.device("cpu")


def make(on_push_message=lambda message: None, on_land_message=lambda message: None):
    left, right = channel_pair()
    lost: queue.SimpleQueue[str] = queue.SimpleQueue()
    land_lost: queue.SimpleQueue[str] = queue.SimpleQueue()
    push = PushLink(left, InprocSender(Context(left, LAYOUT, CPU)), on_push_message, lost.put, WAIT)
    receiver = InprocReceiver(Context(right, LAYOUT, CPU))
    land = LandLink(right, receiver, on_land_message, lambda frame, payload: None, land_lost.put, WAIT)
    push.open()
    land.open()
    return push, land, lost, land_lost


def fail(message) -> None:
    raise ZeroDivisionError("a bug")


@pytest.mark.parametrize("side", ["push", "land"])
def test_a_bug_in_a_callback_loses_the_link_and_is_logged(side, caplog):
    push, land, lost, land_lost = make(**{f"on_{side}_message": fail})
    (land if side == "push" else push).post(Ack(bytes(16), 1))
    reason = (lost if side == "push" else land_lost).get(timeout=WAIT)
    assert "ZeroDivisionError" in reason and "a bug" in caplog.text
    assert (land_lost if side == "push" else lost).get(timeout=WAIT)
    for link in (push, land):
        assert link.join(WAIT)


def test_a_peer_that_misuses_the_rendezvous_loses_the_link():
    push, _, lost, land_lost = make()
    push.post(Rendezvous("k", bytes(MAX_VALUE_BYTES + 1)))
    assert "rendezvous value" in land_lost.get(timeout=WAIT)
    assert lost.get(timeout=WAIT)


def test_messages_both_ways_keep_their_order():
    to_push: queue.SimpleQueue = queue.SimpleQueue()
    to_land: queue.SimpleQueue = queue.SimpleQueue()
    push, land, _, _ = make(to_push.put, to_land.put)
    acks = [Ack(bytes(16), number) for number in range(50)]
    for ack in acks:
        push.post(ack)
        land.post(ack)
    assert [to_push.get(timeout=WAIT) for _ in acks] == acks
    assert [to_land.get(timeout=WAIT) for _ in acks] == acks
    push.close()
    land.close()


def test_a_link_closed_before_it_was_opened_ends():
    left, _ = channel_pair()
    push = PushLink(left, InprocSender(Context(left, LAYOUT, CPU)), fail, fail, WAIT)
    push.close()
    assert push.join(WAIT)


def test_a_closed_channel_refuses_to_send():
    left, right = channel_pair()
    right.close()
    with pytest.raises(TransferFailed):
        left.send(Ack(bytes(16), 1))


def test_inproc_refuses_a_peer_of_another_process():
    left, right = channel_pair()
    receiver = InprocReceiver(Context(right, LAYOUT, CPU))
    receiver.rendezvous(Rendezvous("terms/0", Context(left, LAYOUT, CPU).terms("inproc")))
    receiver.rendezvous(Rendezvous("pipe", bytes(16)))
    with pytest.raises(TransferFailed, match="one process"):
        receiver.open(WAIT)
