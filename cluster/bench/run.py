"""Rounds over servers and points: who is measured when, and with which seed."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tandem.cluster.bench.answer import Answer
from tandem.cluster.bench.client import Client, get
from tandem.cluster.bench.load import Load, Part
from tandem.cluster.bench.metrics import Summary
from tandem.cluster.bench.options import BenchOptions, check
from tandem.cluster.bench.sweep import Point, points, reach
from tandem.cluster.bench.workload import sessions
from tandem.common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Server:
    name: str
    url: str
    model: str


@dataclass(frozen=True, slots=True)
class Run:
    """One server, measured once."""

    server: str
    point: str
    round: int  # from 0
    parts: dict[str, Summary]
    client_cpu: float  # seconds of processor time of this process, without the warm-up
    answers: dict[str, list[Answer]]  # by part; none unless they are to be saved


@dataclass(frozen=True, slots=True)
class Results:
    options: BenchOptions
    servers: list[Server]
    runs: list[Run] = field(default_factory=list[Run])

    @property
    def failed(self) -> int:
        return sum(summary.failed for run in self.runs for summary in run.parts.values())


def bench(options: BenchOptions) -> int:
    """Measure, report, and return the exit code: 1 if any request failed. Raises ConfigError, DeadlineExceeded.

    What was measured before an error or an interruption is reported all the same.
    """
    from tandem.cluster.bench import plot, report

    curve = points(options)
    for point in curve:
        check(point.options)
    next(sessions(options, ""))  # a trace that cannot be read is told now
    if options.plot is not None:
        plot.require()
    servers = [find(name, url, options) for name, url in parse_servers(options.server_arguments).items()]
    results = Results(options, servers)
    try:
        measure_all(results, curve)
    finally:
        if results.runs:
            report.present(results)
            if options.plot is not None:
                plot.draw(results, options.plot)
    return 1 if results.failed else 0


def parse_servers(arguments: list[str]) -> dict[str, str]:
    """["a=http://x", "b=http://y"] → name to URL; one may go without a name. Raises ConfigError."""
    if len(arguments) == 1 and not arguments[0].partition("://")[0].count("="):
        return {"server": arguments[0].rstrip("/")}
    servers: dict[str, str] = {}
    for argument in arguments:
        name, _, url = argument.partition("=")
        url = url.rstrip("/")
        if not name or "://" not in url or name in servers:
            raise ConfigError(f"{argument!r}: name each server once, as NAME=URL")
        if url in servers.values():
            raise ConfigError(
                f"{argument!r} is named twice: the second run would be answered from the first one's cache"
            )
        servers[name] = url
    return servers


def find(name: str, url: str, options: BenchOptions) -> Server:
    """Ask for its model. Raises ConfigError when nothing answers there."""
    if options.model is not None:
        return Server(name, url, options.model)
    models = get(f"{url.removesuffix('/v1')}/v1/models", options.api_key)
    try:
        return Server(name, url, str(models["data"][0]["id"]))
    except (KeyError, IndexError, TypeError) as exc:
        raise ConfigError(f"{url} names no model under /v1/models; give --model") from exc


def measure_all(results: Results, curve: Sequence[Point]) -> None:
    """In one round every server gets the same prompts; the order turns round by round, so that a machine which slows
    down on the way favours nobody. A seed is used once, so no server answers from what an earlier run left behind."""
    options = results.options
    for index, point in enumerate(curve):
        if point.pools is not None:
            reach(point.pools, results.servers[0].url, options.api_key)
        for number in range(options.rounds):
            seed = f"{options.seed}/{index}/{number}"
            for server in results.servers if number % 2 == 0 else results.servers[::-1]:
                parts, cpu = measure(server, point.options, seed)
                summaries = {name: Summary.of(part, options.objectives) for name, part in parts.items()}
                answers = {name: part.answers for name, part in parts.items()} if options.save_requests else {}
                results.runs.append(Run(server.name, point.label, number, summaries, cpu, answers))
                _tell(results.runs[-1])


def measure(server: Server, options: BenchOptions, seed: str) -> tuple[dict[str, Part], float]:
    """One run, and the seconds of processor time it took here. Raises ConfigError when the warm-up fails."""

    async def run() -> tuple[dict[str, Part], float]:
        async with Client(server.url, options.api_key, options.request_timeout) as client:
            load = Load(client, options, server.model)
            await load.warm_up(seed)
            began = time.process_time()
            return await load.run(seed), time.process_time() - began

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        try:
            return runner.run(run())
        except ConfigError as exc:
            raise ConfigError(f"{server.name} at {server.url}: {exc.message}") from exc


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's where it is installed: half the cost a token."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def _tell(run: Run) -> None:
    """One line on stderr behind each run."""
    point = f"{run.point} " if run.point else ""
    parts = (
        f"{name}: {summary.requests} requests, {summary.failed} failed, {summary.request_throughput:.2f} good a second"
        for name, summary in run.parts.items()
    )
    print(f"{point}round {run.round + 1} {run.server}: {'; '.join(parts)}", file=sys.stderr, flush=True)
