"""`tandem scale|drain|restart`: asks the controller of a running cluster for a change, and waits until it is done."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
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
SUCCESSOR_WITHIN = 600.0  # seconds a drained worker's successor may take to be ready

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
    with _reached(target) as controller:
        _wait(controller, cast(ClusterView, _ask(controller.scale.remote(wanted))), timeout)


def drain(name: str, target: Target, timeout: float) -> None:
    """Until the worker has left and its successor is ready. `timeout`: seconds its requests get to finish.

    Raises ConfigError when there is no such cluster or ready worker, DeadlineExceeded when no successor comes up.
    """
    with _reached(target) as controller:
        if not _ask(controller.drain.remote(name, timeout)):
            workers = cast(ClusterView, _ask(controller.view.remote())).workers
            ready = ", ".join(worker.name for worker in workers if worker.phase == "ready") or "none"
            raise ConfigError(f"there is no ready worker {name!r} to drain; ready are: {ready}")
        _wait(controller, cast(ClusterView, _ask(controller.view.remote())), timeout + SUCCESSOR_WITHIN)


def restart(target: Target, timeout: float) -> None:
    """A rolling restart. Raises ConfigError when there is no such cluster, DeadlineExceeded after `timeout` seconds."""
    with _reached(target) as controller:
        _wait(controller, cast(ClusterView, _ask(controller.restart.remote())), timeout)


@contextmanager
def _reached(target: Target) -> Generator[Any]:
    """The controller of the cluster `target` means. Raises ConfigError."""
    if target.ray_address is None:
        record = find(target.url)
        address, space = record.ray_address, record.namespace
    else:
        address, space = target.ray_address, ray_session.namespace(target.cluster)
    with ray_session.joined(address, space):
        yield _controller(space)


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
            view = cast(ClusterView, _ask(controller.view.remote()))
            screen.update(view)
    sizes = ", ".join(f"{count} {role}" for role, count in view.wanted.items())
    screen.step(f"done: {sizes}")


def _ask(reference: Any) -> object:
    from tandem.cluster import ray_calls

    try:
        return ray_calls.get(reference, ANSWER_WITHIN)
    except ray_calls.ActorLost as exc:
        raise ConfigError("the controller does not answer; is `tandem serve` still running?") from exc
