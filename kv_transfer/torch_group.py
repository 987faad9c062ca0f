"""The `torch` connector: one two-rank torch.distributed group per pair of incarnations, P is rank 0 and D rank 1.

Gloo moves blocks between CPUs, NCCL between CUDA devices. The group is made without a world and without a store
port: its store is replicated over the pair's authenticated channel. Gloo itself listens on an ephemeral port of
`Context.host` only; that stream is neither authenticated nor encrypted: the digests in the frames protect what lands.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import threading
import time
from collections.abc import Callable, Generator, Sequence
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from tandem.common.errors import ConfigError, TransferFailed
from tandem.common.handoff import Frame
from tandem.kv_transfer.context import Context
from tandem.kv_transfer.payload import Payload
from tandem.kv_transfer.rendezvous import Mailbox

_TAGS = 1 << 20  # tags of frames, in turn; the next one is never sent on
_AT_ONCE = 0.001  # seconds
_CONNECT_FACTOR = 5  # Gloo waits this many times a group's timeout for the peer to connect
_Gloo: Any = dist.ProcessGroupGloo  # torch's stubs lack most of its methods


class ChannelStore(dist.Store):  # pyright: ignore[reportPrivateImportUsage]  # documented as public
    """The part of torch's Store a group needs to find its peer, over a Mailbox; counters and deletion are not needed.

    C++ keeps only the C++ half of a Python store alive: hold a reference as long as the group exists.
    """

    def __init__(self, mailbox: Mailbox) -> None:
        super().__init__()
        self._mailbox = mailbox
        self.deadline = 0.0  # time.monotonic(); replaces the timeouts torch passes, which add up

    def set(self, key: str, value: str | bytes) -> None:
        self._mailbox.publish(f"store/{key}", value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        return self._mailbox.take(f"store/{key}", self.deadline)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # an overloaded pair in the stub
        for key in keys:
            self._mailbox.take(f"store/{key}", self.deadline)

    def check(self, keys: list[str]) -> bool:
        return all(self._mailbox.has(f"store/{key}") for key in keys)

    def clone(self) -> ChannelStore:
        return self


def domain(context: Context) -> str:
    """Raises ConfigError."""
    if context.device.type == "cuda" and not hasattr(dist, "ProcessGroupNCCL"):
        raise ConfigError("this build of torch has no NCCL; install one with CUDA, or use --device cpu")
    return "nccl" if context.device.type == "cuda" else "gloo"


class _End:
    """What both ends do alike. One thread opens and moves; `close` may come from any other."""

    one_sided = False

    def __init__(self, context: Context, rank: int) -> None:
        self._context = context
        self._rank = rank
        self._mailbox = context.mailbox
        self._store = ChannelStore(self._mailbox)
        self._backend = "nccl" if context.device.type == "cuda" else "gloo"
        self._lock = threading.Lock()
        self._group: Any = None  # ProcessGroupGloo | ProcessGroupNCCL, which torch does not type
        self._closed = False
        self._frames = 0  # moved so far; the same count at both ends, as headers arrive in order

    def open(self, timeout: float) -> None:
        """Raises TransferFailed, or ConfigError for a host that cannot be listened on."""
        self._store.deadline = time.monotonic() + timeout
        make = _gloo_group if self._backend == "gloo" else _nccl_group
        with _translated("setting up the data path"), self._on_device():
            group = make(self._store, self._rank, timeout, self._context.host)
        with self._lock:
            if not self._closed:
                self._group = group
                return
        _unblock(group)
        raise TransferFailed("the link was closed while its data path was being set up")

    def close(self) -> None:
        """A thread blocked in the group wakes within milliseconds (Gloo), or when its communicator aborts (NCCL).

        One that enters a Gloo operation just as the connection breaks may stay until its frame's deadline.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            group, self._group = self._group, None
        if group is not None:
            _unblock(group)

    def _move(self, action: str, frame: Frame, payload: Tensor, timeout: float) -> None:
        """One point-to-point operation, "send" or "recv", which ends or fails within `timeout` seconds."""
        if payload.nbytes != frame.num_bytes:  # Gloo ends the receiving process when more arrives than was announced
            raise TransferFailed(f"payload of {payload.nbytes} bytes for a frame of {frame.num_bytes}")
        group = self._group
        if group is None:
            raise TransferFailed("the data path is closed")
        self._store.deadline = time.monotonic() + timeout  # NCCL meets its peer at the first frame
        with _translated(f"{action} of {frame.num_bytes} bytes"), self._on_device():
            work = getattr(group, action)([payload], 1 - self._rank, self._frames % _TAGS)
            # closed meanwhile: `close` may have looked for blocked operations before this one was there
            work.wait(timedelta(seconds=_AT_ONCE if self._closed else timeout))
        self._frames += 1

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        device = self._context.device
        return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class TorchSender(_End):
    """Sends the payload from where it lies if that is one run of bytes, else from a copy."""

    def __init__(self, context: Context) -> None:
        super().__init__(context, 0)

    def send(self, frame: Frame, payload: Payload, targets: Sequence[int], timeout: float) -> None:
        self._move("send", frame, payload.tensor(), timeout)


