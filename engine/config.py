"""What one engine is told; resolved once, never changed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineConfig:
    model: str  # directory with config.json, safetensors and tokenizer files
    dtype: str = "auto"  # auto: the checkpoint's own, or float32 where 16 bits are only emulated
    block_size: int = 16  # tokens
    kv_cache_dtype: str = "auto"  # auto: dtype | fp8: e4m3 with scale 1, a byte each
    max_model_len: int | None = None  # None: the model's own
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    kv_cache_memory_bytes: int | None = None  # None: on CUDA from gpu_memory_utilization, on CPU 1 GiB
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    quantization: str | None = None  # None | int8 | int4 | fp8: of the weights, at load
    load_format: str = "auto"  # auto | safetensors | dummy
    attention_backend: str = "auto"
    device: str = "auto"  # auto | cpu | cuda
    seed: int = 0
    deterministic: bool = False  # refuse to start where a token's bits could depend on batch, chunk or worker
    enable_prefix_caching: bool = True
