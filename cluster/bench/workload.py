"""What is sent: sessions of one request or, in a conversation, several. All follows from the options and a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

from tandem.cluster.bench.options import FIRST_TOKEN_ID, BenchOptions, Workload
from tandem.cluster.bench.trace import BLOCK_TOKENS, read_trace


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: what it adds to the session's earlier prompts and answers."""

    ids: Sequence[int]
    output_len: int  # tokens


@dataclass(frozen=True, slots=True)
class Session:
    turns: tuple[Turn, ...]
    at: float | None = None  # seconds after the start; None: the load says


def sessions(options: BenchOptions, seed: str) -> Iterator[Session]:
    """Endless but for a trace, made one at a time. Raises ConfigError for a trace that cannot be read."""
    return _MAKERS[options.workload](options, seed)


def arrivals(options: BenchOptions, seed: str) -> Iterator[float]:
    """Seconds after the start, at --request-rate: gamma-distributed gaps of that mean and shape --burstiness, as in
    `vllm bench serve`. Shape 1 is a Poisson process, infinity a constant pace."""
    assert options.request_rate is not None
    rng, mean, due = random.Random(f"{seed}/arrivals"), 1 / options.request_rate, 0.0
    while True:
        yield due
        shape = options.burstiness
        due += mean if math.isinf(shape) else rng.gammavariate(shape, mean / shape)


def long_prompts(options: BenchOptions, seed: str) -> Iterator[Session]:
    """Those that come in between the streams of `disturbed`."""
    long = replace(options, input_len=options.long_len, output_len=options.long_output_len)
    return _random(long, f"{seed}/long")


def _random(options: BenchOptions, seed: str) -> Iterator[Session]:
    rng = random.Random(seed)
    while True:
        yield Session((_turn(options, rng),))


def _shared_prefix(options: BenchOptions, seed: str) -> Iterator[Session]:
    rng = random.Random(seed)
    prefixes = [_ids(options, rng, options.prefix_len) for _ in range(options.groups)]
    for prefix in cycle(prefixes):
        own = _turn(options, rng)
        yield Session((replace(own, ids=[*prefix, *own.ids]),))


def _multi_turn(options: BenchOptions, seed: str) -> Iterator[Session]:
    rng = random.Random(seed)
    while True:
        yield Session(tuple(_turn(options, rng) for _ in range(options.turns)))


def _trace(options: BenchOptions, seed: str) -> Iterator[Session]:
    """A block's tokens follow from the seed and its hash id alone, so prompts share exactly what the trace shares."""
    assert options.trace is not None
    scale = options.scale_lengths
    block = max(1, round(BLOCK_TOKENS * scale))
    for request in read_trace(options.trace):
        length = min(max(1, round(request.input_length * scale)), block * len(request.hash_ids))
        ids: list[int] = []
        for hash_id in islice(request.hash_ids, math.ceil(length / block)):
            ids += _ids(options, random.Random(f"{seed}/{hash_id}"), block)
        output_len = max(1, round(request.output_length * scale))
        yield Session((Turn(ids[:length], output_len),), at=request.at / options.speed)


def _turn(options: BenchOptions, rng: random.Random) -> Turn:
    input_len, output_len = (_length(options, rng, mean) for mean in (options.input_len, options.output_len))
    return Turn(_ids(options, rng, input_len), output_len)


def _length(options: BenchOptions, rng: random.Random, mean: int) -> int:
    spread = int(mean * options.range_ratio)
    return max(1, rng.randint(mean - spread, mean + spread))


def _ids(options: BenchOptions, rng: random.Random, count: int) -> list[int]:
    return rng.choices(range(FIRST_TOKEN_ID, options.vocab_size), k=count)


_MAKERS: dict[Workload, Callable[[BenchOptions, str], Iterator[Session]]] = {
    Workload.random: _random,
    Workload.shared_prefix: _shared_prefix,
    Workload.multi_turn: _multi_turn,
    Workload.trace: _trace,
    Workload.disturbed: _random,
}
