"""Which KV connectors exist, and in which order a pair tries them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tandem.common.errors import ConfigError
from tandem.kv_transfer.base import Receiver, Sender
from tandem.kv_transfer.context import Context


@dataclass(frozen=True, slots=True)
class Connector:
    sender: Callable[[Context], Sender]
    receiver: Callable[[Context], Receiver]
    domain: Callable[[Context], str]
    """What two ends must share to be able to use it. Raises ConfigError, saying what is missing here."""


def _shm() -> Connector:
    from tandem.kv_transfer import shm

    return Connector(shm.ShmSender, shm.ShmReceiver, shm.domain)


def _tcp() -> Connector:
    from tandem.kv_transfer import tcp

    return Connector(tcp.TcpSender, tcp.TcpReceiver, tcp.domain)


def _nixl() -> Connector:
    from tandem.kv_transfer import nixl

    return Connector(nixl.NixlSender, nixl.NixlReceiver, nixl.domain)


def _cuda_ipc() -> Connector:
    from tandem.kv_transfer import cuda_ipc

    return Connector(cuda_ipc.CudaIpcSender, cuda_ipc.CudaIpcReceiver, cuda_ipc.domain)


def _torch() -> Connector:
    from tandem.kv_transfer import torch_group

    return Connector(torch_group.TorchSender, torch_group.TorchReceiver, torch_group.domain)


def _inproc() -> Connector:
    from tandem.kv_transfer import inproc

    return Connector(inproc.InprocSender, inproc.InprocReceiver, inproc.domain)


# Each factory imports its connector only when asked, so a missing library costs only those who name it.
CONNECTORS: dict[str, Callable[[], Connector]] = {
    "cuda_ipc": _cuda_ipc,
    "shm": _shm,
    "nixl": _nixl,
    "tcp": _tcp,
    "torch": _torch,
    "inproc": _inproc,
}
# Fastest first (docs/benchmarks.md), but for nixl on CPUs: there it is faster than tcp on one host, where shm is taken
# anyway, was not measured between hosts, and lets anybody in (nixl.py). `inproc` is for tests and has to be named.
_PREFERRED = {
    "cuda": ("cuda_ipc", "nixl", "torch", "tcp"),
    "cpu": ("shm", "tcp", "nixl", "torch"),
}


def preferred(device_type: str) -> tuple[str, ...]:
    """All connectors that move blocks of such a device, in the order to try them. Raises ConfigError."""
    if device_type not in _PREFERRED:
        raise ConfigError(f"no KV connector moves blocks of a {device_type} device; use cpu or cuda")
    return (*_PREFERRED[device_type], "inproc")


def choose(name: str, device: torch.device) -> tuple[tuple[str, ...], str]:
    """The connectors that `name` (auto, or one of them) allows on `device`, in the order to try, and a line about it.

    Raises ConfigError.
    """
    order = preferred(device.type)
    if name == "auto":
        order = order[:-1]
        return order, f"auto: each pair takes the first both ends have of {', '.join(order)}"
    if name not in CONNECTORS:
        raise ConfigError(f"unknown KV connector {name!r}; there are: auto, {', '.join(CONNECTORS)}")
    if name not in order:
        raise ConfigError(f"the KV connector {name} moves no blocks of a {device.type} device; use {', '.join(order)}")
    return (name,), f"{name}, as told"
