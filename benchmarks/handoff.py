"""What the hand-off costs a request, and how much of it hides behind the prefill.

    python benchmarks/handoff.py MODEL --tokens 512,4000 --connectors shm,tcp --rounds 7 --save handoff.json

Three clusters of real processes on this machine, of which one works at a time: `local` (the decode worker prefills the
prompt itself), `pipelined` (1P1D whose prompts leave in parts, however short) and `whole` (in one piece, however long).
A round sends the same new prompt to each in turn and takes the times of the first two tokens. Medians over the rounds
of the differences within a round:

    first    TTFT(pipelined) - TTFT(local)                         what the reservation costs before the prefill
    second   t2(pipelined) - t2(local)                             … and the whole hand-off, until the stream goes on
    exposed  (t2 - t1)(whole or pipelined) - (t2 - t1)(local)      transfer that the client waits for
    hidden   1 - exposed(pipelined) / exposed(whole)

Each worker computes with one thread. Weights are random (--load-format dummy); MODEL is a directory with a config and
a tokenizer.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from tandem.cluster.local_redis import LocalRedis
from tandem.common.worker_config import KEY_VARIABLE

ONE_PIECE = 1 << 30  # tokens that no prompt has
START_TIMEOUT = 120.0  # seconds
FIRST_TOKEN_ID = 10  # leaves the special tokens out
VOCAB = 1000
WARM_UP = 4  # rounds that do not count


class Cluster:
    """Router, one D and, unless `local`, one P; ended with the stack."""

    kv_bytes = 64 << 20  # of each worker: room for few prompts, so that their blocks have been used before

    def __init__(self, stack: contextlib.ExitStack, model: str, connector: str, pipelined_from: int | None) -> None:
        """`pipelined_from`: None for no P at all."""
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-bench-")))
        redis = LocalRedis(directory / "redis.sock")
        stack.callback(redis.stop)
        redis.wait()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._environ = os.environ | {
            KEY_VARIABLE: secrets.token_hex(32), "TANDEM_REDIS_URL": redis.url, "OMP_NUM_THREADS": "1"
        }  # fmt: skip
        worker = [model, "--device", "cpu", "--load-format", "dummy", "--kv-connector", connector]
        worker += ["--kv-cache-memory-bytes", str(self.kv_bytes)]
        prefill = str(int(pipelined_from is not None))
        self._start(stack, "router", model, "--port", str(port), "--prefill", prefill, "--log-level", "error")
        self._start(stack, "decode", *worker)
        if pipelined_from is not None:
            self._start(stack, "prefill", *worker, threshold=pipelined_from)

    def _start(self, stack: contextlib.ExitStack, *arguments: str, threshold: int = 0) -> None:
        command = [sys.executable, __file__, "--role", str(threshold), *arguments]
        process = subprocess.Popen(command, env=self._environ)
        stack.callback(process.wait, 30)
        stack.callback(process.terminate)

    def wait(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self.url + "/readyz").status_code == 200:
                    return
            if time.monotonic() > deadline:
                raise SystemExit(f"{self.url} was not ready within {START_TIMEOUT:.0f} s")
            time.sleep(0.1)

    def ask(self, prompt: list[int]) -> tuple[float, float]:
        """Seconds until the first and until the second token."""
        body = {
            "model": "m", "prompt": prompt, "max_tokens": 3, "temperature": 0, "ignore_eos": True, "stream": True,
            "return_token_ids": True,
        }  # fmt: skip
        times: list[float] = []
        started = time.perf_counter()
        with httpx.stream("POST", self.url + "/v1/completions", json=body, timeout=300.0) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                    times.append(time.perf_counter() - started)
        return times[0], times[1]


@dataclass(frozen=True, slots=True)
class Times:
    """One round, seconds: (first token, second token)."""

    local: tuple[float, float]
    pipelined: tuple[float, float]
    whole: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Row:
    """Milliseconds."""

    connector: str
    tokens: int
    ttft_local: float
    first: float
    second: float
    exposed_whole: float
    exposed_pipelined: float
    hidden: float  # share
    rounds: list[Times]


def summarize(connector: str, tokens: int, rounds: list[Times]) -> Row:
    def median(values: Iterator[float]) -> float:
        return 1000 * statistics.median(values)

    def exposed(name: str) -> float:
        gaps = ((getattr(times, name), times.local) for times in rounds)
        return median(there[1] - there[0] - (local[1] - local[0]) for there, local in gaps)

    whole, pipelined = exposed("whole"), exposed("pipelined")
    return Row(
        connector=connector,
        tokens=tokens,
        ttft_local=median(times.local[0] for times in rounds),
        first=median(times.pipelined[0] - times.local[0] for times in rounds),
        second=median(times.pipelined[1] - times.local[1] for times in rounds),
        exposed_whole=whole,
        exposed_pipelined=pipelined,
        hidden=1 - pipelined / whole,
        rounds=rounds,
    )


def measure(model: str, connector: str, lengths: list[int], rounds: int) -> Iterator[Row]:
    with contextlib.ExitStack() as stack:
        local = Cluster(stack, model, connector, None)
        pipelined = Cluster(stack, model, connector, 0)
        whole = Cluster(stack, model, connector, ONE_PIECE)
        clusters = {"local": local, "pipelined": pipelined, "whole": whole}
        for cluster in clusters.values():
            cluster.wait()
        rng = random.Random(7)
        for length in lengths:
            times: list[Times] = []
            for number in range(-WARM_UP, rounds):
                prompt = rng.choices(range(FIRST_TOKEN_ID, VOCAB), k=length)
                order = sorted(clusters, key=lambda _: rng.random())
                answers = {name: clusters[name].ask(prompt) for name in order}
                if number >= 0:
                    times.append(Times(**answers))
            yield summarize(connector, length, times)


def run_role(threshold: int, arguments: list[str]) -> None:
    """`tandem ROLE …`, with another threshold for pipelining."""
    from tandem.cluster.cli import main as tandem
    from tandem.prefill_worker import service

    service.PrefillLimits = functools.partial(service.PrefillLimits, pipelined_from=threshold)  # pyright: ignore
    sys.argv = ["tandem", *arguments, *(["--served-model-name", "m"] if arguments[0] == "router" else [])]
    tandem()


def main() -> int:
    if sys.argv[1:2] == ["--role"]:
        run_role(int(sys.argv[2]), sys.argv[3:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", default="512,4000")
    parser.add_argument("--connectors", default="shm,tcp")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=Cluster.kv_bytes)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    Cluster.kv_bytes = arguments.kv_cache_memory_bytes
    rows: list[Row] = []
    names = [name for name in Row.__dataclass_fields__ if name != "rounds"]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for connector in arguments.connectors.split(","):
        for row in measure(arguments.model, connector, [int(n) for n in arguments.tokens.split(",")], arguments.rounds):
            rows.append(row)
            values = [getattr(row, name) for name in names]
            print(f"| {' | '.join(f'{v:.2f}' if isinstance(v, float) else str(v) for v in values)} |", flush=True)
    if arguments.save:
        arguments.save.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
