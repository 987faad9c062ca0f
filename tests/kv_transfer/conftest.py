"""Pairs of links over every connector: in one process, between threads over Gloo, and between two processes."""

from __future__ import annotations

import importlib.util
import os
import queue
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tandem.common.handoff import Message
from tandem.common.kv_layout import KVLayout
from tandem.kv_transfer.base import Channel, Receiver, Sender
from tandem.kv_transfer.context import Context
from tandem.kv_transfer.inproc import channel_pair
from tandem.kv_transfer.land import LandLink
from tandem.kv_transfer.push import PushLink
from tandem.kv_transfer.registry import create_receiver, create_sender

WAIT = 30.0  # seconds; only a failing test waits this long, or a first one on a busy machine


def _load_peer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kv_transfer_peer", Path(__file__).with_name("peer.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


peer = _load_peer()


class Child:
    """The process of peer.py."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        script = str(Path(__file__).with_name("peer.py"))
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, script, str(theirs.fileno())], pass_fds=[theirs.fileno()], env=env
        )
        theirs.close()

    def connect(self, mode: str, connector: str, layout: KVLayout) -> Channel:
        ours, theirs = socket.socketpair()
        shape = (layout.block_size, layout.layers, layout.kv_heads, layout.head_dim)
        request = " ".join(map(str, (mode, connector, layout.dtype, *shape)))
        socket.send_fds(self._control, [request.encode()], [theirs.fileno()])
        theirs.close()
        return peer.SocketChannel(ours)

    def wait_stopped(self) -> None:
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)

    def end(self) -> None:
        self._control.close()
        self.process.kill()
        self.process.wait(WAIT)


@pytest.fixture(scope="session")
def child() -> Iterator[Child]:
    """Serves the D end of any number of pairs."""
    child = Child()
    yield child
    child.end()


@pytest.fixture
def victim() -> Iterator[Child]:
    """A process of its own, to be killed."""
    child = Child()
    yield child
    child.end()


@dataclass
class Pair:
    """P's link, and D's where it is in this process."""

    layout: KVLayout
    push: PushLink
    land: LandLink | None
    channel: Channel  # P's end
    inbox: queue.SimpleQueue[Message] = field(default_factory=queue.SimpleQueue)  # what D told P
    seen: list[Message] = field(default_factory=list)  # what D got, in order
    lost: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)
    land_lost: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)

    def open(self) -> Pair:
        if self.land is not None:
            self.land.open()
        self.push.open()
        return self

    def get(self, kind: type[Message] | None = None) -> Message:
        try:
            message = self.inbox.get(timeout=WAIT)
        except queue.Empty:
            pytest.fail(f"no message from D; link lost: {not self.lost.empty() and self.lost.get()}")
        assert kind is None or isinstance(message, kind), message
        return message

    def close(self) -> None:
        for link in (self.push, self.land):
            if link is not None:
                link.close()
                assert link.join(WAIT)


class Wrap:
    """What a test may put between link and connector."""

    sender: Callable[[Sender], Sender] = staticmethod(lambda inner: inner)
    receiver: Callable[[Receiver], Receiver] = staticmethod(lambda inner: inner)


SMALL = KVLayout("test", "float32", 4, 2, 2, 8)


@pytest.fixture
def make_pair(request: pytest.FixtureRequest) -> Iterator[Callable[..., Pair]]:
    """make_pair(kind, layout=…, timeout=…, wrap=…) -> Pair, not opened; kinds: inproc, torch, processes."""
    pairs: list[Pair] = []

    def make(
        kind: str,
        layout: KVLayout = SMALL,
        their_layout: KVLayout | None = None,
        timeout: float = WAIT,
        wrap: type[Wrap] = Wrap,
    ) -> Pair:
        connector = "torch" if kind == "processes" else kind
        theirs: Channel | None = None
        if kind == "processes":
            ours: Channel = request.getfixturevalue("child").connect("report", connector, layout)
        else:
            ours, theirs = channel_pair()
        sender = wrap.sender(create_sender(connector, Context(ours, layout, torch.device("cpu"))))
        inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        lost: queue.SimpleQueue[str] = queue.SimpleQueue()
        land_lost: queue.SimpleQueue[str] = queue.SimpleQueue()
        seen: list[Message] = []
        land = None
        if theirs is not None:
            receiver = wrap.receiver(
                create_receiver(connector, Context(theirs, their_layout or layout, torch.device("cpu")))
            )
            land = peer.reporting_link(theirs, receiver, land_lost.put, timeout, seen)
        push = PushLink(ours, sender, inbox.put, lost.put, timeout)
        pairs.append(Pair(layout, push, land, ours, inbox, seen, lost, land_lost))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()


@pytest.fixture
def helpers() -> ModuleType:
    return peer
