"""`tandem scale`: asks the controller of a running cluster for other pool sizes, and waits until it has them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from tandem.cluster import ray_session
from tandem.cluster.controller import ClusterView
from tandem.cluster.run_dir import find
from tandem.cluster.screen import Screen
from tandem.common.errors import ConfigError, DeadlineExceeded
from tandem.common.worker_config import ROLES, Role

ANSWER_WITHIN = 20.0  # seconds
TICK = 0.25  # seconds

_LEAST = {"prefill": 0, "decode": 1}


@dataclass(frozen=True, slots=True)
class Target:
    """Which cluster: the one behind `url`, or `cluster` on the Ray at `ray_address`."""

    url: str
    ray_address: str | None
    cluster: str


def parse_sizes(sizes: Sequence[str]) -> dict[Role, int]:
    """["prefill=2", "decode=3"] → {"prefill": 2, "decode": 3}. Raises ConfigError."""
    wanted: dict[Role, int] = {}
    for size in sizes:
        role, _, count = size.partition("=")
        if role not in ROLES or not count.isdecimal() or role in wanted:
            raise ConfigError(f"{size!r} is not understood; write prefill=N, decode=M or both")
        if int(count) < _LEAST[role]:
            raise ConfigError(f"{size}: a cluster needs at least {_LEAST[role]} {role} worker")
        wanted[cast(Role, role)] = int(count)
    return wanted


def scale(wanted: dict[Role, int], target: Target, timeout: float) -> None:
    """Raises ConfigError when there is no such cluster, DeadlineExceeded when it takes longer than `timeout`."""
    if target.ray_address is None:
        record = find(target.url)
        address, space = record.ray_address, record.namespace
    else:
        address, space = target.ray_address, ray_session.namespace(target.cluster)
    with ray_session.joined(address, space):
        controller = _controller(space)
        view = _ask(controller.scale.remote(wanted))
        _wait(controller, view, timeout)


def _controller(space: str) -> Any:
    from tandem.cluster import ray_calls
    from tandem.cluster.ray_workers import CONTROLLER

    controller = ray_calls.find(CONTROLLER, space)
    if controller is None:
        raise ConfigError(f"this Ray runs no Tandem cluster in its namespace {space!r}")
    return controller


def _wait(controller: Any, view: ClusterView, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    screen = Screen(quiet=tuple(worker.name for worker in view.workers if worker.phase == "ready"))
    with screen:
        screen.update(view)
        while not view.settled:
            if view.fault:
                raise ConfigError(view.fault)
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"not done within {timeout:.0f} s; it goes on, see `tandem status`")
            time.sleep(TICK)
            view = _ask(controller.view.remote())
            screen.update(view)
    sizes = ", ".join(f"{count} {role}" for role, count in view.wanted.items())
    screen.step(f"done: {sizes}")


def _ask(reference: Any) -> ClusterView:
    from tandem.cluster import ray_calls

    try:
        return cast(ClusterView, ray_calls.get(reference, ANSWER_WITHIN))
    except ray_calls.ActorLost as exc:
        raise ConfigError("the controller does not answer; is `tandem serve` still running?") from exc
