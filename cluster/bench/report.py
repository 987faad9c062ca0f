"""What a measurement says: medians, spreads and ratios over the rounds, on the terminal and as JSON."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table

from tandem import __version__
from tandem.cluster.bench.answer import Answer
from tandem.cluster.bench.metrics import Stats, Summary
from tandem.cluster.bench.run import Results, Run

WIDTH = 110  # characters

_LATENCIES = ("ttft", "itl", "tpot", "e2el")
_STATS = tuple(field.name for field in fields(Stats))
_RATES = {
    "requests/s": "request_throughput",
    "output tokens/s": "output_throughput",
    "total tokens/s": "total_throughput",
    "goodput, requests/s": "goodput",
}
_SHOWN = (*_RATES, "TTFT p50 ms", "TTFT p99 ms", "ITL p50 ms", "ITL p99 ms", "TPOT p50 ms", "E2EL p50 ms")


@dataclass(frozen=True, slots=True)
class Spread:
    """Over the rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        known = [value for value in values if value is not None]
        return cls(statistics.median(known), min(known), max(known)) if known else None

    def __str__(self) -> str:
        single = self.min == self.max
        return _number(self.median) + ("" if single else f" ({_number(self.min)}–{_number(self.max)})")


@dataclass(frozen=True, slots=True)
class Row:
    """One measure of all servers at one point; None where nothing was measured. A ratio is of the first server to
    another, of each round by itself: in a round they run next to each other."""

    point: str
    part: str
    measure: str
    values: dict[str, Spread | None]
    ratios: dict[str, Spread | None]


def _read(summary: Summary, measure: str) -> float | None:
    """`measure` is a key of `_RATES`, or "TTFT p50 ms"."""
    if measure in _RATES:
        return getattr(summary, _RATES[measure])
    name, stat, _ = measure.split()
    stats: Stats | None = getattr(summary, name.lower())
    return None if stats is None else getattr(stats, stat)


def comparison(results: Results) -> list[Row]:
    """A row for each point, part and measure, in this order; latencies in milliseconds."""
    measures = [*_RATES, *(f"{name.upper()} {stat} ms" for name in _LATENCIES for stat in _STATS)]
    found: list[Row] = []
    for point in dict.fromkeys(run.point for run in results.runs):
        runs = [run for run in results.runs if run.point == point]
        found += (_row(results, runs, part, measure) for part in runs[0].parts for measure in measures)
    return found


def _row(results: Results, runs: Sequence[Run], part: str, measure: str) -> Row:
    series = {
        server.name: {run.round: _read(run.parts[part], measure) for run in runs if run.server == server.name}
        for server in results.servers
    }
    first, *others = series
    ratios = {
        other: Spread.of(_ratio(value, series[other].get(number)) for number, value in series[first].items())
        for other in others
    }
    return Row(
        runs[0].point, part, measure, {name: Spread.of(found.values()) for name, found in series.items()}, ratios
    )


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def present(results: Results) -> None:
    """Print the tables, and write --save."""
    rows = comparison(results)
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    if results.options.sweep is None:
        console.print(_latency_table(rows))
    console.print(_comparison_table(results, rows))
    for line in _notes(results):
        console.print(line, markup=False, soft_wrap=True)
    if results.options.save is not None:
        text = json.dumps(to_json(results, rows), indent=1, default=str, allow_nan=False)
        results.options.save.write_text(text + "\n", encoding="utf-8")


def _latency_table(rows: Sequence[Row]) -> Table:
    table = Table("medians, ms", *_STATS, box=None, header_style="bold")
    cells = {(name, row.part, row.measure): value for row in rows for name, value in row.values.items() if value}
    for name, part in dict.fromkeys((name, part) for name, part, _ in cells):
        for latency in map(str.upper, _LATENCIES):
            found = [cells.get((name, part, f"{latency} {stat} ms")) for stat in _STATS]
            if any(found):
                numbers = (_number(value.median) if value else "–" for value in found)
                table.add_row(f"{name}{'' if part == 'all' else f' {part}'} {latency}", *numbers)
    return table