class TorchReceiver(_End):
    """Receives into a fresh tensor on the context's device; no copy."""

    def __init__(self, context: Context) -> None:
        super().__init__(context, 1)

    def receive(self, frame: Frame, targets: Sequence[int], timeout: float) -> Payload:
        shape = (frame.num_blocks, frame.num_bytes // frame.num_blocks)
        payload = torch.empty(shape, dtype=torch.uint8, device=self._context.device)
        self._move("recv", frame, payload, timeout)
        return Payload.whole(payload)


def _gloo_group(store: ChannelStore, rank: int, timeout: float, host: str) -> Any:
    options = _Gloo._Options()  # torch has no public name for it
    options._devices = [_gloo_device(host)]
    options._timeout = timedelta(seconds=timeout / _CONNECT_FACTOR)
    return _Gloo(store, rank, 2, options)


def _gloo_device(host: str) -> Any:
    with contextlib.suppress(ValueError):  # a name, not an address
        if ipaddress.ip_address(host).is_unspecified:
            raise ConfigError(f"KV data path: {host} names no single address; give the worker's own with --host")
    try:
        return _Gloo.create_device(hostname=host)
    except RuntimeError as exc:
        raise ConfigError(f"KV data path: cannot listen on host {host!r}: {_gist(exc)}") from exc


# What a failed pair must not do is end the process, as NCCL's watchdog does by default: 2 = abort the communicator
# only. torch reads these in the constructor; they are restored so that tensor-parallel groups keep the default.
_NCCL_ENVIRONMENT = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "2", "TORCH_NCCL_ENABLE_MONITORING": "0"}
_environment_lock = threading.Lock()


def _nccl_group(store: ChannelStore, rank: int, timeout: float, host: str) -> Any:
    make: Callable[..., Any] = cast(Any, dist).ProcessGroupNCCL  # builds without CUDA lack it: see `domain`
    with _environment(_NCCL_ENVIRONMENT):
        return make(store, rank, 2, timedelta(seconds=timeout))


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Generator[None]:
    with _environment_lock:
        before = {name: os.environ.get(name) for name in values}
        os.environ.update(values)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _unblock(group: Any) -> None:
    """Make a thread that is blocked in `group` fail, and tear the connection down.

    Gloo has no abort, but an operation that misses its deadline closes the connection under all operations of the
    group: so post a receive on a tag nobody sends on, and let it miss a deadline of one millisecond.
    """
    with contextlib.suppress(RuntimeError):  # that failure is the purpose; or the connection is down already
        if isinstance(group, _Gloo):
            group.recv([torch.empty(1, dtype=torch.uint8)], 1 - group.rank(), _TAGS).wait(timedelta(milliseconds=1))
        else:
            group.abort()


@contextlib.contextmanager
def _translated(action: str) -> Generator[None]:
    try:
        yield
    except RuntimeError as exc:
        raise TransferFailed(f"KV data path: {action} failed: {_gist(exc)}") from exc


def _gist(exc: BaseException) -> str:
    """The first sentence, without the path of a C++ file that torch's messages begin with."""
    line = (str(exc).strip() or repr(exc)).splitlines()[0]
    return re.sub(r"^\[\S+\] ", "", line).split(". ")[0]
