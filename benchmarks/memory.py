"""Whether memory stays flat: the resident size of every process of a local `tandem serve` while requests go by.

    python benchmarks/memory.py --url http://127.0.0.1:8000 --requests 2000 --router-pid PID

Sends the requests in parts, each by the closed loop of `tandem bench`, and prints a row of MiB behind each part.
"""

from __future__ import annotations

import argparse
import sys

import httpx
import psutil
from server import router_listening_on

from tandem.cluster.bench.options import BenchOptions
from tandem.cluster.bench.run import Server, find, measure

PARTS = 8


def processes(url: str, router_pid: int | None) -> dict[str, psutil.Process]:
    workers = httpx.get(f"{url}/status", timeout=10.0).raise_for_status().json()["workers"]
    found = {worker["name"]: psutil.Process(worker["pid"]) for worker in workers}
    return found | ({"router": psutil.Process(router_pid)} if router_pid else {})


def row(label: str, watched: dict[str, psutil.Process]) -> None:
    sizes = [f"{process.memory_info().rss / 2**20:.0f}" for process in watched.values()]
    print(f"| {' | '.join([label, *sizes])} |", flush=True)


def watch(server: Server, options: BenchOptions, router_pid: int | None) -> None:
    watched = processes(server.url, router_pid or router_listening_on(server.url))
    print(f"| requests | {' | '.join(watched)} |\n|{'---|' * (len(watched) + 1)}")
    row("0", watched)
    for part in range(PARTS):
        parts, _ = measure(server, options, f"{options.seed}/{part}")
        failures = [answer.failure for answer in parts["all"].answers if answer.failure]
        if failures:
            raise SystemExit(f"{len(failures)} requests failed; the first: {failures[0].message}")
        row(str(len(parts["all"].answers) * (part + 1)), watched)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--router-pid", type=int, help="default: whoever listens on the URL's port")
    for name, default in {"concurrency": 8, "requests": 32, "input_len": 512, "output_len": 64, "seed": 7}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--api-key")
    given = parser.parse_args()
    options = BenchOptions(
        requests=max(1, given.requests // PARTS),
        concurrency=given.concurrency,
        input_len=given.input_len,
        output_len=given.output_len,
        seed=given.seed,
        api_key=given.api_key,
    )
    watch(find("server", given.url, options), options, given.router_pid)
    return 0


if __name__ == "__main__":
    sys.exit(main())
