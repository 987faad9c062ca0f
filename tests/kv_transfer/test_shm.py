"""What is special to the shm connector: whose memory is mapped, where P may write in it, and when it is unmapped."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tandem.common.errors import ConfigError, TransferFailed
from tandem.common.handoff import Frame, Rendezvous
from tandem.common.kv_layout import KVLayout
from tandem.kv_transfer import shm
from tandem.kv_transfer.context import Context
from tandem.kv_transfer.inproc import channel_pair
from tandem.kv_transfer.payload import Payload

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs memfd and /proc"),
]
WAIT = 30.0  # seconds; only a failing test waits this long
LAYOUT = KVLayout("test", "float32", 4, 3, 2, 8)  # 512 bytes a layer, 1536 a block
CPU = torch.device("cpu")
NAME = "tandem-test-shm"
UNTOUCHED = 0x55


class Store:
    """A KV cache in a file without a name."""

    def __init__(self, blocks: int, layout: KVLayout = LAYOUT) -> None:
        self.layout = layout
        self.fd = os.memfd_create(NAME)
        os.ftruncate(self.fd, blocks * layout.block_bytes)
        mapped = mmap.mmap(self.fd, blocks * layout.block_bytes)
        self.memory = torch.frombuffer(mapped, dtype=torch.uint8).view(blocks, layout.block_bytes)
        self.memory.fill_(UNTOUCHED)


class Pair:
    """P's and D's end in this process, open; each with a store of its own."""

    def __init__(self, source: Store, target: Store) -> None:
        self.source, self.target = source, target
        channels = channel_pair()
        self.contexts = [
            Context(channel, store.layout, CPU, memory=store.memory, fd=store.fd)
            for channel, store in zip(channels, (source, target), strict=True)
        ]
        self.sender, self.receiver = shm.ShmSender(self.contexts[0]), shm.ShmReceiver(self.contexts[1])

    def listen(self) -> Pair:
        for context in self.contexts:
            context.channel.listen(delivery(context), lambda reason: None)
        return self

    def open(self) -> Pair:
        self.listen().receiver.open(WAIT)
        self.sender.open(WAIT)
        return self

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()
        self.contexts[0].channel.close()
        for store in (self.source, self.target):
            os.close(store.fd)


def delivery(context: Context) -> Callable:
    def deliver(message: object) -> None:
        assert isinstance(message, Rendezvous)
        context.mailbox.deliver(message)

    return deliver


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair(Store(16), Store(16))
    yield pair
    pair.close()


def frame(payload: Payload, first_layer: int = 0, layer_bytes: int = LAYOUT.layer_bytes) -> Frame:
    layers = payload.row_bytes // layer_bytes
    return Frame(bytes(16), 1, 0, len(payload), first_layer, layers, payload.nbytes, (b"d" * 16,) * len(payload))


def noise(store: Store, seed: int = 0) -> Tensor:
    store.memory.copy_(torch.randint(0, 256, store.memory.shape, generator=torch.Generator().manual_seed(seed)))
    return store.memory


# -------------------------------------------------------------------------------------------------------- what arrives


@pytest.mark.parametrize("seed", range(20))
def test_rows_land_in_their_blocks_and_nowhere_else(pair, seed):
    """Random rows, targets and layers, with neighbours in one, the other or both, against one copy for each row."""
    pair.open()
    rng, memory = random.Random(seed), noise(pair.source, seed)
    rows, targets = neighbours(rng), neighbours(rng)
    count = min(len(rows), len(targets))
    rows, targets = rows[:count], targets[:count]
    first = rng.randrange(3)
    start, stop = first * LAYOUT.layer_bytes, rng.randint(first + 1, 3) * LAYOUT.layer_bytes
    expected = pair.target.memory.clone()
    for row, target in zip(rows, targets, strict=True):
        expected[target, start:stop] = memory[row, start:stop]
    payload = Payload.layers(memory, rows, start, stop - start)
    pair.sender.send(frame(payload, first), payload, targets, WAIT)
    assert torch.equal(pair.target.memory, expected), f"seed {seed}"
    landed = pair.receiver.receive(frame(payload, first), targets, WAIT)
    assert torch.equal(landed.tensor(), payload.tensor())


def neighbours(rng: random.Random) -> list[int]:
    """Different numbers below 16, some of them one behind the other."""
    numbers = list(range(16))
    for _ in range(rng.randrange(4)):
        cut = rng.randrange(16)
        numbers = numbers[cut:] + numbers[:cut][:: rng.choice((1, -1))]
    return numbers[: rng.randint(1, 16)]


def test_what_landed_is_read_where_it_lies(pair):
    pair.open()
    payload = Payload.layers(noise(pair.source), (3,), 0, LAYOUT.block_bytes)
    landed = pair.receiver.receive(frame(payload), (7,), WAIT)
    assert landed.memory.data_ptr() == pair.target.memory.data_ptr()
    pair.sender.send(frame(payload), payload, (7,), WAIT)
    assert torch.equal(landed.row(0), pair.source.memory[3])


def test_blocks_of_another_size_are_ds():
    """P converted to D's block size: the layer's place is counted in D's bytes, whatever P's own are."""
    theirs = replace(LAYOUT, block_size=2 * LAYOUT.block_size)
    pair = Pair(Store(16), Store(4, theirs)).open()
    rows = torch.randint(0, 256, (2, 2 * theirs.layer_bytes), dtype=torch.uint8)
    payload = Payload.whole(rows)
    pair.sender.send(frame(payload, 1, theirs.layer_bytes), payload, (3, 0), WAIT)
    expected = torch.full_like(pair.target.memory, UNTOUCHED)
    expected[[3, 0], theirs.layer_bytes :] = rows
    assert torch.equal(pair.target.memory, expected)
    pair.close()


@pytest.mark.parametrize("targets", [(16, 0), (0, -1), (0,), (0, 1, 2), ()], ids=str)
def test_a_target_outside_the_peers_cache_is_refused(pair, targets):
    pair.open()
    payload = Payload.layers(noise(pair.source), (1, 2), 0, LAYOUT.block_bytes)
    with pytest.raises(TransferFailed, match="targets"):
        pair.sender.send(frame(payload), payload, targets, WAIT)
    assert bool((pair.target.memory == UNTOUCHED).all())


def test_bytes_that_would_reach_into_the_next_block_are_refused(pair):
    pair.open()
    payload = Payload.layers(noise(pair.source), (1,), 0, LAYOUT.block_bytes)
    with pytest.raises(TransferFailed, match="do not fit"):
        pair.sender.send(frame(payload, first_layer=1), payload, (0,), WAIT)
    assert bool((pair.target.memory == UNTOUCHED).all())


# --------------------------------------------------------------------------------------------------- whose memory it is


def test_only_the_very_file_is_mapped(pair):
    """D's process ended and another one has its number, or its file's number is another file's by now."""
    pair.listen()
    other = os.memfd_create(NAME)
    os.ftruncate(other, pair.target.memory.nbytes)
    told = replace(shm._File.of(pair.contexts[1]), fd=other)
    pair.contexts[1].mailbox.publish("shm/file", told.pack())
    with pytest.raises(TransferFailed, match="is not the peer's KV cache"):
        pair.sender.open(WAIT)
    os.close(other)


