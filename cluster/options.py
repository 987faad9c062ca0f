"""Every flag of `tandem serve` and of the single roles, once. Names are vLLM's where vLLM has the flag.

A dataclass is a group of flags; `command` turns one into a typer command whose function receives an instance.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

import tandem.engine
from tandem.common.kv_layout import MAX_BLOCK_SIZE
from tandem.engine.config import EngineConfig

_Options = TypeVar("_Options")

DEMO_NAME = "tandem-demo"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Quantization(StrEnum):
    int8 = "int8"
    int4 = "int4"
    fp8 = "fp8"


class KVCacheDtype(StrEnum):
    auto = "auto"
    fp8 = "fp8"


class LoadFormat(StrEnum):
    auto = "auto"
    safetensors = "safetensors"
    dummy = "dummy"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class GenerationConfig(StrEnum):
    auto = "auto"
    none = "none"


class LogLevel(StrEnum):
    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


def _flag(help_text: str, *names: str, **extra: Any) -> Any:
    return typer.Option(*names, help=help_text, **extra)


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    model: Annotated[
        str | None, typer.Argument(help="A model directory or Hugging Face id. Default: the demo model in the package.")
    ] = None

    @property
    def directory(self) -> str:
        """What was given, or the packaged model."""
        return self.model or str(Path(tandem.engine.__file__).with_name("demo_model"))


@dataclass(frozen=True, kw_only=True)
class ClusterFlags:
    redis_url: Annotated[
        str | None, _flag("Registry of workers: redis://… or unix://…", envvar="TANDEM_REDIS_URL", show_envvar=True)
    ] = None
    cluster: Annotated[str, _flag("Keeps apart clusters that share a Redis or a Ray.", envvar="TANDEM_CLUSTER")] = (
        "default"
    )
    log_level: Annotated[LogLevel, _flag("How much the processes say.", envvar="TANDEM_LOG_LEVEL")] = LogLevel.warning

    def arguments(self) -> list[tuple[str, str]]:
        return [("--cluster", self.cluster), ("--log-level", self.log_level.value)]


@dataclass(frozen=True, kw_only=True)
class RouterFlags(ModelFlags):
    host: Annotated[str, _flag("Address the HTTP API listens on.", envvar="TANDEM_HOST")] = "127.0.0.1"
    port: Annotated[int, _flag("Port of the HTTP API.", min=1, max=65535, envvar="TANDEM_PORT")] = 8000
    served_model_name: Annotated[
        list[str] | None, _flag("A name of the model in the API; repeatable. Default: its directory's name.")
    ] = None
    api_key: Annotated[
        str | None, _flag("Clients must send it as `Authorization: Bearer …`.", envvar="TANDEM_API_KEY")
    ] = None
    generation_config: Annotated[
        GenerationConfig, _flag("auto: sampling defaults from the model's generation_config.json.")
    ] = GenerationConfig.auto
    request_timeout: Annotated[float, _flag("Seconds a request may take in all.", min=0.1)] = 600.0
    max_num_queued_reqs: Annotated[int, _flag("Requests that may wait; more get 503.", min=1)] = 512
    max_num_queued_tokens: Annotated[int, _flag("… and their prompt tokens.", min=1)] = 1 << 20
    max_queue_wait: Annotated[float, _flag("Seconds a new request may expect to wait; beyond it, 503.", min=0.1)] = 60.0
    queue_timeout: Annotated[float, _flag("Seconds after which a request without a token gets 503.", min=0.1)] = 300.0
    migration_limit: Annotated[int, _flag("Attempts of one request, on whichever workers.", min=1)] = 3
    shutdown_timeout: Annotated[float, _flag("Seconds that streams get to finish after SIGTERM.", min=0)] = 0.0

    def router_arguments(self) -> list[tuple[str, str]]:
        return [
            ("--host", self.host),
            ("--port", str(self.port)),
            ("--generation-config", self.generation_config.value),
            ("--request-timeout", str(self.request_timeout)),
            ("--max-num-queued-reqs", str(self.max_num_queued_reqs)),
            ("--max-num-queued-tokens", str(self.max_num_queued_tokens)),
            ("--max-queue-wait", str(self.max_queue_wait)),
            ("--queue-timeout", str(self.queue_timeout)),
            ("--migration-limit", str(self.migration_limit)),
            ("--shutdown-timeout", str(self.shutdown_timeout)),
        ]


@dataclass(frozen=True, kw_only=True)
class EngineFlags:
    dtype: Annotated[
        Dtype, _flag("Of weights and KV. auto: the checkpoint's own, or float32 where 16 bits are only emulated.")
    ] = Dtype.auto
    kv_cache_dtype: Annotated[
        KVCacheDtype, _flag("Of keys and values. auto: --dtype; fp8: e4m3, half the memory; the same on P and D.")
    ] = KVCacheDtype.auto
    max_model_len: Annotated[int | None, _flag("Longest prompt + output, tokens. Default: the model's own.", min=1)] = (
        None
    )
    block_size: Annotated[int, _flag("Tokens per KV block.", min=4, max=MAX_BLOCK_SIZE)] = 16
    max_num_seqs: Annotated[int, _flag("Sequences one worker runs at a time.", min=1)] = 64
    max_num_batched_tokens: Annotated[int, _flag("Tokens one step computes at most.", min=1)] = 512
    kv_cache_memory_bytes: Annotated[
        int | None, _flag("KV memory of each worker. Default: 1 GiB on CPU, on CUDA what is free.", min=1)
    ] = None
    gpu_memory_utilization: Annotated[
        float, _flag("Share of the GPU's memory one worker may use.", min=0.01, max=1.0)
    ] = 0.9
    tensor_parallel_size: Annotated[
        int, _flag("Ranks one model is spread over.", "--tensor-parallel-size", "-tp", min=1)
    ] = 1
    quantization: Annotated[
        Quantization | None,
        _flag("Hold the weights in 8 or 4 bits (CPU) or FP8 (CUDA), made at load.", "--quantization", "-q"),
    ] = None
    load_format: Annotated[LoadFormat, _flag("dummy: random weights, for measuring.")] = LoadFormat.auto
    attention_backend: Annotated[str, _flag("auto, native, cpu, reference or triton.")] = "auto"
    kv_connector: Annotated[
        str, _flag("What moves KV from prefill to decode workers: auto, shm, tcp, nixl, cuda_ipc or torch.")
    ] = "auto"
    device: Annotated[Device, _flag("auto: CUDA where there is a GPU.")] = Device.auto
    seed: Annotated[int, _flag("Of dummy weights.", min=0)] = 0
    deterministic: Annotated[
        bool, _flag("Start only if no token's bits depend on its batch, chunk or worker.", "--deterministic")
    ] = False
    enable_prefix_caching: Annotated[
        bool,
        _flag("Reuse the KV of shared prefixes.", "--enable-prefix-caching/--no-enable-prefix-caching"),
    ] = True

    def engine_config(self, model: str) -> EngineConfig:
        return EngineConfig(
            model=model,
            dtype=self.dtype.value,
            kv_cache_dtype=self.kv_cache_dtype.value,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            kv_cache_memory_bytes=self.kv_cache_memory_bytes,
            gpu_memory_utilization=self.gpu_memory_utilization,
            tensor_parallel_size=self.tensor_parallel_size,
            quantization=self.quantization.value if self.quantization else None,
            load_format=self.load_format.value,
            attention_backend=self.attention_backend,
            device=self.device.value,
            seed=self.seed,
            deterministic=self.deterministic,
            enable_prefix_caching=self.enable_prefix_caching,
        )


@dataclass(frozen=True, kw_only=True)
class ServeOptions(RouterFlags, EngineFlags, ClusterFlags):
    prefill: Annotated[int, _flag("Prefill workers. 0: decode workers prefill too (aggregated).", min=0)] = 1
    decode: Annotated[int, _flag("Decode workers.", min=1)] = 1
    ray_address: Annotated[
        str | None, _flag("Join this Ray instead of starting one; `auto` finds it.", envvar="TANDEM_RAY_ADDRESS")
    ] = None
    dashboard: Annotated[bool, _flag("Ray's dashboard.", "--dashboard/--no-dashboard")] = True
    startup_timeout: Annotated[float, _flag("Seconds a worker may take to load.", min=1)] = 600.0
    drain_timeout: Annotated[
        float, _flag("Seconds a leaving worker may take to finish its requests; then others go on with them.", min=0)
    ] = 120.0


@dataclass(frozen=True, kw_only=True)
class RouterOptions(RouterFlags, ClusterFlags):
    shutdown_timeout: Annotated[float, _flag("Seconds that streams get to finish after SIGTERM.", min=0)] = 30.0
    prefill: Annotated[int, _flag("Prefill workers that will come. 0: decode workers prefill too.", min=0)] = 1


@dataclass(frozen=True, kw_only=True)
class WorkerOptions(ModelFlags, EngineFlags, ClusterFlags):
    name: Annotated[
        str | None, _flag("Its name in the cluster. Default: role and host name.", envvar="TANDEM_NAME")
    ] = None
    host: Annotated[str, _flag("Address its peers reach it at; it listens there.", envvar="TANDEM_HOST")] = "127.0.0.1"
    port: Annotated[int, _flag("Its gRPC port. 0: any free one.", min=0, max=65535)] = 0
    drain_timeout: Annotated[float, _flag("Seconds its requests get to finish after SIGTERM.", min=0)] = 120.0


def command(app: typer.Typer, options: type[_Options]) -> Callable[[Callable[[_Options], None]], Callable[..., None]]:
    """Register a function of one options dataclass as a command with a flag per field."""
    hints = get_type_hints(options, include_extras=True)

    def register(function: Callable[[_Options], None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            function(options(**values))

        kind = inspect.Parameter.KEYWORD_ONLY
        parameters = [
            inspect.Parameter(field.name, kind, default=field.default, annotation=hints[field.name])
            for field in fields(options)  # pyright: ignore[reportArgumentType]  # always a dataclass
        ]
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]  # typer reads it
        return app.command()(run)

    return register
