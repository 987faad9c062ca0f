"""The attention backends by name, each imported only when chosen, and the one rule that chooses for `auto`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch

from tandem.common.errors import ConfigError
from tandem.engine.attention.base import AttentionBackend
from tandem.engine.quantization.float8 import CAPABILITY, has_float8

__all__ = ["BACKENDS", "create_attention"]


def _reference(device: torch.device) -> AttentionBackend:
    from tandem.engine.attention.reference import ReferenceAttention

    return ReferenceAttention()


def _cpu(device: torch.device) -> AttentionBackend:
    if device.type != "cpu":
        raise ConfigError(_refusal("cpu", f"it computes on the CPU, but the model is on {device}"))
    from tandem.engine.attention.cpu import CpuAttention

    return CpuAttention()


def _native(device: torch.device) -> AttentionBackend:
    if device.type != "cpu":
        raise ConfigError(_refusal("native", f"its kernels run on the CPU, but the model is on {device}"))
    from tandem.engine.kernels.native import available

    if not available():
        raise ConfigError(_refusal("native", "its kernels could not be compiled (is g++ installed?)"))
    from tandem.engine.attention.native import NativeAttention

    return NativeAttention()


def _triton(device: torch.device) -> AttentionBackend:
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(_refusal("triton", "the package triton is not installed"))
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        reason = f"its kernels need a CUDA device, but the model is on {device} (TRITON_INTERPRET=1 interprets them)"
        raise ConfigError(_refusal("triton", reason))
    from tandem.engine.attention.triton import TritonAttention

    return TritonAttention()


BACKENDS: dict[str, Callable[[torch.device], AttentionBackend]] = {
    "cpu": _cpu,
    "native": _native,
    "reference": _reference,
    "triton": _triton,
}


def create_attention(name: str, device: torch.device, float8: bool = False) -> tuple[AttentionBackend, str]:
    """The backend called `name` (or "auto") for a model on `device`, and why it is this one. `float8`: the KV cache
    is in FP8.

    Raises ConfigError for an unknown name, or a backend that cannot run here.
    """
    why = "asked for"
    if name == "auto":
        name, why = _automatic(device, float8)
    if name not in BACKENDS:
        raise ConfigError(f"unknown attention backend {name!r}; {_supported()}")
    if float8:
        _check_float8(name, device)
    return BACKENDS[name](device), why


def _check_float8(name: str, device: torch.device) -> None:
    if name == "native":
        reason = "its kernels do not read a KV cache in FP8 (kv_cache_dtype auto is one they read)"
        raise ConfigError(_refusal(name, reason))
    if name == "triton" and device.type == "cuda" and not has_float8(device):
        reason = f"a KV cache in FP8 needs {CAPABILITY}; use kv_cache_dtype auto"
        raise ConfigError(_refusal(name, reason))


def _automatic(device: torch.device, float8: bool) -> tuple[str, str]:
    if device.type == "cpu" and float8:
        return "cpu", "the model is on the CPU, and the KV cache in FP8"
    if device.type == "cpu":
        from tandem.engine.kernels.native import available

        if not available():
            return "cpu", "the model is on the CPU, without a compiler for the native kernels"
        return "native", "the model is on the CPU"
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return "triton", "the model is on a CUDA device"
    return "reference", f"the model is on {device} and triton is not there for it"


def _refusal(name: str, reason: str) -> str:
    return f"attention backend {name!r} cannot run here: {reason}; {_supported()}"


def _supported() -> str:
    return f"supported are auto, {', '.join(BACKENDS)}"