@pytest.mark.parametrize("change", [{"pid": 1 << 30}, {"fd": 1 << 20}, {"blocks": 17}, {"blocks": 0}], ids=str)
def test_a_file_that_is_not_there_or_smaller_is_refused(pair, change):
    pair.listen()
    told = replace(shm._File.of(pair.contexts[1]), **change)
    pair.contexts[1].mailbox.publish("shm/file", told.pack())
    with pytest.raises(TransferFailed, match="KV cache"):
        pair.sender.open(WAIT)


@pytest.mark.parametrize("value", [b"", b"x" * 47, b"x" * 49])
def test_what_is_no_file_is_refused(pair, value):
    pair.listen().contexts[1].mailbox.publish("shm/file", value)
    with pytest.raises(TransferFailed, match="cannot be read"):
        pair.sender.open(WAIT)


def test_domain_is_the_host_and_the_user(pair, monkeypatch):
    domains = [shm.domain(context) for context in pair.contexts]
    assert domains[0] == domains[1]
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    assert shm.domain(pair.contexts[0]) != domains[0]


def test_domain_says_what_is_missing(pair, monkeypatch):
    for lacking in (replace_context(pair, fd=None), replace_context(pair, memory=None)):
        with pytest.raises(ConfigError, match="not a file in memory"):
            shm.domain(lacking)
    monkeypatch.setattr(os, "getpid", lambda: 4711)  # as in a container that sees its host's /proc
    with pytest.raises(ConfigError, match="another namespace"):
        shm.domain(pair.contexts[0])


