"""What an engine is going to be, settled before anything is allocated: every wrong flag or file is found here."""

from __future__ import annotations

import hashlib
import logging
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from tandem.common.errors import ConfigError
from tandem.common.kv_layout import ELEMENT_BYTES, FLOAT8, KVLayout
from tandem.common.model_dir import resolve_model
from tandem.engine.checkpoint import Checkpoint
from tandem.engine.config import EngineConfig
from tandem.engine.group import Group
from tandem.engine.kernels.native import available
from tandem.engine.loader import check_weights, checkpoint_dtype
from tandem.engine.models.config import ModelConfig
from tandem.engine.models.layers import Placement
from tandem.engine.models.registry import parse_config
from tandem.engine.models.transformer import Transformer
from tandem.engine.quantization import float8
from tandem.engine.quantization.fp8 import FP8

logger = logging.getLogger(__name__)

LOAD_FORMATS = ("auto", "safetensors", "dummy")
DEVICES = ("auto", "cpu", "cuda")
QUANTIZATIONS = {"int8": 8, "int4": 4, "fp8": None}  # codes' bits
KV_CACHE_DTYPES = ("auto", "fp8")
DTYPE_ALIASES = {"half": "float16", "float": "float32"}


@dataclass(frozen=True, slots=True)
class Plan:
    """Equal on all ranks, each of which makes it from the same config."""

    config: EngineConfig  # `model` is a directory
    model: ModelConfig
    checkpoint: Checkpoint
    dtype: str  # of weights and activations
    quantization: str | None  # of weights: asked for, or fp8 where a checkpoint has it and the device computes it
    layout: KVLayout
    device_type: str  # cpu | cuda
    max_model_len: int  # asked for, or the model's own; the KV cache may hold less

    @classmethod
    def make(cls, config: EngineConfig) -> Plan:
        """Raises ConfigError for a flag, ModelError for a directory, that cannot work."""
        _check_flags(config)
        directory = resolve_model(config.model)
        checkpoint = Checkpoint.open(directory, weights=config.load_format != "dummy")
        model = parse_config(checkpoint.config, checkpoint.directory / "config.json")
        _check_split(model, config.tensor_parallel_size)
        if config.load_format != "dummy":
            place = Placement(torch.device("meta"), torch.float32, Group(0, config.tensor_parallel_size))
            check_weights(checkpoint, Transformer(model, place).slots())
        device_type = _device_type(config)
        dtype = _dtype(config, model, checkpoint, device_type)
        quantization = _quantization(config, checkpoint, device_type, dtype)
        _check_deterministic(config, device_type)
        layout = KVLayout(
            revision=_revision(config, checkpoint, dtype, quantization),
            dtype=FLOAT8 if config.kv_cache_dtype == "fp8" else dtype,
            block_size=config.block_size,
            layers=model.layers,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
        )
        max_len = _max_model_len(config, model)
        config = replace(config, model=str(directory))
        return cls(config, model, checkpoint, dtype, quantization, layout, device_type, max_len)

    @property
    def bits(self) -> int | None:
        """Of the codes of a weight that is quantized at load."""
        return QUANTIZATIONS[self.quantization] if self.quantization else None

    def in_float8(self) -> Callable[[str], bool]:
        """Says of the name of a linear layer's weight whether it is held in FP8. A checkpoint that has some so leaves
        others out for a reason."""
        published, wanted = _published_float8(self.checkpoint), self.quantization == "fp8"
        return lambda name: wanted and (not published or name in published)

    def device(self, rank: int) -> torch.device:
        return torch.device("cuda", rank) if self.device_type == "cuda" else torch.device("cpu")


def _check_flags(config: EngineConfig) -> None:
    choices_of = {"load_format": LOAD_FORMATS, "device": DEVICES, "kv_cache_dtype": KV_CACHE_DTYPES}
    for flag, choices in choices_of.items():
        if (value := getattr(config, flag)) not in choices:
            raise ConfigError(f"{flag} {value!r} is unknown; supported: {', '.join(choices)}")
    for flag in ("block_size", "max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size"):
        if (count := getattr(config, flag)) < 1:
            raise ConfigError(f"{flag} must be at least 1, not {count}")
    if not 0.0 < config.gpu_memory_utilization <= 1.0:
        raise ConfigError(f"gpu_memory_utilization must be in (0, 1], not {config.gpu_memory_utilization}")


def _quantization(config: EngineConfig, checkpoint: Checkpoint, device_type: str, dtype: str) -> str | None:
    """What the weights are held in."""
    if config.quantization is None:
        return "fp8" if _published_float8(checkpoint) and not _float8_fault(device_type, dtype) else None
    if config.quantization not in QUANTIZATIONS:
        kinds = ", ".join(QUANTIZATIONS)
        raise ConfigError(f"quantization {config.quantization!r} is unknown; supported: {kinds}")
    if config.quantization == "fp8" and (fault := _float8_fault(device_type, dtype)):
        raise ConfigError(f"quantization fp8 {fault}")
    if config.quantization != "fp8" and not _native(config, device_type):
        raise ConfigError(f"quantization {config.quantization} needs {_NATIVE}; leave it out, or use those")
    return config.quantization


