"""A closed-loop load on any OpenAI-compatible server, timed at the client: every worker sends its next request when
its last one ended. Prompts are random token ids, the same for every server at the same seed.

    python benchmarks/serve_load.py --url http://127.0.0.1:8000 --concurrency 8 --requests 32

Prints one JSON object. Times are seconds: TTFT from sending to the first chunk, ITL between chunks, TPOT from the
first chunk to the last divided by the tokens in between (by the server's own count).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise

import httpx

FIRST_TOKEN_ID = 10  # leaves the special tokens out
TIMEOUT = httpx.Timeout(300.0, connect=10.0)


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent to every server alike."""

    concurrency: int = 8
    requests: int = 32
    input_len: int = 512  # tokens
    output_len: int = 64  # tokens, exactly: end-of-sequence is ignored
    vocab_size: int = 1000  # prompts are drawn from the ids below it
    seed: int = 7


@dataclass(slots=True)
class Timing:
    """One request. `chunks` are the times at which a part of the answer came, from the moment of sending."""

    chunks: list[float] = field(default_factory=list[float])
    tokens: int = 0
    error: str = ""

    @property
    def tpot(self) -> float:
        return (self.chunks[-1] - self.chunks[0]) / (self.tokens - 1)


@dataclass(frozen=True, slots=True)
class Spread:
    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        ordered = sorted(values)
        ranks = (ordered[round(share * (len(ordered) - 1))] for share in (0.5, 0.9, 0.99))
        return cls(statistics.fmean(ordered), *ranks)


@dataclass(frozen=True, slots=True)
class Result:
    url: str
    model: str
    duration: float
    requests_per_second: float
    output_tokens_per_second: float
    ttft: Spread
    itl: Spread
    tpot: Spread
    failed: int
    first_error: str


def make_prompts(load: Load) -> list[list[int]]:
    rng = random.Random(load.seed)
    ids = range(FIRST_TOKEN_ID, load.vocab_size)
    return [rng.choices(ids, k=load.input_len) for _ in range(load.requests)]


async def stream_one(client: httpx.AsyncClient, model: str, prompt: list[int], output_len: int) -> Timing:
    """Errors end up in the timing: a load that fails in part is a result too."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_len,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    timing = Timing()
    began = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                timing.error = (
                    f"status {response.status_code}: {(await response.aread())[:300].decode(errors='replace')}"
                )
                return timing
            async for line in response.aiter_lines():
                take_event(timing, line, began)
    except httpx.HTTPError as exc:
        timing.error = f"{type(exc).__name__}: {exc}"
    if not timing.error and (timing.tokens != output_len or not timing.chunks):
        timing.error = f"{timing.tokens} tokens in {len(timing.chunks)} chunks instead of {output_len} tokens"
    return timing


def take_event(timing: Timing, line: str, began: float) -> None:
    """One line of the event stream."""
    data = line.removeprefix("data:").strip()
    if not line.startswith("data:") or data == "[DONE]":
        return
    event = json.loads(data)
    if "error" in event:
        timing.error = str(event["error"])
    if event.get("choices"):
        timing.chunks.append(time.perf_counter() - began)
    if event.get("usage"):
        timing.tokens = event["usage"]["completion_tokens"]


async def run(url: str, load: Load, api_key: str = "") -> Result:
    """Raises httpx.HTTPError when the server does not answer at all."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=load.concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT, headers=headers, limits=limits) as client:
        models = (await client.get("/v1/models")).raise_for_status().json()
        model: str = models["data"][0]["id"]
        warm_up = await stream_one(client, model, make_prompts(load)[0][::-1], load.output_len)
        if warm_up.error:
            raise SystemExit(f"{url} fails its first request: {warm_up.error}")
        queue = iter(make_prompts(load))  # shared: each worker takes the next prompt
        timings: list[Timing] = []

        async def work() -> None:
            for prompt in queue:
                timings.append(await stream_one(client, model, prompt, load.output_len))

        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(load.concurrency):
                group.create_task(work())
        return summarize(url, model, timings, time.perf_counter() - began)


def summarize(url: str, model: str, timings: list[Timing], duration: float) -> Result:
    good = [timing for timing in timings if not timing.error]
    errors = [timing.error for timing in timings if timing.error]
    if not good:
        raise SystemExit(f"every request to {url} failed; the first: {errors[0]}")
    gaps = [later - earlier for timing in good for earlier, later in pairwise(timing.chunks)]
    return Result(
        url=url,
        model=model,
        duration=duration,
        requests_per_second=len(good) / duration,
        output_tokens_per_second=sum(timing.tokens for timing in good) / duration,
        ttft=Spread.of([timing.chunks[0] for timing in good]),
        itl=Spread.of(gaps or [0.0]),
        tpot=Spread.of([timing.tpot for timing in good if timing.tokens > 1] or [0.0]),
        failed=len(errors),
        first_error=errors[0] if errors else "",
    )


def add_load_flags(parser: argparse.ArgumentParser) -> None:
    for name, default in asdict(Load()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--api-key", default="")


def load_from(arguments: argparse.Namespace) -> Load:
    return Load(**{name: getattr(arguments, name) for name in asdict(Load())})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    add_load_flags(parser)
    arguments = parser.parse_args()
    load = load_from(arguments)
    result = asyncio.run(run(arguments.url, load, arguments.api_key))
    print(json.dumps({"load": asdict(load), "result": asdict(result)}, indent=2))
    return 1 if result.failed else 0


if __name__ == "__main__":
    sys.exit(main())
