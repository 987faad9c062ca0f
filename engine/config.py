"""What one engine is told; resolved once, never changed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineConfig:
    model: str  # directory with config.json, safetensors and tokenizer files
    dtype: str = "auto"  # auto: the checkpoint's own, or float32 on a CPU that only emulates that
    block_size: int = 16  # tokens
    max_model_len: int | None = None  # None: the model's own
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    kv_cache_memory_bytes: int | None = None  # None: on CUDA from gpu_memory_utilization, on CPU 1 GiB
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    load_format: str = "auto"  # auto | safetensors | dummy
    attention_backend: str = "auto"
    device: str = "auto"  # auto | cpu | cuda
    seed: int = 0
    enable_prefix_caching: bool = True