def _float8_fault(device_type: str, dtype: str) -> str:
    """Why weights in FP8 cannot be multiplied here; empty if they can."""
    if device_type != "cuda":
        return f"needs {float8.CAPABILITY}: CPUs have no products in FP8; use int8 or int4 there"
    if not float8.has_float8(torch.device("cuda", 0)):
        return f"needs {float8.CAPABILITY}, which this one is not; leave it out"
    if dtype != "bfloat16":
        return f"needs dtype bfloat16, which its products come out in, not {dtype}; add --dtype bfloat16"
    return ""


def _published_float8(checkpoint: Checkpoint) -> set[str]:
    """Names of the weights that the checkpoint has in FP8."""
    return {name for name, entry in checkpoint.entries.items() if entry.dtype == FP8}


def _check_deterministic(config: EngineConfig, device_type: str) -> None:
    """The native kernels compute every output in an order of its own (kernels/cpu/simd.h); others promise nothing."""
    if config.deterministic and not _native(config, device_type):
        raise ConfigError(f"deterministic needs {_NATIVE}; leave it out, or use those")
    if config.deterministic and config.tensor_parallel_size > 1:
        raise ConfigError("deterministic needs tensor_parallel_size 1: sums over ranks have no fixed order")


def _native(config: EngineConfig, device_type: str) -> bool:
    chosen = config.attention_backend in ("auto", "native") and config.kv_cache_dtype == "auto"
    return device_type == "cpu" and chosen and available()


_NATIVE = (
    "the native CPU kernels: device cpu, attention_backend auto or native, kv_cache_dtype auto, and a g++ that "
    "compiles them"
)


def _check_split(model: ModelConfig, world: int) -> None:
    sizes = (("attention heads", model.heads), ("KV heads", model.kv_heads), ("MLP columns", model.intermediate_size))
    for what, size in sizes:
        if size % world:
            raise ConfigError(f"tensor_parallel_size {world} does not divide the model's {size} {what}")


def _device_type(config: EngineConfig) -> str:
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device == "cpu" or (config.device == "auto" and not available):
        return "cpu"
    if available < config.tensor_parallel_size:
        raise ConfigError(f"{config.tensor_parallel_size} CUDA devices are needed, {available} can be seen")
    return "cuda"


def _dtype(config: EngineConfig, model: ModelConfig, checkpoint: Checkpoint, device_type: str) -> str:
    name = DTYPE_ALIASES.get(config.dtype, config.dtype)
    if name == "auto":
        name = checkpoint_dtype(model, checkpoint.entries)
        widened = _native(config, device_type)  # our own kernels widen 16 bits as they read them
        if device_type == "cpu" and name in ("bfloat16", "float16") and not (widened or _computes(name)):
            logger.info("dtype float32: this CPU only emulates the checkpoint's %s, about ten times slower", name)
            return "float32"
    supported = [known for known in ELEMENT_BYTES if known != FLOAT8]
    if name not in supported:
        raise ConfigError(f"dtype {name!r} is not supported; supported: {', '.join(supported)}")
    return name


def _computes(dtype: str) -> bool:
    """Whether the CPU has instructions for products of this 16-bit type; torch falls back to slow emulation."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    cpu = torch.cpu
    wanted = {
        "bfloat16": (cpu._is_avx512_bf16_supported, cpu._is_amx_tile_supported),  # pyright: ignore[reportPrivateUsage]
        "float16": (cpu._is_amx_fp16_supported,),  # pyright: ignore[reportPrivateUsage]
    }
    return any(supported() for supported in wanted.get(dtype, ()))


def _revision(config: EngineConfig, checkpoint: Checkpoint, dtype: str, quantization: str | None) -> str:
    """Random weights depend on the seed, the checkpoint's do not. Other weights, quantized ones too, make other KV; so
    does another dtype, which the KV's own tells unless that is FP8."""
    revision = checkpoint.revision()
    if config.load_format == "dummy":
        revision = hashlib.sha256(f"{revision}|dummy|{config.seed}".encode()).hexdigest()
    for change in (quantization, dtype if config.kv_cache_dtype == "fp8" else None):
        if change:
            revision = hashlib.sha256(f"{revision}|{change}".encode()).hexdigest()
    return revision


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    wanted = config.max_model_len or model.max_position
    if not 1 < wanted <= model.max_position:
        raise ConfigError(f"max_model_len {wanted} is not in 2 … {model.max_position}, the model's own maximum")
    return wanted
