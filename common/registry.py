"""Where workers announce themselves and the router finds them: soft state in Redis.

    tandem:{cluster}:worker:{incarnation}   one worker: signature in hex, a blank, JSON; expires unless published again
    tandem:{cluster}:workers                set of incarnations, so that finding them scans no foreign keys

The signature is HMAC-SHA-256 over the JSON, by the cluster's key and for its name: who can write to Redis but lacks the
key can hide workers, not invent them or send the router elsewhere. A registration played again leads to an address
where the worker has to prove itself anew.

Discovery only: whether a worker lives, and its load, the router learns on its Watch stream. Losing Redis, or all
it holds, costs nothing but news of workers that start meanwhile.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
from collections.abc import Awaitable
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar, cast, get_args

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from tandem.common.credentials import derive
from tandem.common.errors import ConfigError, Overloaded
from tandem.common.redact import redact
from tandem.common.worker_config import KEY_VARIABLE, ROLES, Role
from tandem.common.worker_info import WorkerState

OPERATION_TIMEOUT = 0.5  # seconds
MAX_VALUE_BYTES = 4096
MAX_REPORTED = 1024
_CLUSTER = re.compile(r"[A-Za-z0-9._-]{1,64}")
_STATES: tuple[str, ...] = get_args(WorkerState)

log = logging.getLogger(__name__)
T = TypeVar("T")


class RegistryUnavailable(Overloaded):
    """Redis did not answer in time, or not sensibly. What was known before stays valid."""


@dataclass(frozen=True, slots=True)
class Registration:
    """What a worker announces; `address` is host:port of its gRPC services."""

    name: str
    role: Role
    incarnation: str
    address: str
    pid: int
    state: WorkerState


class Registry:
    """One connection pool to one cluster's state. Use it on one event loop.

    `redis_url`: redis://, rediss:// or unix://. Raises ConfigError for a URL or cluster name that cannot be. Every
    operation ends within OPERATION_TIMEOUT or raises RegistryUnavailable.
    """

    def __init__(self, redis_url: str, cluster_key: bytes, cluster: str = "default") -> None:
        if not _CLUSTER.fullmatch(cluster):
            raise ConfigError(f"cluster name {cluster!r} may only have letters, digits and . _ -, at most 64")
        self._where = redact(redis_url)
        self._prefix = f"tandem:{cluster}:worker:"
        self._index = f"tandem:{cluster}:workers"
        self._key = derive(cluster_key, f"registry {cluster}")
        self._reported: set[str] = set()
        self.corrupt = 0  # values that were ignored so far
        try:
            self._redis = redis.asyncio.Redis.from_url(
                redis_url,
                socket_timeout=OPERATION_TIMEOUT,
                socket_connect_timeout=OPERATION_TIMEOUT,
                retry=Retry(NoBackoff(), 0),  # whoever calls does so again in half a second
            )
        except (ValueError, TypeError) as exc:
            raise ConfigError(f"Redis URL {self._where!r} is not usable: {redact(str(exc))}") from exc

    async def publish(self, registration: Registration, ttl: float = 2.0) -> None:
        """Announce, or announce again; forgotten after `ttl` seconds."""
        value = _signed(json.dumps(asdict(registration)).encode(), self._key)
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.set(self._prefix + registration.incarnation, value, px=max(1, round(ttl * 1000)))
        pipeline.sadd(self._index, registration.incarnation)
        await self._within_timeout(pipeline.execute())

    async def withdraw(self, incarnation: str) -> None:
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.delete(self._prefix + incarnation)
        pipeline.srem(self._index, incarnation)
        await self._within_timeout(pipeline.execute())

    async def list(self) -> list[Registration]:
        """Every worker announced and not expired, ordered by name. Values that no holder of the key wrote as a
        registration are ignored, counted in `corrupt` and logged once per worker."""
        return await self._within_timeout(self._list())

    async def close(self) -> None:
        await self._within_timeout(cast(Any, self._redis).aclose())  # unknown to types-redis

    async def _list(self) -> list[Registration]:
        incarnations = sorted(cast(set[bytes], await cast(Any, self._redis.smembers(self._index))))
        if not incarnations:
            return []
        keys = [self._prefix.encode() + incarnation for incarnation in incarnations]
        values = cast(list[bytes | None], await self._redis.mget(keys))
        pairs = list(zip(incarnations, values, strict=True))
        if expired := [incarnation for incarnation, value in pairs if value is None]:
            # A worker that publishes at this very moment enters the index again in half a second.
            await cast(Any, self._redis.srem(self._index, *expired))
        found = [self._parse(incarnation, value) for incarnation, value in pairs if value is not None]
        return sorted((item for item in found if item), key=lambda item: (item.name, item.incarnation))

    def _parse(self, incarnation: bytes, value: bytes) -> Registration | None:
        try:
            registration = _registration(_verified(value, self._key))
            if registration.incarnation.encode() != incarnation:
                raise ValueError("it names another incarnation than its key")
        except (ValueError, RecursionError) as exc:
            self._report(ascii(incarnation), exc)
            return None
        return registration

    def _report(self, key: str, exc: Exception) -> None:
        self.corrupt += 1
        if key not in self._reported and len(self._reported) < MAX_REPORTED:
            self._reported.add(key)
            log.warning("ignoring worker %s in Redis at %s: %s", key, self._where, exc)

    async def _within_timeout(self, operation: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(OPERATION_TIMEOUT):
                return await operation
        except TimeoutError as exc:
            message = f"Redis at {self._where} did not answer within {OPERATION_TIMEOUT} s"
            raise RegistryUnavailable(message, retry_after=1.0) from exc
        except (RedisError, OSError) as exc:
            message = f"Redis at {self._where} failed: {redact(str(exc)) or type(exc).__name__}"
            raise RegistryUnavailable(message, retry_after=1.0) from exc


def _signed(text: bytes, key: bytes) -> bytes:
    return hmac.digest(key, text, "sha256").hex().encode() + b" " + text


def _verified(value: bytes, key: bytes) -> bytes:
    """The text in a signed value. Raises ValueError."""
    if len(value) > MAX_VALUE_BYTES:
        raise ValueError(f"it has {len(value)} bytes")
    text = value.partition(b" ")[2]
    if not hmac.compare_digest(_signed(text, key), value):
        raise ValueError(f"no holder of this cluster's key signed it; check that {KEY_VARIABLE} is the same everywhere")
    return text


def _registration(text: bytes) -> Registration:
    """Raises ValueError unless `text` is exactly one registration."""
    data: Any = json.loads(text)
    names = [field.name for field in fields(Registration)]
    if not isinstance(data, dict) or sorted(cast(dict[str, Any], data)) != sorted(names):
        raise ValueError(f"it is no object with exactly the keys {', '.join(names)}")
    for name in names:
        kind = int if name == "pid" else str
        if type(data[name]) is not kind or data[name] in ("", 0):
            raise ValueError(f"its {name} is no {kind.__name__}, or empty")
    if data["role"] not in ROLES or data["state"] not in _STATES or data["pid"] < 0:
        raise ValueError(f"its role, state or pid cannot be: {data['role']!r}, {data['state']!r}, {data['pid']}")
    return Registration(**cast(dict[str, Any], data))
