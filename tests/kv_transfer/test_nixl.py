"""What is special to NIXL: what one agent costs and exposes, that a write which does not end is ended, and its spans.

Whole transfers are in the shared suite.
"""

from __future__ import annotations

import importlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.common.errors import ConfigError, TransferFailed
from tandem.common.handoff import Frame
from tandem.common.kv_layout import KVLayout
from tandem.kv_transfer import nixl
from tandem.kv_transfer.context import Context
from tandem.kv_transfer.inproc import channel_pair
from tandem.kv_transfer.payload import Payload
from tests.kv_transfer import peer
from tests.kv_transfer.pairs import SMALL, WAIT, need, until

pytestmark = pytest.mark.timeout(60)
LARGE = KVLayout("test", "float32", 16, 8, 8, 128)  # 1 MiB a block
CACHE = nixl.Cache(b"m", 10_000, 12, 96, 3, 77)


@pytest.fixture
def _library() -> None:
    need("nixl-threads")


def frame(num_blocks: int, row_bytes: int, first_layer: int = 0, num_layers: int = 2) -> Frame:
    return Frame(
        b"t" * 16, 1, 0, num_blocks, first_layer, num_layers, num_blocks * row_bytes, (b"d" * 16,) * num_blocks
    )


# ------------------------------------------------------------------------------------------------ without the library


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch):
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    monkeypatch.setattr(nixl, "_bindings", nixl._bindings.__wrapped__)
    with pytest.raises(ConfigError, match=r"'nixl_cu12._bindings'.*pip install 'tandem\[nixl\]'"):
        nixl.domain(Context(channel_pair()[0], SMALL, torch.device("cpu")))


def test_whichever_package_is_there_is_used(monkeypatch):
    asked: list[str] = []

    def only_cu13(name: str) -> Any:
        asked.append(name)
        if "cu13" not in name:
            raise ImportError(name)
        return "the bindings"

    monkeypatch.setattr(importlib, "import_module", only_cu13)
    assert nixl._bindings.__wrapped__() == "the bindings"
    assert asked == ["nixl._bindings", "nixl_cu12._bindings", "nixl_cu13._bindings"]


def test_a_description_is_read_strictly():
    assert nixl.Cache.unpack(CACHE.pack()) == CACHE
    for data in (b"", b"\xc1", CACHE.pack()[:-1], CACHE.pack() + b"\0", b"\x01", b"\x93\xc4\0\x01\x02"):
        with pytest.raises(TransferFailed, match="cannot be read"):
            nixl.Cache.unpack(data)
    for wrong in (nixl.Cache("m", 1, 1, 1, 1, 1), nixl.Cache(b"m", -1, 1, 1, 1, 1), nixl.Cache(b"m", 1.0, 1, 1, 1, 1)):  # type: ignore[arg-type]
        with pytest.raises(TransferFailed, match="cannot be read"):
            nixl.Cache.unpack(wrong.pack())


@pytest.mark.parametrize(
    ("rows", "size", "targets"),
    [([0], 96, []), ([0], 96, [1, 2]), ([0], 96, [12]), ([0, 1], 96, [1, -1]), ([0], 98, [0])],
)
def test_a_write_outside_of_the_cache_is_refused(rows, size, targets):
    memory = torch.zeros(12, 98, dtype=torch.uint8)
    with pytest.raises(TransferFailed, match="do not fit"):
        CACHE.offset(frame(len(rows), size), Payload(memory, rows, 0, size), targets)
    with pytest.raises(TransferFailed, match="do not fit"):  # a layer that D's blocks do not have
        CACHE.offset(frame(1, 48, first_layer=2, num_layers=1), Payload(memory, [0], 0, 48), [0])
    assert CACHE.offset(frame(1, 48, first_layer=1, num_layers=1), Payload(memory, [0], 0, 48), [11]) == 48


@pytest.mark.parametrize(
    ("rows", "targets", "runs"),
    [
        ([3], [7], 1),
        ([3, 4, 5], [7, 8, 9], 1),
        ([3, 4, 5], [7, 9, 10], 2),
        ([3, 4, 6], [7, 8, 9], 2),
        ([5, 4], [1, 0], 2),
    ],
)
@pytest.mark.parametrize(("start", "stop"), [(0, 96), (48, 96)])
def test_spans_name_every_byte_once_and_join_neighbours(rows, targets, runs, start, stop):
    memory = torch.zeros(12, 96, dtype=torch.uint8)
    payload = Payload(memory, rows, start, stop)
    local, remote = nixl.spans(payload, targets, CACHE, start)
    assert len(local) == len(remote) == (runs if stop - start == 96 else len(rows))
    moved = [
        (int(source) + i - memory.data_ptr(), int(target) + i - CACHE.base)
        for (source, size, _), (target, same, _) in zip(local, remote, strict=True)
        for i in range(int(size))
        if size == same
    ]
    assert moved == [(r * 96 + i, t * 96 + i) for r, t in zip(rows, targets, strict=True) for i in range(start, stop)]
    assert set(local[:, 2]) == {0} and set(remote[:, 2]) == {3}


# --------------------------------------------------------------------------------------------------- with the library


