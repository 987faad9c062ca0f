"""Pairs of links over every connector, between threads and between two processes."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch

from tandem.common.handoff import Message
from tandem.common.kv_layout import KVLayout
from tandem.kv_transfer.base import Channel
from tandem.kv_transfer.inproc import channel_pair
from tandem.kv_transfer.push import PushLink
from tandem.kv_transfer.registry import CONNECTORS
from tests.kv_transfer import peer
from tests.kv_transfer.pairs import BLOCKS, SMALL, WAIT, Child, Nursery, Pair, Wrap, need


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.end()


@pytest.fixture(scope="session")
def child(nursery: Nursery) -> Iterator[Child]:
    """Serves the D end of any number of pairs."""
    child = nursery.child()
    yield child
    child.end()


@pytest.fixture
def victim(nursery: Nursery) -> Iterator[Child]:
    """A process of its own, to be stopped and killed."""
    child = nursery.child()
    yield child
    child.end()


@pytest.fixture
def pairs() -> list[Pair]:
    """Those that this test made."""
    return []


@pytest.fixture
def make_pair(request: pytest.FixtureRequest, pairs: list[Pair]) -> Iterator[Callable[..., Pair]]:
    """make_pair("tcp-threads" or "tcp-processes", layout=…, num_blocks=…, timeout=…, wrap=…) -> Pair, not opened."""

    def make(
        kind: str,
        layout: KVLayout = SMALL,
        num_blocks: int = BLOCKS,
        timeout: float = WAIT,
        wrap: Wrap = Wrap(),  # noqa: B008  # immutable
    ) -> Pair:
        connector, where = need(kind), kind.split("-")[1]
        device = torch.device("cuda" if connector == "cuda_ipc" else "cpu")
        theirs: Channel | None = None
        if where == "processes":
            ours: Channel = request.getfixturevalue("child").connect("report", connector, layout, num_blocks)
        else:
            ours, theirs = channel_pair()
        store = peer.make_store(layout, num_blocks, device)
        context = peer.context_of(ours, store)
        sender = wrap.sender(CONNECTORS[connector]().sender(context))
        inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        lost: queue.SimpleQueue[str] = queue.SimpleQueue()
        pair = Pair(store, PushLink(context, sender, inbox.put, lost.put, timeout), sender, ours, None, inbox, lost)
        if theirs is not None:
            their_store = peer.make_store(layout, num_blocks, device, peer.UNTOUCHED)
            context = peer.context_of(theirs, their_store)
            receiver = wrap.receiver(CONNECTORS[connector]().receiver(context))
            pair.decoder = peer.Decoder(context, receiver, their_store, pair.land_lost.put, timeout)
        pairs.append(pair)
        return pair

    yield make
    for pair in pairs:
        pair.close()


@pytest.fixture
def helpers() -> ModuleType:
    return peer
