"""What one engine step costs, without a server: against batch size, context and chunk, beside what it should cost.

    python benchmarks/step.py --threads 1 --save step.json --plot step.svg
    python benchmarks/step.py MODEL --dtype bfloat16 --batches 1,8,64 --contexts 512,4096 --chunks 128,512

Without MODEL: one of SmolLM2-135M's shape, random weights. `expected` is the time for reading all weights and the KV in
sight once, at the speed at which this machine reads memory, and for all multiplications at the speed at which it
multiplies (limits.py): what a step would take if nothing overlapped and nothing else had to be done. `python` is the
share of the step spent outside the kernels: building the batch, ctypes, sampling. A point is the median over rounds of
the best of several steps, for on a machine that others use only the best say what the engine can do.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from limits import Limits, describe, measure_limits
from picture import Curve, Panel, draw

from tandem.cluster.bench.report import Spread
from tandem.common.request import Leg, SamplingParams
from tandem.engine.batch import Scheduled
from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.kernels import native
from tandem.engine.models.config import ModelConfig
from tandem.engine.models.registry import parse_config
from tandem.engine.sequence import Sequence

SMOLLM2: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "max_position_embeddings": 8704, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "rope_theta": 100000,
}  # fmt: skip
STEPS = 3  # of which the best counts, in a round


@dataclass(frozen=True, slots=True)
class Point:
    sweep: str  # batch | context | chunk
    sequences: int
    context: int  # tokens of each sequence behind the step
    new: int  # tokens of each that the step computes
    seconds: float
    least: float  # of the rounds
    most: float
    kernels: float  # seconds inside C++
    expected: float
    moved: float  # bytes
    operations: float
    load: float  # of the machine, in processes over the last minute

    @property
    def python(self) -> float:
        return 1.0 - self.kernels / self.seconds


class Clock:
    """Adds up the time that a team's calls take."""

    def __init__(self, team: native.Team) -> None:
        self.seconds = 0.0
        self._call = team._call
        team._call = self._timed

    def _timed(self, name: str, *arguments: Any) -> None:
        began = time.perf_counter()
        self._call(name, *arguments)
        self.seconds += time.perf_counter() - began


@dataclass(frozen=True, slots=True)
class Cost:
    """What a step must move and compute, at least."""

    config: ModelConfig
    weight_bytes: float
    token_bytes: float  # of KV, all layers

    @classmethod
    def of(cls, engine: Engine, config: ModelConfig) -> Cost:
        element = torch.finfo(getattr(torch, engine.layout.dtype)).bits // 8
        kv, rest = _of_layer(config)
        weights = config.layers * (kv + rest) + config.vocab_size * config.hidden_size
        return cls(config, float(element * weights), engine.layout.block_bytes / engine.layout.block_size)

    def moved(self, sequences: int, context: int) -> float:
        """Bytes: all weights once, and the KV in sight."""
        return self.weight_bytes + sequences * context * self.token_bytes

    def operations(self, sequences: int, context: int, new: int) -> float:
        """Of the last layer, what is behind its keys and values only for the tokens that are sampled from."""
        config, rows, (kv, rest) = self.config, sequences * new, _of_layer(self.config)
        pairs = sequences * ((config.layers - 1) * sum(range(context - new + 1, context + 1)) + context)
        products = rows * (config.layers * (kv + rest) - rest) + sequences * (
            rest + config.vocab_size * config.hidden_size
        )
        return 2.0 * products + 4.0 * pairs * config.heads * config.head_dim


def _of_layer(config: ModelConfig) -> tuple[int, int]:
    """Weights of a layer: for keys and values, and the others."""
    queries, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return 2 * config.hidden_size * kv, config.hidden_size * (2 * queries + 3 * config.intermediate_size)


