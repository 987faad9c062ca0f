"""What a request costs the router: processor time of its process, against the number of clients at a time.

    python benchmarks/router_cpu.py --save router_cpu.json --plot router_cpu.svg

Starts `tandem serve` with the demo model on a free port, and sends random prompts by the closed loop of `tandem bench`,
short and long answers. A request is parsed, admitted and routed once, and each of its tokens is passed on once, so its
cost is expected not to depend on how many others are under way: a flat line, at the median of all points with answers
of that length. With few clients it is more: each token wakes the router up by itself, while those of several requests
that a step brings share that; so wakes are counted, too. What a token costs is the slope between the lengths. A round
goes through all points; figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from picture import Curve, Panel, draw
from server import processor_time, router_listening_on, serving, wakes

from tandem.cluster.bench.options import BenchOptions
from tandem.cluster.bench.report import Spread
from tandem.cluster.bench.run import Server, find, measure

INPUT_LEN = 64  # tokens
KV_BYTES = 64 << 20  # of each worker
IDLE = 5.0  # seconds


@dataclass(frozen=True, slots=True)
class Point:
    """Each list has an element for each round."""

    clients: int
    output_len: int  # tokens
    requests: int
    cpu: list[float] = field(default_factory=list[float])  # seconds of the router, a request
    rate: list[float] = field(default_factory=list[float])  # requests/s
    wakes: list[float] = field(default_factory=list[float])  # how often the router slept and was woken, a request

    @property
    def milliseconds(self) -> Spread:
        return Spread(*(1e3 * pick(self.cpu) for pick in (statistics.median, min, max)))


@dataclass(frozen=True, slots=True)
class Expected:
    """The same for every number of clients."""

    cpu: dict[int, float]  # seconds a request, by the length of its answer

    @classmethod
    def of(cls, points: list[Point]) -> Expected:
        lengths = sorted({point.output_len for point in points})
        cpu = {n: [statistics.median(point.cpu) for point in points if point.output_len == n] for n in lengths}
        return cls({length: statistics.median(medians) for length, medians in cpu.items()})

    @property
    def token(self) -> float:
        """Seconds for one more output token; 0.0 where all answers are equally long."""
        short, long = min(self.cpu), max(self.cpu)
        return (self.cpu[long] - self.cpu[short]) / max(1, long - short)

    @property
    def request(self) -> float:
        """Seconds for a request without output."""
        short = min(self.cpu)
        return self.cpu[short] - short * self.token

    def __str__(self) -> str:
        return f"{self.request * 1e3:.2f} ms a request and {self.token * 1e6:.0f} µs an output token"


def add_round(point: Point, server: Server, pid: int) -> None:
    """Raises SystemExit if a request fails."""
    seed = f"{point.clients}/{point.output_len}/{len(point.cpu)}"  # of its own: nothing is answered from a cache
    options = BenchOptions(
        requests=point.requests, concurrency=point.clients, input_len=INPUT_LEN, output_len=point.output_len, warmup=0
    )
    began, woken = processor_time(pid), wakes(pid)
    part = measure(server, options, seed)[0]["all"]
    spent, woken = processor_time(pid) - began, wakes(pid) - woken
    failures = [answer.failure for answer in part.answers if answer.failure]
    if failures:
        raise SystemExit(f"{len(failures)} of {point.requests} requests failed; the first: {failures[0].message}")
    point.cpu.append(spent / point.requests)
    point.rate.append(point.requests / part.duration)
    point.wakes.append(woken / point.requests)


def idle(pid: int) -> float:
    """Share of a core that the router takes without requests."""
    began = processor_time(pid)
    time.sleep(IDLE)
    return (processor_time(pid) - began) / IDLE


HEADINGS = ("clients", "output tokens", "requests", "CPU ms a request", "least – most", "µs an output token")
HEADINGS += (": expected", "wakes an output token", "requests/s", "router's share of a core")


def line(point: Point, expected: Expected) -> str:
    ms, rate, woken = point.milliseconds, statistics.median(point.rate), statistics.median(point.wakes)
    cells = [f"{point.clients}", f"{point.output_len}", f"{point.requests}", f"{ms.median:.2f}"]
    cells += [f"{ms.min:.2f} – {ms.max:.2f}", f"{ms.median * 1e3 / point.output_len:.0f}"]
    cells += [f"{ms.median / 1e3 / expected.cpu[point.output_len]:.2f}", f"{woken / point.output_len:.2f}"]
    cells += [f"{rate:.1f}", f"{ms.median / 1e3 * rate:.0%}"]
    return f"| {' | '.join(cells)} |"


def plot(points: list[Point], expected: Expected, path: Path) -> None:
    curves = list[Curve]()
    for length, cpu in expected.cpu.items():
        chosen = [point for point in points if point.output_len == length]
        measured = [point.milliseconds for point in chosen]
        label, line_label = f"{length} output tokens", f"expected: constant, {cpu * 1e3:.2f} ms (the points' median)"
        curves.append(Curve(label, [p.clients for p in chosen], measured, [cpu * 1e3] * len(chosen), line_label))
    title = f"Router: {expected}; {INPUT_LEN} prompt tokens; bars: least to most"
    draw([Panel("clients at a time", "CPU of the router, ms a request", curves, log_y=False)], title, path)


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=integers, default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--output-lens", type=integers, default=[8, 64], help="tokens of the answers")
    parser.add_argument("--requests", type=int, default=48, help="of a point, in a round; at least two a client")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", type=Path, help="also write the points there, as JSON")
    parser.add_argument("--plot", type=Path, help="also draw them there: PNG, SVG or PDF")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    points = [
        Point(clients, length, max(arguments.requests, 2 * clients))
        for length in arguments.output_lens
        for clients in arguments.clients
    ]
    with serving("--kv-cache-memory-bytes", str(KV_BYTES)) as url:
        server, pid = find("server", url, BenchOptions()), router_listening_on(url)
        if pid is None:
            raise SystemExit("this system does not tell which process is the router")
        add_round(Point(8, max(arguments.output_lens), arguments.requests), server, pid)  # does not count
        unasked = idle(pid)
        for _ in range(arguments.rounds):
            for point in points:
                add_round(point, server, pid)
    expected, load = Expected.of(points), os.getloadavg()[0]
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    print("\n".join(line(point, expected) for point in points))
    print(f"\nexpected: {expected}, whatever the number of clients; idle: {unasked:.1%} of a core; load {load:.1f}")
    if arguments.save:
        result = {
            "expected": asdict(expected),
            "idle": unasked,
            "load": load,
            "points": [asdict(point) for point in points],
        }
        arguments.save.write_text(json.dumps(result, indent=1))
    if arguments.plot:
        plot(points, expected, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
