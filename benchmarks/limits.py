"""What this machine can do at most: bytes read from memory per second, and float32 operations of a core per second.

Both by loops of C++, compiled when they are asked for. Other benchmarks state their figures as shares of these.

    python benchmarks/limits.py

prints them, and how fast one core reads pieces of several sizes in random order, as KV blocks lie: of memory that
processes share, like the KV cache, which has pages of 4 KiB.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tandem.engine.kernels.compile import FLAGS, SOURCES

TRIES = 50
PIECES = (2, 4, 12, 24, 64, 1024)  # KiB
Call = Callable[[], object]
LIMITS = """
#include "simd.h"
#include <cstddef>
using namespace tandem;
extern "C" {
float read_all(const char* data, size_t bytes) {
    Vec sums[8] = {};
    for (size_t at = 0; at + sizeof sums <= bytes; at += sizeof sums)
        for (int which = 0; which < 8; which++) sums[which] += read<Vec>(data + at + which * sizeof(Vec));
    float total = 0;
    for (Vec part : sums) total += sum(part);
    return total;
}
// Pieces that begin at `starts` (count + 1,), each in turn; the lines 2 KiB further on are asked for meanwhile.
float read_pieces(const char* data, const size_t* starts, size_t count, size_t bytes) {
    const size_t ahead = 2048 < bytes ? 2048 : bytes - 64;
    Vec sums[2] = {};
    for (size_t index = 0; index < count; index++) {
        const char *piece = data + starts[index], *next = data + starts[index + 1];
        for (size_t at = 0; at < bytes; at += 64) {
            __builtin_prefetch(at + ahead < bytes ? piece + at + ahead : next + at + ahead - bytes);
            for (size_t part = 0; part < 64; part += sizeof(Vec))
                sums[part / sizeof(Vec) % 2] += read<Vec>(piece + at + part);
        }
    }
    return sum(sums[0]) + sum(sums[1]);
}
// 2 * LANES operations each of 12 times a turn: enough to hide their latency.
float multiply(size_t turns, float factor) {
    Vec sums[12], a = broadcast(factor), b = broadcast(1 - factor);
#pragma GCC unroll 12
    for (int which = 0; which < 12; which++) sums[which] = broadcast(float(which));
    for (size_t turn = 0; turn < turns; turn++) {
#pragma GCC unroll 12
        for (int which = 0; which < 12; which++) sums[which] = sums[which] * a + b;
    }
    float total = 0;
#pragma GCC unroll 12
    for (int which = 0; which < 12; which++) total += sum(sums[which]);
    return total;
}
int lanes() { return LANES; }
}
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of this machine: bytes/s by number of threads, float32 operations/s of a thread."""

    read: dict[int, float]
    operations: float

    def seconds(self, num_bytes: float, operations: float, threads: int) -> float:
        return max(num_bytes / self.read[threads], operations / (self.operations * threads))


def compiled(source: str) -> ctypes.CDLL:
    """Raises OSError or subprocess.CalledProcessError without a compiler that works."""
    with tempfile.TemporaryDirectory() as directory:
        made, text = Path(directory) / "limits.so", Path(directory) / "limits.cpp"
        text.write_text(source)
        command = [shutil.which("g++") or "g++", *FLAGS, "-I", str(SOURCES), str(text), "-o", str(made)]
        subprocess.run(command, check=True, timeout=120)
        return ctypes.CDLL(str(made))


def together(work: list[Call]) -> float:
    """Seconds that the calls take side by side, a thread each."""
    barrier, spans = threading.Barrier(len(work)), list[tuple[float, float]]()

    def one(call: Call) -> None:
        barrier.wait()
        began = time.perf_counter()
        call()
        spans.append((began, time.perf_counter()))

    threads = [threading.Thread(target=one, args=(call,)) for call in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(end for _, end in spans) - min(began for began, _ in spans)


def measure_limits(threads: list[int], stream: int = 256 << 20) -> Limits:
    """The best of many tries: a limit is what the machine can do, not what it does while others use it."""
    library = compiled(LIMITS)
    data, lanes = torch.ones(stream // 4), library.lanes()
    address = data.data_ptr()

    def reader(share: int, count: int) -> Call:
        size = stream // count // 4096 * 4096
        return partial(library.read_all, ctypes.c_void_p(address + share * size), ctypes.c_size_t(size))

    read = dict[int, float]()
    for count in threads:
        read[count] = stream / min(together([reader(share, count) for share in range(count)]) for _ in range(TRIES))
    turns = 2_000_000
    seconds = min(
        together([partial(library.multiply, ctypes.c_size_t(turns), ctypes.c_float(0.999))]) for _ in range(TRIES)
    )
    return Limits(read, turns * 12 * lanes * 2 / seconds)


def describe(limits: Limits) -> str:
    read = ", ".join(f"{rate / 1e9:.1f} GB/s by {count}" for count, rate in limits.read.items())
    return (
        f"limits: read {read}; {limits.operations / 1e9:.0f} GFLOP/s of float32 a thread; load {os.getloadavg()[0]:.1f}"
    )


def measure_pieces(sizes: list[int], stream: int = 512 << 20) -> dict[int, float]:
    """Bytes/s of one core by bytes of a piece, the best of many tries."""
    library, rates = compiled(LIMITS), dict[int, float]()
    file = os.memfd_create("pieces")
    os.ftruncate(file, stream)
    with mmap.mmap(file, stream) as memory:
        os.close(file)
        data = torch.frombuffer(memory, dtype=torch.float32).fill_(1.0)
        for size in sizes:
            starts = list(range(0, stream - size + 1, size))
            random.Random(0).shuffle(starts)
            order = torch.tensor([*starts, starts[0]], dtype=torch.int64)
            address, count = ctypes.c_void_p(data.data_ptr()), ctypes.c_size_t(len(starts))
            call = partial(
                library.read_pieces, address, ctypes.c_void_p(order.data_ptr()), count, ctypes.c_size_t(size)
            )
            rates[size] = size * len(starts) / min(together([call]) for _ in range(TRIES))
        del data
    return rates


def main() -> None:
    limits = measure_limits(sorted({1, len(os.sched_getaffinity(0))}))
    print(describe(limits))
    for size, rate in measure_pieces([kib << 10 for kib in PIECES]).items():
        print(f"pieces of {size >> 10} KiB: {rate / 1e9:.1f} GB/s, {rate / limits.read[1]:.2f} of the above")


if __name__ == "__main__":
    main()