class Bench:
    def __init__(self, engine: Engine, cost: Cost, limits: Limits, rounds: int) -> None:
        self._engine, self._cost, self._limits, self._rounds = engine, cost, limits, rounds
        (self._threads,) = limits.read
        attention: Any = engine._rank.attention
        self._clock = Clock(attention.team)
        engine._rank.cache.tensor.normal_()  # in memory, and numbers as a model would leave there

    def fits(self, sequences: int, context: int) -> bool:
        blocks = -(-context // self._engine.layout.block_size)
        return sequences * blocks <= self._engine.num_blocks and context <= self._engine.max_model_len

    def point(self, sweep: str, sequences: int, context: int, new: int) -> Point:
        """`new` tokens of each sequence, whose others are in the cache."""
        items = scheduled(self._engine, sequences, context, new)
        found = [min(self._step(items) for _ in range(STEPS)) for _ in range(self._rounds)]
        seconds, kernels = sorted(found)[len(found) // 2]
        work = self._cost.moved(sequences, context), self._cost.operations(sequences, context, new)
        rounds = [taken for taken, _ in found]
        spread, load = (seconds, min(rounds), max(rounds)), os.getloadavg()[0]
        return Point(sweep, sequences, context, new, *spread, kernels, self._expected(*work), *work, load)

    def _expected(self, moved: float, operations: float) -> float:
        return moved / self._limits.read[self._threads] + operations / (self._limits.operations * self._threads)

    def _step(self, items: list[Scheduled]) -> tuple[float, float]:
        self._clock.seconds, began = 0.0, time.perf_counter()
        self._engine.forward(items)
        return time.perf_counter() - began, self._clock.seconds


def scheduled(engine: Engine, sequences: int, context: int, new: int) -> list[Scheduled]:
    """A step of so many sequences of random tokens, in blocks of random order: `new` tokens of each are computed."""
    chosen, each = random.Random(0), -(-context // engine.layout.block_size)
    blocks = chosen.sample(range(engine.num_blocks), sequences * each)
    made = list[Scheduled]()
    for index in range(sequences):
        ids = tuple(chosen.randrange(engine.vocab_size) for _ in range(context))
        sequence = Sequence.from_leg(Leg(f"{index}", 0, ids, SamplingParams(1, temperature=0.0)), 0.0)
        sequence.blocks, sequence.computed = blocks[index * each : (index + 1) * each], context - new
        made.append(Scheduled(sequence, new))
    return made


@dataclass(frozen=True, slots=True)
class Sweep:
    """Which points: decode over batches at `context`, over contexts at one and eight sequences; chunks of prompts."""

    batches: list[int]
    contexts: list[int]
    chunks: list[int]
    context: int = 512

    def points(self) -> Iterator[tuple[str, int, int, int]]:
        for batch in self.batches:
            yield "batch", batch, self.context, 1
        for batch in (1, 8):
            for context in self.contexts:
                yield f"context, {batch} at once", batch, context, 1
        for chunk in self.chunks:
            yield "chunk", 1, chunk, chunk


def block_memory(engine: Engine) -> tuple[int, float]:
    """Bytes of a block by the layout, and of resident memory after all blocks were written."""
    fd = engine._rank.cache.fd
    assert fd is not None, "the cache is a file in memory"
    return engine.layout.block_bytes, os.fstat(fd).st_blocks * 512 / engine.num_blocks


def load(model: str | None, dtype: str, kv_mib: int, quantization: str | None = None) -> tuple[Engine, ModelConfig]:
    """`model` or, with None, random weights of SmolLM2-135M's shape."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(model or scratch)
        if model is None:
            (directory / "config.json").write_text(json.dumps(SMOLLM2))
        config = EngineConfig(
            model=str(directory),
            dtype=dtype,
            load_format="auto" if model else "dummy",
            kv_cache_memory_bytes=kv_mib << 20,
            quantization=quantization,
            max_num_seqs=64,
            attention_backend="native",
            device="cpu",
        )
        path = directory / "config.json"
        return Engine.load(config), parse_config(json.loads(path.read_text()), path)


HEADINGS = (
    "sweep", "sequences", "context", "new", "ms", "rounds", "expected ms", "expected : ms", "GB/s", "GFLOP/s",
    "python", "load",
)  # fmt: skip


def line(point: Point) -> str:
    cells = [point.sweep, f"{point.sequences}", f"{point.context}", f"{point.new}", f"{point.seconds * 1e3:.2f}"]
    cells += [f"{point.least * 1e3:.2f} - {point.most * 1e3:.2f}", f"{point.expected * 1e3:.2f}"]
    cells += [f"{point.expected / point.seconds:.2f}", f"{point.moved / point.seconds / 1e9:.1f}"]
    cells += [f"{point.operations / point.seconds / 1e9:.0f}", f"{point.python:.1%}", f"{point.load:.1f}"]
    return f"| {' | '.join(cells)} |"


EXPECTED = "bytes of weights and KV / read rate + operations / their rate"
AXES = {"batch": "sequences at a time", "context": "tokens in sight of each sequence", "chunk": "tokens of the chunk"}


def plot(points: list[Point], path: Path, title: str) -> None:
    """A panel for the batches, the contexts and the chunks: measured points, and the expected line beside them."""
    panels = list[Panel]()
    for kind, x_label in AXES.items():
        curves = list[Curve]()
        for sweep in dict.fromkeys(point.sweep for point in points if point.sweep.startswith(kind)):
            chosen = [point for point in points if point.sweep == sweep]
            x = [{"batch": p.sequences, "context": p.context, "chunk": p.new}[kind] for p in chosen]
            measured = [Spread(p.seconds * 1e3, p.least * 1e3, p.most * 1e3) for p in chosen]
            text = "expected" if not curves else ""
            curves.append(Curve(sweep, x, measured, [p.expected * 1e3 for p in chosen], text))
        if curves:
            panels.append(Panel(x_label, "ms a step", curves))
    draw(panels, title, path)


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a directory; default: SmolLM2-135M's shape")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="and as many cores")
    parser.add_argument("--kv-mib", type=int, default=1600, help="of KV cache; what does not fit is left out")
    parser.add_argument("--batches", type=integers, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--contexts", type=integers, default=[128, 256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--chunks", type=integers, default=[16, 32, 64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", type=Path, help="also write limits and points there, as JSON")
    parser.add_argument("--plot", type=Path, help="also draw them there: PNG, SVG or PDF")
    return parser.parse_args()


def report(arguments: argparse.Namespace, limits: Limits, bench: Bench) -> list[Point]:
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}", flush=True)
    points = list[Point]()
    for sweep, sequences, context, new in Sweep(arguments.batches, arguments.contexts, arguments.chunks).points():
        if not bench.fits(sequences, context):
            print(f"left out: {sequences} sequences of {context} tokens (--kv-mib)", file=sys.stderr)
            continue
        points.append(bench.point(sweep, sequences, context, new))
        print(line(points[-1]), flush=True)
    return points


def main() -> int:
    arguments = parse()
    logging.basicConfig(level=logging.WARNING)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])  # none of others' cores is borrowed
    torch.set_num_threads(arguments.threads)
    limits = measure_limits([arguments.threads])
    engine, config = load(arguments.model, arguments.dtype, arguments.kv_mib)
    bench = Bench(engine, Cost.of(engine, config), limits, arguments.rounds)
    wanted, resident = block_memory(engine)
    header = f"{describe(limits)}; {arguments.threads} threads, {engine.layout.dtype}"
    print(f"{header}\na block of {engine.layout.block_size} tokens: {wanted} bytes, {resident:.0f} resident\n")
    points = report(arguments, limits, bench)
    engine.close()
    if arguments.save:
        result = {"limits": asdict(limits), "threads": arguments.threads, "block_bytes": [wanted, resident]}
        arguments.save.write_text(json.dumps({**result, "points": [asdict(point) for point in points]}, indent=1))
    if arguments.plot:
        plot(points, arguments.plot, f"One step of the engine; expected: {EXPECTED}\n{header}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