def _comparison_table(results: Results, rows: Sequence[Row]) -> Table:
    first, *others = [server.name for server in results.servers]
    table = Table("", "median (min–max)", first, *others, *(f"{first} / {other}" for other in others), box=None)
    table.header_style = "bold"
    for row in rows:
        cells = [*row.values.values(), *row.ratios.values()]
        if row.measure in _SHOWN and any(cells):
            where = " ".join(filter(None, (row.point, "" if row.part == "all" else row.part)))
            table.add_row(where, row.measure, *("–" if cell is None else str(cell) for cell in cells))
    return table


def _notes(results: Results) -> Iterator[str]:
    for run in results.runs:
        for part, summary in run.parts.items():
            for kind, error in summary.errors.items():
                where = " ".join(filter(None, (run.server, run.point, f"round {run.round + 1}", part)))
                yield f"{where}: {error.count} of {summary.requests} failed: {kind}: {error.first}"
    for server in results.servers:
        yield from _about(server.name, [run for run in results.runs if run.server == server.name])
    tokens = sum(summary.output_tokens for run in results.runs for summary in run.parts.values())
    if tokens:
        seconds = sum(run.client_cpu for run in results.runs)
        yield f"client: {seconds / tokens * 1e6:.0f} µs of processor time an output token"


def _about(server: str, runs: Sequence[Run]) -> Iterator[str]:
    summaries = [summary for run in runs for summary in run.parts.values()]
    prompts = sum(summary.input_tokens for summary in summaries)
    if cached := sum(summary.cached_tokens for summary in summaries):
        yield f"{server}: {cached / prompts:.0%} of {prompts:,} prompt tokens came from its cache"
    late = max((summary.max_late for summary in summaries), default=0.0)
    if late > 0.01:
        yield f"{server}: requests were sent up to {late:.2f} s late, held by --max-concurrency or a busy client"
    if ratio := Spread.of(disturbance(run) for run in runs):
        yield f"{server}: ITL p99 of the disturbed streams : of the same alone = {ratio}"


def disturbance(run: Run) -> float | None:
    """ITL p99 of the disturbed streams to that of as many alone."""
    if "disturbed" not in run.parts:
        return None
    return _ratio(*(_read(run.parts[part], "ITL p99 ms") for part in ("disturbed", "alone")))


def _number(value: float) -> str:
    """Three significant figures or more."""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f}"


def to_json(results: Results, rows: Sequence[Row]) -> dict[str, object]:
    """Everything but the API key. Latencies in milliseconds, other times in seconds."""
    options = asdict(results.options)
    del options["api_key"]
    options["burstiness"] = str(results.options.burstiness)  # JSON has no infinity
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"tandem": __version__, "python": platform.python_version(), "platform": platform.platform()},
        "options": options,
        "servers": [asdict(server) for server in results.servers],
        "runs": [_run_json(run) for run in results.runs],
        "comparison": [asdict(row) for row in rows],
    }


def _run_json(run: Run) -> dict[str, object]:
    written: dict[str, object] = {name: getattr(run, name) for name in ("server", "point", "round", "client_cpu")}
    written["parts"] = {name: asdict(summary) for name, summary in run.parts.items()}
    if run.answers:
        written["requests"] = {part: [_answer_json(answer) for answer in found] for part, found in run.answers.items()}
    return written


def _answer_json(answer: Answer) -> dict[str, object]:
    """`due` and `sent` are readings of a clock, for differences only; `times` count from `sent`."""
    names = ("due", "sent", "prompt_tokens", "cached_tokens", "tokens")
    return {
        **{name: getattr(answer, name) for name in names},
        "times": [round(at - answer.sent, 6) for at in answer.times],
        "counts": answer.counts.tolist(),
        "failure": answer.failure._asdict() if answer.failure else None,
    }
