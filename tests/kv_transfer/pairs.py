"""Both ends of a link over any connector, between threads or between two processes; see peer.py for D's."""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.common.errors import ConfigError
from tandem.common.handoff import Grant, Manifest, Message, Refuse, Reserve
from tandem.common.kv_layout import KVLayout
from tandem.engine.kv_cache import PagedKVCache
from tandem.kv_transfer.base import Channel
from tandem.kv_transfer.inproc import channel_pair
from tandem.kv_transfer.payload import Payload
from tandem.kv_transfer.push import Piece, PushLink
from tandem.kv_transfer.registry import CONNECTORS
from tests.kv_transfer import peer

WAIT = 30.0  # seconds; only a failing test waits this long, or a first one on a busy machine
SMALL = KVLayout("test", "float32", 4, 2, 2, 8)
BLOCKS = 64  # of each cache, unless told


@functools.cache
def why_not(connector: str) -> str:
    """Why `connector` cannot be tested here, or ''."""
    device = torch.device("cuda" if connector == "cuda_ipc" else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        return "needs a CUDA device"
    try:
        store = peer.make_store(SMALL, 1, device)
        CONNECTORS[connector]().domain(peer.context_of(channel_pair()[0], store))
    except (ImportError, ConfigError) as exc:
        return str(exc)
    return ""


def need(kind: str) -> str:
    """The connector of "tcp-threads"; skips the test where it cannot be used."""
    connector = kind.split("-")[0]
    if reason := why_not(connector):
        pytest.skip(f"{connector}: {reason}")
    return connector


def kinds(*connectors: str, where: Sequence[str] = ("threads", "processes")) -> list[Any]:
    """Test parameters "tcp-threads", "tcp-processes" …: `inproc` has threads only, `cuda_ipc` processes only."""
    names = [f"{name}-{place}" for name in connectors for place in where if (name, place) != ("inproc", "processes")]
    gpu = [pytest.param("cuda_ipc-processes", marks=pytest.mark.gpu)] if "processes" in where else []
    return [*names, *gpu]


class Nursery:
    """The process of peer.py, which forks the others."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        script = str(Path(__file__).with_name("peer.py"))
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, script, str(theirs.fileno())], pass_fds=[theirs.fileno()], env=env
        )
        theirs.close()

    def child(self) -> Child:
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        socket.send_fds(self._control, [b"!"], [theirs.fileno()])
        theirs.close()
        return Child(control, int(self._control.recv(16)))

    def end(self) -> None:
        self._control.close()
        self._process.wait(WAIT)


class Child:
    """A process for the other ends of any number of pairs."""

    def __init__(self, control: socket.socket, pid: int) -> None:
        self._control = control
        self.pid = pid

    def connect(self, mode: str, connector: str, layout: KVLayout, num_blocks: int = BLOCKS) -> Channel:
        """Open an end there, in one of the modes of peer.py."""
        ours, theirs = socket.socketpair()
        device = "cuda" if connector == "cuda_ipc" else "cpu"
        shape = (layout.block_size, layout.layers, layout.kv_heads, layout.head_dim)
        request = " ".join(map(str, (mode, connector, device, num_blocks, layout.dtype, *shape)))
        socket.send_fds(self._control, [request.encode()], [theirs.fileno()])
        theirs.close()
        return peer.SocketChannel(ours)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait_stopped(self) -> None:
        until(lambda: Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")

    def end(self) -> None:
        self._control.close()
        with contextlib.suppress(ProcessLookupError):  # the test has killed it
            self.kill()


@dataclass
class Pair:
    """P's link with its cache, and D's where it is in this process. `number` names a transfer in what follows."""

    store: PagedKVCache
    push: PushLink
    sender: Any  # what is between link and connector, or the connector
    channel: Channel  # P's end
    decoder: Any = None  # peer.Decoder
    inbox: queue.SimpleQueue[Message] = field(default_factory=queue.SimpleQueue)  # what D told P
    lost: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)
    land_lost: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)
    grants: dict[int, Grant] = field(default_factory=dict)

    @property
    def layout(self) -> KVLayout:
        return self.store.layout

    @property
    def land(self) -> Any:
        return self.decoder.link

    def open(self) -> Pair:
        if self.decoder is not None:
            self.land.open()
        self.push.open()
        return self

    def get(self, kind: type[Message] | None = None) -> Any:
        try:
            message = self.inbox.get(timeout=WAIT)
        except queue.Empty:
            pytest.fail(f"no message from D; links lost: {self.reasons()}")
        assert kind is None or isinstance(message, kind), message
        return message

    def reasons(self) -> list[str]:
        return [lost.get() for lost in (self.lost, self.land_lost) if not lost.empty()]

    def reserve(self, number: int, blocks: Sequence[int], first: int = 0, generation: int = 1) -> None:
        """Ask for these blocks of D's, and wait for the grant."""
        self.push.reserve(peer.wish(transfer(number), generation, first, blocks))
        self.grants[number] = self.get(Grant)

    def send(self, number: int, payload: Payload, first: int = 0, layers: tuple[int, int] | None = None) -> None:
        """Push `payload` as the prompt blocks from `first` on; (first layer, number) unless it is all of them."""
        grant = self.grants[number]
        start = first - grant.first_block
        first_layer, num_layers = layers or (0, self.layout.layers)
        piece = Piece(first, payload, first_layer, num_layers, grant.targets[start : start + len(payload)])
        self.push.push(transfer(number), grant.generation, piece)

    def finish(self, number: int) -> None:
        self.push.finish(Manifest(transfer(number), self.grants[number].generation, 0, (), (), (7,)))

    def fill(self, rows: Sequence[int], seed: int = 0) -> Payload:
        """Random bytes in these blocks of P's cache."""
        shape = (len(rows), self.layout.block_bytes)
        generator = torch.Generator().manual_seed(seed)
        self.store.write(rows, torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))
        return Payload(self.store.memory, rows, 0, self.layout.block_bytes)

    def content(self) -> str:
        """The SHA-256 of D's whole cache."""
        self.push.post(Reserve(bytes(16), peer.CONTENT, 0))
        return self.get(Refuse).reason

    def close(self) -> None:
        links = [self.push] if self.decoder is None else [self.push, self.land]
        for link in links:
            link.close()
        for link in links:
            assert link.join(WAIT)
        self.store.close()
        if self.decoder is not None:
            self.decoder.store.close()


def transfer(number: int) -> bytes:
    return number.to_bytes(16, "big")


def until(condition: Callable[[], bool], every: float = 0.002) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(every)


class Forwarding:
    """A sender or receiver that passes everything on; tests override what they disturb."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@dataclass(frozen=True)
class Wrap:
    """What a test may put between link and connector."""

    sender: Callable[[Any], Any] = lambda inner: inner
    receiver: Callable[[Any], Any] = lambda inner: inner
