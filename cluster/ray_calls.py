"""The few calls we make to Ray, with types: Ray's own have too many unknowns for a strict checker."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import ray
import ray.exceptions

from tandem.common.errors import WorkerFailed

_ray: Any = ray
_DEAD = "The actor is dead because"

ActorHandle = Any  # methods are called as handle.method.remote(…)
Reference = Any  # to a result that may not be there yet


class ActorLost(WorkerFailed):
    """It is dead, or did not answer in time."""


class ActorSlow(ActorLost):
    """It did not answer in time, and may be alive."""


def create(actor: type, options: Mapping[str, object], *arguments: object) -> ActorHandle:
    """A new actor process. Raises RuntimeError when Ray refuses, e.g. because the name is taken."""
    try:
        return _ray.remote(actor).options(**options).remote(*arguments)
    except (ValueError, ray.exceptions.RayError) as exc:
        raise RuntimeError(_reason(exc)) from exc


def find(name: str, namespace: str) -> ActorHandle | None:
    try:
        return _ray.get_actor(name, namespace=namespace)
    except ValueError:
        return None


def is_done(reference: Reference) -> bool:
    done, _ = _ray.wait([reference], timeout=0)
    return bool(done)


def get(reference: Reference, timeout: float) -> Any:
    """Raises ActorLost, or ActorSlow when there is no answer within `timeout` seconds."""
    try:
        return _ray.get(reference, timeout=timeout)
    except ray.exceptions.GetTimeoutError as exc:
        raise ActorSlow(f"no answer within {timeout:.0f} s") from exc
    except ray.exceptions.RayError as exc:
        raise ActorLost(_reason(exc)) from exc


def kill(actor: ActorHandle) -> None:
    """Also frees its name, even if the process is dead already; SIGKILL follows if it does not hear Ray."""
    with contextlib.suppress(ray.exceptions.RayError, ValueError):
        _ray.kill(actor)


def _reason(exc: BaseException) -> str:
    """One line; Ray's messages are pages."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    dead = next((line for line in lines if line.startswith(_DEAD)), None)
    if dead is not None:
        return dead.removeprefix(_DEAD).partition(". ")[0].strip()
    return next(iter(lines), type(exc).__name__)[:300]