def replace_context(pair: Pair, **changes) -> Context:
    values = {"memory": pair.target.memory, "fd": pair.target.fd, **changes}
    return Context(pair.contexts[1].channel, LAYOUT, CPU, **values)


# ---------------------------------------------------------------------------------------------------- close and death


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count(NAME)


def test_close_unmaps_and_nothing_is_left():
    before = mappings(), len(os.listdir("/proc/self/fd")), set(os.listdir("/dev/shm"))
    pair = Pair(Store(16), Store(16)).open()
    assert mappings() == before[0] + 3  # P's and D's own, and P's view of D's
    assert set(os.listdir("/dev/shm")) == before[2]
    pair.sender.close()
    pair.sender.close()
    assert mappings() == before[0] + 2
    payload = Payload.layers(pair.source.memory, (1,), 0, LAYOUT.block_bytes)
    with pytest.raises(TransferFailed, match="not open"):
        pair.sender.send(frame(payload), payload, (1,), WAIT)
    pair.close()
    del pair, payload
    wait_until(lambda: (mappings(), len(os.listdir("/proc/self/fd"))) == before[:2])


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Stopping(Sequence[int]):
    """Targets of which the second one is told only when `go` is set."""

    def __init__(self, targets: Sequence[int]) -> None:
        self._targets = targets
        self.reached, self.go = threading.Event(), threading.Event()
        self.armed = False

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index):  # pyright: ignore[reportIncompatibleMethodOverride]  # nobody slices it
        if self.armed and index == 0:
            self.reached.set()
            assert self.go.wait(WAIT)
        return self._targets[index]


def test_close_during_a_write_lets_it_touch_mapped_memory_only(pair, monkeypatch):
    """`close` comes from another thread while `send` is about to copy: the copy lands or is refused, and never crashes
    the process; the mapping goes when `send` is over."""
    pair.open()
    payload = Payload.layers(noise(pair.source), (1, 5), 0, LAYOUT.block_bytes)
    targets, errors, check = Stopping((3, 9)), list[str](), Payload.check_place

    def arming(*args) -> None:
        check(*args)
        targets.armed = True

    def send() -> None:
        try:
            pair.sender.send(frame(payload), payload, targets, WAIT)
        except TransferFailed as exc:
            errors.append(exc.message)

    monkeypatch.setattr(Payload, "check_place", arming)
    mapped, thread = mappings(), threading.Thread(target=send)
    thread.start()
    assert targets.reached.wait(WAIT)
    pair.sender.close()
    assert mappings() == mapped
    targets.go.set()
    thread.join(WAIT)
    assert not thread.is_alive()
    assert errors == ["shm: the data path was closed"] or torch.equal(pair.target.memory[3], pair.source.memory[1])
    assert mappings() == mapped - 1


def test_close_while_waiting_for_the_peer(pair):
    pair.listen().sender.close()
    pair.receiver.open(WAIT)
    with pytest.raises(TransferFailed, match="closed while"):
        pair.sender.open(WAIT)


PEER = """
import mmap, os, sys
fd = os.memfd_create("tandem-test-shm")
os.ftruncate(fd, 16 * 1536)
memory = mmap.mmap(fd, 16 * 1536)
status = os.fstat(fd)
print(os.getpid(), fd, status.st_dev, status.st_ino, flush=True)
for line in sys.stdin:
    block = int(line)
    print(memory[block * 1536 : (block + 1) * 1536].hex(), flush=True)
"""


def test_another_process_sees_what_was_written_and_its_death_harms_nobody(pair):
    pair.listen()
    with subprocess.Popen(
        [sys.executable, "-c", PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as peer:
        assert peer.stdin is not None and peer.stdout is not None
        pid, fd, device, inode = map(int, peer.stdout.readline().split())
        told = shm._File(pid, fd, device, inode, 16, LAYOUT.block_bytes)
        pair.contexts[1].mailbox.publish("shm/file", told.pack())
        pair.sender.open(WAIT)
        payload = Payload.layers(noise(pair.source), (4, 5), 0, LAYOUT.block_bytes)
        pair.sender.send(frame(payload), payload, (15, 2), WAIT)
        for row, block in ((4, 15), (5, 2)):
            print(block, file=peer.stdin, flush=True)
            assert bytes.fromhex(peer.stdout.readline()) == pair.source.memory[row].numpy().tobytes()
        peer.kill()
        peer.wait(WAIT)
    pair.sender.send(frame(payload), payload, (15, 2), WAIT)
    pair.sender.close()
    assert not Path(f"/proc/{pid}").exists()
