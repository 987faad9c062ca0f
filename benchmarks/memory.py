"""Whether memory stays flat: the resident size of every process of a local `tandem serve` while requests go by.

    python benchmarks/memory.py --url http://127.0.0.1:8000 --requests 2000 --router-pid PID

Sends the requests in parts, each by serve_load.py's closed loop, and prints a row of MiB behind each part.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import replace

import httpx
import psutil
from serve_load import Load, add_load_flags, load_from, run

PARTS = 8


def processes(url: str, router_pid: int | None) -> dict[str, psutil.Process]:
    workers = httpx.get(f"{url}/status", timeout=10.0).raise_for_status().json()["workers"]
    found = {worker["name"]: psutil.Process(worker["pid"]) for worker in workers}
    return found | ({"router": psutil.Process(router_pid)} if router_pid else {})


def router_listening_on(url: str) -> int | None:
    """The process behind the port; None where the system does not tell."""
    port = httpx.URL(url).port
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and tuple(connection.laddr)[1:] == (port,):
            return connection.pid
    return None


def row(label: str, watched: dict[str, psutil.Process]) -> None:
    sizes = [f"{process.memory_info().rss / 2**20:.0f}" for process in watched.values()]
    print(f"| {' | '.join([label, *sizes])} |", flush=True)


def watch(url: str, load: Load, router_pid: int | None) -> None:
    watched = processes(url, router_pid or router_listening_on(url))
    print(f"| requests | {' | '.join(watched)} |\n|{'---|' * (len(watched) + 1)}")
    row("0", watched)
    for part in range(PARTS):
        piece = replace(load, requests=load.requests // PARTS, seed=load.seed + part)
        result = asyncio.run(run(url, piece))
        if result.failed:
            raise SystemExit(f"{result.failed} requests failed; the first: {result.first_error}")
        row(str(piece.requests * (part + 1)), watched)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--router-pid", type=int, help="default: whoever listens on the URL's port")
    add_load_flags(parser)
    arguments = parser.parse_args()
    watch(arguments.url, load_from(arguments), arguments.router_pid)
    return 0


if __name__ == "__main__":
    sys.exit(main())
