"""Figures of one run at one server: latencies in milliseconds, throughput, goodput, and every error counted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tandem.cluster.bench.answer import Answer
from tandem.cluster.bench.load import Part


def percentile(ordered: Sequence[float], share: float) -> float:
    """Between two values in proportion, as numpy.percentile does by default. `share` is in 0…1."""
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclass(frozen=True, slots=True)
class Stats:
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float
    std: float  # of the population

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Stats | None:
        """In milliseconds; None of nothing."""
        if not seconds:
            return None
        ordered = sorted(value * 1e3 for value in seconds)
        mean = math.fsum(ordered) / len(ordered)
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in ordered) / len(ordered))
        p50, p90, p95, p99 = (percentile(ordered, share) for share in (0.5, 0.9, 0.95, 0.99))
        return cls(mean, p50, p90, p95, p99, ordered[-1], std)


@dataclass(slots=True)
class ErrorCount:
    count: int
    first: str


@dataclass(frozen=True, slots=True)
class Summary:
    """Latencies and tokens are those of the requests that succeeded."""

    requests: int  # sent, failed ones included
    failed: int
    errors: dict[str, ErrorCount]  # by kind
    duration: float  # seconds, from the first request's sending to the last one's end
    input_tokens: int
    cached_tokens: int  # of the input, where the server tells
    output_tokens: int
    request_throughput: float  # a second
    output_throughput: float  # tokens a second
    total_throughput: float  # … the prompts' counted too
    goodput: float | None  # requests a second that met every objective; None: no objectives
    good_share: float | None  # of all requests, failed ones included
    max_late: float  # seconds a request was sent behind its time, because of this client or --max-concurrency
    ttft: Stats | None
    itl: Stats | None
    tpot: Stats | None
    e2el: Stats | None

    @classmethod
    def of(cls, part: Part, objectives: Mapping[str, float]) -> Summary:
        good = [answer for answer in part.answers if answer.failure is None]
        meeting = sum(meets(answer, objectives) for answer in good)
        input_tokens = sum(answer.prompt_tokens for answer in good)
        output_tokens = sum(answer.tokens for answer in good)
        seconds = part.duration
        return cls(
            requests=len(part.answers),
            failed=len(part.answers) - len(good),
            errors=count_errors(part.answers),
            duration=seconds,
            input_tokens=input_tokens,
            cached_tokens=sum(answer.cached_tokens for answer in good),
            output_tokens=output_tokens,
            request_throughput=len(good) / seconds,
            output_throughput=output_tokens / seconds,
            total_throughput=(input_tokens + output_tokens) / seconds,
            goodput=meeting / seconds if objectives else None,
            good_share=meeting / len(part.answers) if objectives and part.answers else None,
            max_late=max((answer.sent - answer.due for answer in part.answers if answer.sent), default=0.0),
            ttft=Stats.of([answer.ttft for answer in good]),
            itl=Stats.of([wait for answer in good for wait in answer.waits(*part.window)]),
            tpot=Stats.of([answer.tpot for answer in good if answer.tpot is not None]),
            e2el=Stats.of([answer.e2el for answer in good]),
        )


def meets(answer: Answer, objectives: Mapping[str, float]) -> bool:
    """Whether a request stays within all objectives (ms). Its ITL is the 99th percentile of its own waits: a stall in
    one answer is not made good by the others. An answer of one delivery has no ITL and no TPOT, and meets both."""
    waits = sorted(answer.waits()) if "itl" in objectives else []
    seconds = {
        "ttft": answer.ttft,
        "itl": percentile(waits, 0.99) if waits else 0.0,
        "tpot": answer.tpot or 0.0,
        "e2el": answer.e2el,
    }
    return all(seconds[name] * 1e3 <= limit for name, limit in objectives.items())


def count_errors(answers: Sequence[Answer]) -> dict[str, ErrorCount]:
    """The most frequent kind first."""
    found: dict[str, ErrorCount] = {}
    for answer in answers:
        if answer.failure is not None:
            found.setdefault(answer.failure.kind, ErrorCount(0, answer.failure.message)).count += 1
    return dict(sorted(found.items(), key=lambda item: -item[1].count))
