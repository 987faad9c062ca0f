"""A load generator of its own process, so that neither its lag nor the test's is taken for the router's.

    python -m tests.faults.load PORT closed CLIENTS SECONDS
    python -m tests.faults.load PORT open REQUESTS_PER_SECOND SECONDS

Prints {"lag": seconds, "results": [[seconds since the start, status, seconds it took, Retry-After or null], …]}.
`lag` is what 99 of 100 timers of this process were late by, at most: what the machine took, not the router.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

BODY = json.dumps({"model": "tiny", "prompt": [5, 6, 7, 8, 9], "max_tokens": 4}).encode()
HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n" % len(BODY)
)
Result = tuple[float, int, float, str | None]


async def ask(port: int, start: float) -> Result:
    began = time.monotonic()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return began - start, 0, time.monotonic() - began, None
    try:
        writer.write(HEAD + BODY)
        answer = await reader.read()
    except ConnectionError:
        answer = b""
    finally:
        writer.close()
    lines = answer.split(b"\r\n\r\n")[0].lower().decode().split("\r\n")
    after = next((line.split(": ")[1] for line in lines if line.startswith("retry-after")), None)
    status = int(lines[0].split()[1]) if answer else 0
    return began - start, status, time.monotonic() - began, after


async def closed(port: int, clients: int, seconds: float) -> list[Result]:
    """So many clients that ask again as soon as they are answered."""
    start, results = time.monotonic(), list[Result]()

    async def client() -> None:
        while time.monotonic() < start + seconds:
            results.append(await ask(port, start))

    await asyncio.gather(*(client() for _ in range(clients)))
    return results


async def steady(port: int, rate: float, seconds: float) -> list[Result]:
    """So many requests a second, whatever becomes of the others."""
    start, tasks = time.monotonic(), list[asyncio.Task[Result]]()
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, start + number / rate - time.monotonic()))
        tasks.append(asyncio.create_task(ask(port, start)))
    return list(await asyncio.gather(*tasks))


async def watch_lag(lags: list[float]) -> None:
    while True:
        due = time.monotonic() + 0.005
        await asyncio.sleep(0.005)
        lags.append(time.monotonic() - due)


async def measure(port: int, mode: str, amount: float, seconds: float) -> dict[str, Any]:
    lags: list[float] = []
    watch = asyncio.create_task(watch_lag(lags))
    run = closed(port, int(amount), seconds) if mode == "closed" else steady(port, amount, seconds)
    results = await run
    watch.cancel()
    return {"lag": sorted(lags)[int(0.99 * len(lags))], "results": results}


def main(port: str, mode: str, amount: str, seconds: str) -> None:
    print(json.dumps(asyncio.run(measure(int(port), mode, float(amount), float(seconds)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
