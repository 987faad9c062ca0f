"""How fast the KV connectors are: two processes, real links with digests, against a plain copy of the same bytes.

    python benchmarks/transfer.py --connectors shm,tcp --mib 64,256,1024 --rounds 5 --save transfer.json

A round is, one behind the other: a copy within one process by one thread, a hand-off over the links (from pushing
the blocks to D's Ack: digest, move, digest again, and write where the connector is two-sided), and the connector alone,
without digests and without writing. Medians over the rounds. Blocks lie in random order at both ends, as in a pool
that has been in use; memory has been touched before the first round that counts.

On a machine that others use too, compare processor time: that of the copy against that of the busier end, which is
what would set the pace if nobody else were there and each end had a core.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from server import processor_time

from tandem.common.errors import ConfigError, TransferFailed
from tandem.common.handoff import (
    Ack,
    Frame,
    Grant,
    Manifest,
    Message,
    Rendezvous,
    Reserve,
    decode,
    encode,
    new_transfer_id,
)
from tandem.common.kv_layout import KVLayout
from tandem.engine.kv_cache import PagedKVCache
from tandem.kv_transfer.context import Context
from tandem.kv_transfer.frame import rows_per_frame
from tandem.kv_transfer.land import LandLink
from tandem.kv_transfer.payload import Payload
from tandem.kv_transfer.push import Piece, PushLink
from tandem.kv_transfer.registry import CONNECTORS, preferred

TIMEOUT = 60.0  # seconds for anything to answer
SHAPES = {
    "smollm2-135m": KVLayout("benchmark", "float32", 16, layers=30, kv_heads=3, head_dim=64),  # 737,280 bytes a block
    "llama-3.1-8b": KVLayout("benchmark", "bfloat16", 16, layers=32, kv_heads=8, head_dim=128),  # 2 MiB a block
    "small": KVLayout("benchmark", "float32", 16, layers=4, kv_heads=2, head_dim=64),  # 65,536 bytes a block
}
Spent = tuple[float, float]  # seconds by the clock, and of a processor at the busier end


@dataclass(frozen=True, slots=True)
class Seconds:
    """One round."""

    copy: Spent
    link: Spent
    raw: Spent


@dataclass(frozen=True, slots=True)
class Row:
    """GB/s: medians. Ratios: of one round each, then the median; `_cpu`: of processor time at the busier end."""

    shape: str
    mib: int
    connector: str
    copy: float
    link: float
    link_to_copy: float
    link_to_copy_cpu: float
    raw: float
    raw_to_copy: float
    raw_to_copy_cpu: float
    load: float  # of the machine, in processes over the last minute
    rounds: list[Seconds]


class SocketChannel:
    """A Channel over a stream socket: length-prefixed messages."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        data = encode(message)
        try:
            with self._lock:
                self._sock.sendall(len(data).to_bytes(4, "big") + data)
        except OSError as exc:
            raise TransferFailed("channel closed") from exc

    def listen(self, on_message: Callable[[Message], None], on_close: Callable[[str], None]) -> None:
        threading.Thread(target=self._read, args=(on_message, on_close), daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the peer was first
            self._sock.shutdown(socket.SHUT_RDWR)

    def _read(self, on_message: Callable[[Message], None], on_close: Callable[[str], None]) -> None:
        with contextlib.suppress(OSError), self._sock, self._sock.makefile("rb") as stream:
            while head := stream.read(4):
                on_message(decode(stream.read(int.from_bytes(head, "big"))))
        on_close("socket closed")


def context_of(channel: SocketChannel, cache: PagedKVCache) -> Context:
    return Context(channel, cache.layout, cache.memory.device, memory=cache.memory, fd=cache.fd)


def shuffled(count: int, seed: int) -> list[int]:
    blocks = list(range(count))
    random.Random(seed).shuffle(blocks)
    return blocks


class RawChannel:
    """The channel of a connector without links: set-up goes to the mailbox, everything else into `inbox`."""

    def __init__(self, channel: SocketChannel, cache: PagedKVCache) -> None:
        self.context = context_of(channel, cache)
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        channel.listen(self._incoming, lambda reason: self.context.mailbox.close())

    def _incoming(self, message: Message) -> None:
        if isinstance(message, Rendezvous):
            self.context.mailbox.deliver(message)
        else:
            self.inbox.put(message)


# ------------------------------------------------------------------------------------------------------------ D


def serve_links(connector: str, channel: SocketChannel, cache: PagedKVCache, ended: threading.Event) -> LandLink:
    """D's end with digests: grants the first blocks of a random order, writes what a two-sided connector brings."""
    granted = shuffled(cache.num_blocks, seed=2)

    def on_message(message: Message) -> None:
        if isinstance(message, Reserve):
            blocks = granted[: message.num_tokens // cache.layout.block_size]
            targets = tuple(blocks) if link.one_sided else ()
            grant = Grant(message.transfer_id, 1, 0, len(blocks), cache.layout.block_size, targets)
            link.grant(grant, blocks)
        elif isinstance(message, Manifest):
            link.revoke(message.transfer_id)
            link.post(Ack(message.transfer_id, 1))

    def on_frame(frame: Frame, payload: Payload) -> None:
        if not link.one_sided:
            blocks = granted[frame.first_block : frame.first_block + frame.num_blocks]
            cache.write(blocks, payload.tensor(), frame.first_layer, frame.num_layers)

    context = context_of(channel, cache)
    link = LandLink(
        context, CONNECTORS[connector]().receiver(context), on_message, on_frame, lambda _: ended.set(), TIMEOUT
    )
    link.open()
    return link


def serve_raw(connector: str, channel: SocketChannel, cache: PagedKVCache) -> None:
    raw = RawChannel(channel, cache)
    receiver = CONNECTORS[connector]().receiver(raw.context)
    receiver.open(TIMEOUT)
    granted = shuffled(cache.num_blocks, seed=2)
    while True:
        message = raw.inbox.get()
        if isinstance(message, Frame):
            blocks = granted[message.first_block : message.first_block + message.num_blocks]
            receiver.receive(message, blocks if receiver.one_sided else (), TIMEOUT)
        elif isinstance(message, Manifest):
            channel.send(Ack(message.transfer_id, 1))


def serve(connector: str, layout: KVLayout, blocks: int, device: torch.device, sockets: list[socket.socket]) -> None:
    """D's process, until P's link ends."""
    torch.set_num_threads(1)
    cache = PagedKVCache(layout, blocks, device)
    cache.memory.fill_(1)
    ended = threading.Event()
    link_channel, raw_channel = (SocketChannel(sock) for sock in sockets)
    link = serve_links(connector, link_channel, cache, ended)
    threading.Thread(target=serve_raw, args=(connector, raw_channel, cache), daemon=True).start()
    ended.wait()
    link.close()
    link.join(TIMEOUT)


# ------------------------------------------------------------------------------------------------------------ P


class Bench:
    """P's end of one connector and one shape of block, and D's process."""

    def __init__(self, connector: str, shape: str, blocks: int, device: torch.device) -> None:
        self._cache = PagedKVCache(SHAPES[shape], blocks, device)
        self._cache.memory.random_(0, 256)
        self._plain = torch.ones_like(self._cache.memory)  # touched
        self._rows = shuffled(blocks, seed=1)
        pairs = [socket.socketpair() for _ in range(2)]
        numbers = [theirs.fileno() for _, theirs in pairs]
        command = [sys.executable, str(Path(__file__)), "--device", str(device)]
        command += ["--serve", connector, shape, str(blocks), *map(str, numbers)]
        self._process = subprocess.Popen(command, pass_fds=numbers)
        for _, theirs in pairs:
            theirs.close()
        link_channel, self._raw_channel = (SocketChannel(ours) for ours, _ in pairs)
        self._open_link(connector, link_channel)
        self._raw = RawChannel(self._raw_channel, self._cache)
        self._sender = CONNECTORS[connector]().sender(self._raw.context)
        self._sender.open(TIMEOUT)

    def round(self, blocks: int) -> Seconds:
        return Seconds(*(self._spent(action, blocks) for action in (self.copy, self.link, self.raw)))

    def _spent(self, action: Callable[[int], float], blocks: int) -> Spent:
        ours, theirs = time.process_time(), processor_time(self._process.pid)
        seconds = action(blocks)
        return seconds, max(time.process_time() - ours, processor_time(self._process.pid) - theirs)

    def copy(self, blocks: int) -> float:
        """Seconds, as the others."""
        source, target = self._cache.memory[:blocks], self._plain[:blocks]
        started = time.perf_counter()
        if source.device.type == "cuda":
            target.copy_(source)
            torch.cuda.synchronize()
        else:
            np.copyto(target.numpy(), source.numpy())
        return time.perf_counter() - started

    def link(self, blocks: int) -> float:
        layout, transfer_id = self._cache.layout, new_transfer_id()
        self._push.reserve(Reserve(transfer_id, b"", blocks * layout.block_size))
        grant = self._answer()
        assert isinstance(grant, Grant), grant
        payload = Payload.layers(self._cache.memory, self._rows[:blocks], 0, layout.block_bytes)
        started = time.perf_counter()
        self._push.push(transfer_id, 1, Piece(0, payload, 0, layout.layers, grant.targets))
        self._push.finish(Manifest(transfer_id, 1, blocks * layout.block_size, (), (), (0,)))
        answer = self._answer()
        assert isinstance(answer, Ack), answer
        seconds = time.perf_counter() - started
        self._push.forget(transfer_id, lambda: None)
        return seconds

    def raw(self, blocks: int) -> float:
        layout, step = self._cache.layout, rows_per_frame(self._cache.layout.block_bytes)
        targets = shuffled(self._cache.num_blocks, seed=2) if self._sender.one_sided else []
        started = time.perf_counter()
        for first in range(0, blocks, step):
            rows = self._rows[first : min(first + step, blocks)]
            payload = Payload.layers(self._cache.memory, rows, 0, layout.block_bytes)
            frame = Frame(bytes(16), 1, first, len(rows), 0, layout.layers, payload.nbytes, ())
            if not self._sender.one_sided:
                self._raw_channel.send(frame)
            self._sender.send(frame, payload, targets[first : first + len(rows)], TIMEOUT)
            if self._sender.one_sided:
                self._raw_channel.send(frame)
        self._raw_channel.send(Manifest(bytes(16), 1, 0, (), (), ()))
        self._raw.inbox.get(timeout=TIMEOUT)
        return time.perf_counter() - started

    def close(self) -> None:
        self._push.close()
        self._push.join(TIMEOUT)
        self._sender.close()
        self._raw_channel.close()
        try:
            self._process.wait(TIMEOUT)
        finally:
            self._process.kill()
        self._cache.close()

    def _open_link(self, connector: str, channel: SocketChannel) -> None:
        self._inbox: queue.SimpleQueue[Message | str] = queue.SimpleQueue()
        context = context_of(channel, self._cache)
        self._push = PushLink(
            context, CONNECTORS[connector]().sender(context), self._inbox.put, self._inbox.put, TIMEOUT
        )
        self._push.open()

    def _answer(self) -> Message:
        answer = self._inbox.get(timeout=TIMEOUT)
        if isinstance(answer, str):
            raise TransferFailed(answer)
        return answer


def missing(connector: str, device: torch.device) -> str:
    """Why this machine cannot use it, or ''."""
    ours, theirs = socket.socketpair()
    cache = PagedKVCache(SHAPES["small"], 1, device)
    with ours, theirs, contextlib.closing(cache):
        try:
            CONNECTORS[connector]().domain(context_of(SocketChannel(ours), cache))
        except (ConfigError, ImportError) as exc:
            return str(exc)
    return ""


def measure(connector: str, shape: str, sizes: list[int], rounds: int, device: torch.device) -> Iterator[Row]:
    """One row for each size, in MiB."""
    blocks_of = {mib: max(1, (mib << 20) // SHAPES[shape].block_bytes) for mib in sizes}
    bench = Bench(connector, shape, max(blocks_of.values()), device)
    with contextlib.closing(bench):
        bench.round(max(blocks_of.values()))
        for mib, blocks in blocks_of.items():
            seconds = [bench.round(blocks) for _ in range(rounds)]
            yield summarize(shape, mib, connector, blocks * SHAPES[shape].block_bytes, seconds)


def summarize(shape: str, mib: int, connector: str, num_bytes: int, rounds: list[Seconds]) -> Row:
    def rate(name: str) -> float:
        return statistics.median(num_bytes / getattr(seconds, name)[0] / 1e9 for seconds in rounds)

    def ratio(name: str, clock: int) -> float:
        return statistics.median(seconds.copy[clock] / getattr(seconds, name)[clock] for seconds in rounds)

    return Row(
        shape=shape,
        mib=mib,
        connector=connector,
        copy=rate("copy"),
        link=rate("link"),
        link_to_copy=ratio("link", 0),
        link_to_copy_cpu=ratio("link", 1),
        raw=rate("raw"),
        raw_to_copy=ratio("raw", 0),
        raw_to_copy_cpu=ratio("raw", 1),
        load=os.getloadavg()[0],
        rounds=rounds,
    )


HEADINGS = ("block", "MiB", "connector", "copy GB/s")
HEADINGS += ("link GB/s", "link : copy", "… CPU", "raw GB/s", "raw : copy", "… CPU", "load")


def line(row: Row) -> str:
    link = (row.copy, row.link, row.link_to_copy, row.link_to_copy_cpu)
    raw = (row.raw, row.raw_to_copy, row.raw_to_copy_cpu, row.load)
    return f"| {row.shape} | {row.mib} | {row.connector} | {' | '.join(f'{figure:.2f}' for figure in link + raw)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: both processes on the first GPU")
    parser.add_argument("--connectors", help="default: all that this machine has")
    parser.add_argument("--mib", default="64,256,1024", help="sizes of a hand-off")
    parser.add_argument("--blocks", default=",".join(SHAPES), help="shapes of a block")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", type=Path, help="also write the rows there, as JSON")
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)  # D's process
    arguments = parser.parse_args()
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device(arguments.device)
    if arguments.serve:
        connector, shape, blocks, *numbers = arguments.serve
        sockets = [socket.socket(fileno=int(number)) for number in numbers]
        serve(connector, SHAPES[shape], int(blocks), device, sockets)
        return 0
    torch.set_num_threads(1)
    sizes = [int(size) for size in arguments.mib.split(",")]
    rows: list[Row] = []
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    known = ",".join(name for name in preferred(device.type) if name != "inproc")
    for connector in (arguments.connectors or known).split(","):
        if reason := missing(connector, device):
            print(f"{connector}: not here: {reason}", file=sys.stderr)
            continue
        for shape in arguments.blocks.split(","):
            for row in measure(connector, shape, sizes, arguments.rounds, device):
                rows.append(row)
                print(line(row), flush=True)
    if arguments.save:
        arguments.save.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