def opened(left: Context, right: Context) -> tuple[nixl.NixlSender, nixl.NixlReceiver]:
    for context in (left, right):
        context.channel.listen(context.mailbox.deliver, lambda reason: None)  # type: ignore[arg-type]
    sender, receiver = nixl.NixlSender(left), nixl.NixlReceiver(right)
    thread = threading.Thread(target=sender.open, args=(WAIT,))
    thread.start()
    receiver.open(WAIT)
    thread.join(WAIT)
    return sender, receiver


@pytest.fixture
def ends(_library: None) -> Iterator[tuple[nixl.NixlSender, nixl.NixlReceiver]]:
    contexts = [peer.context_of(channel, peer.make_store(SMALL, 4, torch.device("cpu"))) for channel in channel_pair()]
    sender, receiver = opened(*contexts)
    yield sender, receiver
    sender.close()
    receiver.close()
    contexts[0].channel.close()


def test_on_a_loopback_host_nothing_listens_to_strangers(ends):
    """Sockets of this process that listen; 0100007F is 127.0.0.1 as /proc writes it."""
    inodes = {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    listening = [row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]
    assert listening and set(listening) == {"0100007F"}


def test_an_idle_pair_takes_no_time_of_a_core(ends):
    """The agents of NIXL's own Python wrapper keep one core busy each."""
    before, started = time.process_time(), time.monotonic()
    time.sleep(0.3)
    assert time.process_time() - before < 0.3 * (time.monotonic() - started)


def test_a_closed_end_refuses_and_its_agent_is_gone(ends):
    sender, receiver = ends
    sender.close()
    receiver.close()
    assert sender._agent is None and receiver._agent is None
    with pytest.raises(TransferFailed, match="closed"):
        sender.send(frame(1, 1024), Payload.whole(torch.zeros(1, 1024, dtype=torch.uint8)), [0], WAIT)
    with pytest.raises(TransferFailed, match="closed"):
        receiver.receive(frame(1, 1024), [0], WAIT)


class Stopped:
    """P of a pair over TCP whose D, a process, is stopped: D's kernel takes a few MiB for it, and the rest waits."""

    def __init__(self, victim: Any) -> None:
        channel = victim.connect("report", "nixl", LARGE, 64)
        self.store = peer.make_store(LARGE, 64, torch.device("cpu"), 7)
        context = peer.context_of(channel, self.store)
        channel.listen(context.mailbox.deliver, lambda reason: None)
        self.sender = nixl.NixlSender(context)
        self.sender.open(WAIT)
        os.kill(victim.pid, signal.SIGSTOP)
        victim.wait_stopped()
        self.error = ""

    def send(self, timeout: float) -> None:
        payload = Payload(self.store.memory, range(64), 0, LARGE.block_bytes)
        try:
            self.sender.send(frame(64, LARGE.block_bytes, num_layers=8), payload, range(64), timeout)
        except TransferFailed as exc:
            self.error = exc.message


@pytest.fixture
def stopped(_library: None, victim: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stopped]:
    monkeypatch.setenv("UCX_TLS", "tcp")  # read with every agent; the victim's, forked before, has all transports
    stopped = Stopped(victim)
    yield stopped
    stopped.sender.close()


def test_a_write_that_misses_its_deadline_ends_with_its_agent(stopped):
    sockets = len(os.listdir("/proc/self/fd"))
    started = time.monotonic()
    stopped.send(0.3)
    assert 0.3 <= time.monotonic() - started < 3
    assert "did not end before its deadline" in stopped.error
    assert stopped.sender._agent is None, "nothing reads P's memory any more"
    assert len(os.listdir("/proc/self/fd")) < sockets
    stopped.send(WAIT)
    assert "closed" in stopped.error


def test_close_ends_a_write_at_once(stopped):
    thread = threading.Thread(target=stopped.send, args=(WAIT,))
    thread.start()
    until(lambda: stopped.sender._busy)
    time.sleep(0.05)  # it waits by now; earlier would pass as well
    started = time.monotonic()
    stopped.sender.close()
    thread.join(WAIT)
    assert time.monotonic() - started < 2 and "closed" in stopped.error
    assert stopped.sender._agent is None


def test_a_trial_write_that_does_not_arrive_is_no_open_path(_library: None):
    channel, _ = channel_pair()
    context = peer.context_of(channel, peer.make_store(SMALL, 4, torch.device("cpu")))
    context.mailbox._store("nixl/proof", b"x" * 16)
    receiver = nixl.NixlReceiver(context)
    with pytest.raises(TransferFailed, match="trial write"):
        receiver.open(WAIT)
    assert receiver._agent is None


def test_rubbish_instead_of_metadata_is_a_failed_transfer(_library: None):
    channel, _ = channel_pair()
    context = peer.context_of(channel, peer.make_store(SMALL, 4, torch.device("cpu")))
    context.mailbox._store("nixl/agent", CACHE.pack())
    with pytest.raises(TransferFailed, match="setting up the data path by NIXL failed"):
        nixl.NixlSender(context).open(WAIT)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True), ("10.0.0.1", False)],
)
def test_loopback_hosts(host, loopback):
    assert nixl._is_loopback(host) is loopback
