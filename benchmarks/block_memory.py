"""What KV blocks cost in memory, against how many there are: their bytes, and what is remembered of each.

    python benchmarks/block_memory.py --save block_memory.json --plot block_memory.svg

Each point is the growth of a fresh process's resident memory while it builds one of

    cache    a KV cache, and writes to all of it
    pool     a worker's block pool, all of whose blocks are cached and findable
    index    a router's prefix index of as many blocks

The cache is expected to take the bytes of its layout; the others the same for each block, the slope of the line through
0 that fits best. Below some thousand blocks they find room in what Python holds already. Numbers of blocks are powers
of two because dictionaries grow by doubling. Figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from picture import Curve, Panel, draw

from tandem.cluster.bench.report import Spread
from tandem.common.block_hash import BlockHash, block_hashes, chain_root
from tandem.common.kv_layout import KVLayout
from tandem.engine.block_pool import BlockPool
from tandem.router.prefix_index import PrefixIndex

LAYOUT = KVLayout("benchmark", "float32", 16, layers=1, kv_heads=1, head_dim=32)  # 4,096 bytes a block: one page
PROMPT = 64  # blocks that a sequence has
PARTS = {"cache": "KV cache", "pool": "block pool of the worker", "index": "prefix index of the router"}


@dataclass(frozen=True, slots=True)
class Point:
    blocks: int
    rounds: dict[str, list[int]]  # resident bytes, by part

    def resident(self, part: str) -> Spread:
        found = self.rounds[part]
        return Spread(statistics.median(found), min(found), max(found))


def expected(points: list[Point], part: str) -> float:
    """Bytes of a block, however many there are."""
    if part == "cache":
        return LAYOUT.block_bytes
    products = sum(point.blocks * point.resident(part).median for point in points)
    return products / sum(point.blocks**2 for point in points)


# ------------------------------------------------------------------------------------------------- in a fresh process


def weigh(part: str, blocks: int) -> int:
    """Resident bytes that one part takes; `blocks` is a multiple of PROMPT."""
    build = {"cache": build_cache, "pool": build_pool, "index": build_index}[part]
    _ = build(PROMPT)  # what the first use of anything takes
    before = _resident()
    built = build(blocks)
    taken = _resident() - before
    del built
    return taken


def build_cache(blocks: int) -> object:
    import torch

    from tandem.engine.kv_cache import PagedKVCache

    torch.set_num_threads(1)
    cache = PagedKVCache(LAYOUT, blocks, torch.device("cpu"))
    cache.memory.fill_(1)
    return cache


def build_pool(blocks: int) -> BlockPool:
    pool = BlockPool(blocks, LAYOUT.block_size)
    for hashes in _prompts(blocks):
        _cached(pool, hashes)
    assert pool.counts().cached == blocks
    return pool


def build_index(blocks: int) -> PrefixIndex:
    index = PrefixIndex()
    for hashes in _prompts(blocks):
        index.store("worker", hashes)
    assert len(index) == blocks
    return index


def _cached(pool: BlockPool, hashes: list[BlockHash]) -> None:
    """As a worker does it: a prompt gets its blocks, they become findable, the request ends, the router is told."""
    blocks = pool.allocate(len(hashes))
    assert blocks is not None
    for block, block_hash in zip(blocks, hashes, strict=True):
        pool.publish(block, block_hash)
    pool.release(blocks)
    pool.drain_events()


def _prompts(blocks: int) -> Iterator[list[BlockHash]]:
    """Hashes of prompts that have nothing in common."""
    root = chain_root(b"", LAYOUT.fingerprint)
    for number in range(blocks // PROMPT):
        yield block_hashes([number] * (PROMPT * LAYOUT.block_size), LAYOUT.block_size, root)


def _resident() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


# ------------------------------------------------------------------------------------------------------------ report


def weigh_elsewhere(part: str, blocks: int) -> int:
    command = [sys.executable, __file__, "--weigh", part, str(blocks)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def measure(blocks: int, rounds: int) -> Point:
    return Point(blocks, {part: [weigh_elsewhere(part, blocks) for _ in range(rounds)] for part in PARTS})


HEADINGS = ("blocks", *(f"{name}, MiB (bytes a block)" for name in PARTS.values()))


def line(point: Point) -> str:
    cells = [f"{point.blocks}"]
    for resident in map(point.resident, PARTS):
        each = [size / point.blocks for size in (resident.median, resident.min, resident.max)]
        cells.append(f"{resident.median / 2**20:.2f} ({each[0]:.0f}; {each[1]:.0f} – {each[2]:.0f})")
    return f"| {' | '.join(cells)} |"


def plot(points: list[Point], path: Path) -> None:
    curves, blocks = list[Curve](), [point.blocks for point in points]
    for part, name in PARTS.items():
        each, found = expected(points, part), [point.resident(part) for point in points]
        measured = [Spread(*(size / 2**20 for size in (s.median, s.min, s.max))) for s in found]
        text = f"expected: {each:,.0f} bytes a block ({'its layout' if part == 'cache' else 'the best fit'})"
        curves.append(Curve(name, blocks, measured, [each * count / 2**20 for count in blocks], text))
    title = f"Resident memory of KV blocks of {LAYOUT.block_bytes:,} bytes; medians, bars: least to most"
    draw([Panel("KV blocks", "resident memory, MiB", curves)], title, path)


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=integers, default=[1024 << power for power in range(8)])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", type=Path, help="also write the points there, as JSON")
    parser.add_argument("--plot", type=Path, help="also draw them there: PNG, SVG or PDF")
    parser.add_argument("--weigh", nargs=2, help=argparse.SUPPRESS)  # the fresh process
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    if arguments.weigh:
        part, blocks = arguments.weigh
        print(weigh(part, int(blocks)))
        return 0
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}", flush=True)
    points = list[Point]()
    for blocks in arguments.blocks:
        points.append(measure(blocks, arguments.rounds))
        print(line(points[-1]), flush=True)
    each = {part: expected(points, part) for part in PARTS}
    print("\nexpected bytes a block: " + ", ".join(f"{PARTS[part]} {bytes_:.0f}" for part, bytes_ in each.items()))
    if arguments.save:
        result = {"block_bytes": LAYOUT.block_bytes, "expected": each, "load": os.getloadavg()[0]}
        arguments.save.write_text(json.dumps({**result, "points": [asdict(point) for point in points]}, indent=1))
    if arguments.plot:
        plot(points, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
