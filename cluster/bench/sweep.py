"""The points of a curve: the same run under changed options, or at another size of a live Tandem."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from tandem.cluster.bench.client import get
from tandem.cluster.bench.options import BenchOptions
from tandem.common.errors import ConfigError, DeadlineExceeded
from tandem.common.worker_config import Role

SCALE_WITHIN = 600.0  # seconds
SEEN_WITHIN = 60.0  # seconds until the router knows the workers that the controller calls ready
TICK = 0.25  # seconds


@dataclass(frozen=True, slots=True)
class Point:
    label: str  # as given, "" where nothing is swept
    options: BenchOptions
    pools: dict[Role, int] | None = None  # to be reached before measuring


def points(options: BenchOptions) -> list[Point]:
    """Raises ConfigError."""
    if options.sweep is None:
        return [Point("", options)]
    name, _, values = options.sweep.partition("=")
    make = _KINDS.get(name)
    labels = [label.strip() for label in values.split(",")]
    if make is None or not all(labels):
        raise ConfigError(f"--sweep {options.sweep}: write concurrency=1,2,4 or rate=0.5,1 or workers=1p1d,2p1d")
    return [make(options, label) for label in labels]


def _concurrency(options: BenchOptions, label: str) -> Point:
    if not label.isdecimal() or int(label) < 1:
        raise ConfigError(f"--sweep concurrency={label}: expected whole numbers from 1")
    return Point(label, replace(options, concurrency=int(label)))


def _rate(options: BenchOptions, label: str) -> Point:
    if not re.fullmatch(r"\d*\.?\d+", label) or float(label) <= 0:
        raise ConfigError(f"--sweep rate={label}: expected requests a second, above 0")
    return Point(label, replace(options, request_rate=float(label)))


def _workers(options: BenchOptions, label: str) -> Point:
    from tandem.cluster.scale import parse_sizes

    match = re.fullmatch(r"(\d+)[pP](\d+)[dD]", label)
    if match is None:
        raise ConfigError(
            f"--sweep workers={label}: write xPyD, as in 2p1d for two prefill workers and one decode worker"
        )
    if len(options.server_arguments) > 1:
        raise ConfigError("--sweep workers scales one running Tandem: name one server")
    return Point(label, options, parse_sizes([f"prefill={match[1]}", f"decode={match[2]}"]))


_KINDS: dict[str, Callable[[BenchOptions, str], Point]] = {
    "concurrency": _concurrency,
    "rate": _rate,
    "workers": _workers,
}


def reach(pools: dict[Role, int], url: str, api_key: str | None) -> None:
    """As `tandem scale` does, until the router, too, has every worker. Raises ConfigError, DeadlineExceeded."""
    from tandem.cluster.scale import Target, scale

    scale(pools, Target(url, None, "default"), SCALE_WITHIN)
    deadline = time.monotonic() + SEEN_WITHIN
    while (ready := ready_workers(get(f"{url}/status", api_key))) != pools:
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"after {SEEN_WITHIN:.0f} s the router at {url} still sees {ready}, not {pools}")
        time.sleep(TICK)


def ready_workers(status: dict[str, Any]) -> dict[str, int]:
    roles = [worker["role"] for worker in cast(list[dict[str, Any]], status["workers"]) if worker["state"] == "ready"]
    return {role: roles.count(role) for role in ("prefill", "decode")}
