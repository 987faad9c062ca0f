"""The same load on several running servers in alternating rounds; medians over the rounds, and their ratios.

    python benchmarks/compare.py tandem=http://127.0.0.1:8000 vllm=http://127.0.0.1:8100 --rounds 3 --save result.json

The first server is compared with each of the others. Rounds alternate in order, so that a machine which slows down or
speeds up on the way favours nobody; every round has its own prompts, so that no server answers from its prefix cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

from serve_load import Load, Result, add_load_flags, load_from, run

# Column → how to read it from a result, and whether more is better.
COLUMNS = {
    "req/s": (lambda result: result.requests_per_second, True),
    "TTFT p50 ms": (lambda result: result.ttft.p50 * 1e3, False),
    "TTFT p99 ms": (lambda result: result.ttft.p99 * 1e3, False),
    "TPOT p50 ms": (lambda result: result.tpot.p50 * 1e3, False),
    "ITL p50 ms": (lambda result: result.itl.p50 * 1e3, False),
    "ITL p99 ms": (lambda result: result.itl.p99 * 1e3, False),
}


def measure(servers: dict[str, str], load: Load, rounds: int, api_key: str) -> dict[str, list[Result]]:
    results: dict[str, list[Result]] = {name: [] for name in servers}
    for number in range(rounds):
        order = list(servers) if number % 2 == 0 else list(servers)[::-1]
        for name in order:
            result = asyncio.run(run(servers[name], replace(load, seed=load.seed + number), api_key))
            print(f"round {number + 1} {name}: {result.requests_per_second:.2f} req/s", file=sys.stderr)
            results[name].append(result)
    return results


def table(results: dict[str, list[Result]]) -> str:
    """Markdown; the ratio columns say how the first server does against each other one (above 1: better)."""
    first, *others = results
    head = ["", *results, *(f"{first} : {name}" for name in others)]
    rows = [head, ["---"] * len(head)]
    for column, (read, more_is_better) in COLUMNS.items():
        medians = {name: statistics.median(map(read, series)) for name, series in results.items()}
        ratios = [medians[first] / medians[name] for name in others]
        ratios = ratios if more_is_better else [1 / ratio for ratio in ratios]
        rows.append([column, *(f"{value:.2f}" for value in medians.values()), *(f"{ratio:.2f}" for ratio in ratios)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def parse_servers(pairs: list[str]) -> dict[str, str]:
    servers = {name: url for name, _, url in (pair.partition("=") for pair in pairs)}
    if not all(servers.values()):
        raise SystemExit("name each server as NAME=URL")
    return servers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="+", metavar="NAME=URL")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--save", type=Path, help="write every round's result there, as JSON")
    add_load_flags(parser)
    arguments = parser.parse_args()
    load = load_from(arguments)
    results = measure(parse_servers(arguments.servers), load, arguments.rounds, arguments.api_key)
    if arguments.save:
        rounds = {name: [asdict(result) for result in series] for name, series in results.items()}
        arguments.save.write_text(json.dumps({"load": asdict(load), "rounds": rounds}, indent=2), encoding="utf-8")
    print(table(results))
    return 1 if any(result.failed for series in results.values() for result in series) else 0


if __name__ == "__main__":
    sys.exit(main())
