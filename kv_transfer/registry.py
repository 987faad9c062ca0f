"""Which connectors exist, and which one a worker uses."""

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


def _torch() -> Connector:
    from tandem.kv_transfer.torch_group import TorchReceiver, TorchSender

    return Connector(TorchSender, TorchReceiver)


def _inproc() -> Connector:
    from tandem.kv_transfer.inproc import InprocReceiver, InprocSender

    return Connector(InprocSender, InprocReceiver)


# Each factory imports its connector only when asked, so a missing library costs only those who name it.
CONNECTORS: dict[str, Callable[[], Connector]] = {"torch": _torch, "inproc": _inproc}


def choose(name: str, device: torch.device) -> tuple[str, str]:
    """The connector `name` stands for on `device`, and why. Raises ConfigError."""
    if name not in ("auto", *CONNECTORS):
        raise ConfigError(f"unknown KV connector {name!r}; there are: auto, {', '.join(CONNECTORS)}")
    if name == "inproc":
        return name, "prefill and decode share this process"
    if device.type == "cpu":
        return "torch", "torch.distributed with Gloo, as the KV cache is in CPU memory"
    if device.type == "cuda":
        return "torch", "torch.distributed with NCCL, as the KV cache is on a CUDA device"
    raise ConfigError(f"no KV connector moves blocks of a {device.type} device; use cpu or cuda")


def create_sender(name: str, context: Context) -> Sender:
    """P's end of the connector `name` (auto, torch, inproc). Raises ConfigError."""
    return CONNECTORS[choose(name, context.device)[0]]().sender(context)


def create_receiver(name: str, context: Context) -> Receiver:
    """D's end, likewise."""
    return CONNECTORS[choose(name, context.device)[0]]().receiver(context)
