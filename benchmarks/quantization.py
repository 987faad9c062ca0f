"""How much faster the engine is with fewer bits, by whole steps without a server: each kind against 16 bits, in turn.

    python benchmarks/quantization.py --threads 1 --save quantization.json

Without MODEL: one of SmolLM2-135M's shape, random weights, which are quantized when they are loaded. Steps of all kinds
alternate, and their processor time counts, so that a machine which others use as well is unfair to all alike; `times`
is the ratio of the fastest tenth of the steps, and of their medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from step import load, scheduled

from tandem.engine.engine import Engine

PLAIN = "16 bits"
KINDS = {PLAIN: None, "int8": "int8", "int4": "int4"}
CASES = {"decode, batch 1": (1, 128, 1), "decode, batch 8": (8, 128, 1), "prompt of 512": (1, 512, 512)}
KV_MIB = 64


@dataclass(frozen=True, slots=True)
class Row:
    case: str
    kind: str
    steps: int
    fastest: float  # seconds of the step at the end of the fastest tenth
    median: float
    times: float  # 16 bits' fastest : fastest
    median_times: float

    @classmethod
    def of(cls, case: str, kind: str, seconds: list[float], plain: list[float]) -> Row:
        fastest, median = tenth(seconds), statistics.median(seconds)
        return cls(case, kind, len(seconds), fastest, median, tenth(plain) / fastest, statistics.median(plain) / median)

    def __str__(self) -> str:
        each = f"{self.fastest * 1e3:.1f} | {self.median * 1e3:.1f} | {self.times:.2f} | {self.median_times:.2f}"
        return f"| {self.case} | {self.kind} | {self.steps} | {each} |"


def tenth(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 10]


def measure(engines: dict[str, Engine], rounds: int) -> Iterator[Row]:
    for case, shape in CASES.items():
        found = {kind: list[float]() for kind in engines}
        repeats = 6 if shape[2] == 1 else 1
        for _ in range(rounds):
            for kind, engine in engines.items():
                found[kind] += [step(engine, shape) for _ in range(repeats)]
        yield from (Row.of(case, kind, seconds, found[PLAIN]) for kind, seconds in found.items())


def step(engine: Engine, shape: tuple[int, int, int]) -> float:
    items = scheduled(engine, *shape)
    began = time.process_time()
    engine.forward(items)
    return time.process_time() - began


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a directory; default: SmolLM2-135M's shape")
    parser.add_argument("--dtype", default="bfloat16", help="of the 16 bits")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="and as many cores")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--save", type=Path, help="also write the rows there, as JSON")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    torch.set_num_threads(arguments.threads)
    engines = {kind: load(arguments.model, arguments.dtype, KV_MIB, value)[0] for kind, value in KINDS.items()}
    print("| step | kind | steps | fastest ms | median ms | times | times, medians |\n|---|---|---|---|---|---|---|")
    rows = list[Row]()
    for row in measure(engines, arguments.rounds):
        rows.append(row)
        print(row, flush=True)
    for engine in engines.values():
        engine.close()
    if arguments.save:
        arguments.save.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
