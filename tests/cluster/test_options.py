"""Flags: each one lands where it should, and wrong ones are refused before anything starts."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tandem.cluster.cli import app
from tandem.cluster.options import ModelFlags, RouterOptions, ServeOptions, command
from tandem.cluster.router_process import router_command
from tandem.common.worker_config import KEY_VARIABLE
from tandem.engine.config import EngineConfig
from tandem.router.__main__ import parse_settings

ENGINE_FLAGS: dict[str, tuple[list[str], object]] = {
    "dtype": (["--dtype", "bfloat16"], "bfloat16"),
    "kv_cache_dtype": (["--kv-cache-dtype", "fp8"], "fp8"),
    "block_size": (["--block-size", "32"], 32),
    "max_model_len": (["--max-model-len", "777"], 777),
    "max_num_seqs": (["--max-num-seqs", "5"], 5),
    "max_num_batched_tokens": (["--max-num-batched-tokens", "99"], 99),
    "kv_cache_memory_bytes": (["--kv-cache-memory-bytes", "12345678"], 12345678),
    "gpu_memory_utilization": (["--gpu-memory-utilization", "0.5"], 0.5),
    "tensor_parallel_size": (["-tp", "2"], 2),
    "quantization": (["-q", "int4"], "int4"),
    "deterministic": (["--deterministic"], True),
    "load_format": (["--load-format", "dummy"], "dummy"),
    "attention_backend": (["--attention-backend", "reference"], "reference"),
    "device": (["--device", "cpu"], "cpu"),
    "seed": (["--seed", "3"], 3),
    "enable_prefix_caching": (["--no-enable-prefix-caching"], False),
}


def parse(arguments: list[str], options: type[Any] = ServeOptions) -> Any:
    """What the command's function would receive."""
    seen: list[Any] = []
    probe = typer.Typer()
    command(probe, options)(seen.append)
    result = CliRunner().invoke(probe, arguments)
    assert result.exit_code == 0, result.output
    return seen[0]


def test_every_engine_setting_has_a_flag_and_the_same_default() -> None:
    assert ENGINE_FLAGS.keys() == {field.name for field in fields(EngineConfig)} - {"model"}
    assert parse([]).engine_config("m") == EngineConfig("m")


@pytest.mark.parametrize("name", ENGINE_FLAGS)
def test_an_engine_flag_reaches_the_engine(name: str) -> None:
    arguments, value = ENGINE_FLAGS[name]
    assert getattr(parse(arguments).engine_config("m"), name) == value


def test_router_flags_are_what_the_router_understands(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["dir", "--host", "::1", "--port", "9000", "--served-model-name", "a", "--served-model-name", "b"]
    arguments += ["--api-key", "secret-key", "--cluster", "blue", "--prefill", "3", "--request-timeout", "7"]
    arguments += ["--generation-config", "none", "--max-num-queued-reqs", "11", "--max-num-queued-tokens", "12"]
    options = parse([*arguments, "--shutdown-timeout", "4", "--log-level", "debug"])
    made = router_command(options, options, "redis://:password@elsewhere", b"k" * 32, options.prefill)
    assert "secret-key" not in " ".join(made.arguments) and "password" not in " ".join(made.arguments)
    for name, value in made.secrets.items():
        monkeypatch.setenv(name, value)
    settings = parse_settings(made.arguments)
    assert (settings.host, settings.port, settings.cluster) == ("::1", 9000, "blue")
    assert (settings.model_dir, settings.served_model_names) == ("dir", ("a", "b"))
    assert (settings.api_keys, settings.redis_url) == (("secret-key",), "redis://:password@elsewhere")
    assert (settings.cluster_key, settings.prefill_expected) == (b"k" * 32, 3)
    assert (settings.request_timeout, settings.generation_config, settings.shutdown_timeout) == (7.0, "none", 4.0)
    assert (settings.max_num_queued_reqs, settings.max_num_queued_tokens) == (11, 12)


def test_secrets_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_API_KEY", "from-the-environment")
    assert parse([]).api_key == "from-the-environment"
    assert parse(["dir"], RouterOptions).api_key == "from-the-environment"


def test_without_a_model_the_packaged_one_is_served() -> None:
    assert ModelFlags().directory.endswith("demo_model")
    assert parse(["elsewhere"]).directory == "elsewhere"


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--block-size", "0"],
        ["serve", "--decode", "0"],
        ["serve", "--prefill", "-1"],
        ["serve", "--port", "70000"],
        ["serve", "--gpu-memory-utilization", "1.5"],
        ["serve", "--dtype", "int3"],
        ["serve", "--no-such-flag"],
    ],
)
def test_wrong_usage_is_exit_code_two(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert arguments[1] in re.sub(r"\x1b\[[0-9;]*m", "", result.stderr)


@pytest.mark.parametrize("role", ["router", "prefill", "decode"])
def test_a_single_role_needs_a_registry(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "00" * 32)
    monkeypatch.delenv("TANDEM_REDIS_URL", raising=False)
    result = CliRunner().invoke(app, [role])
    assert "--redis-url" in str(result.exception)


def test_a_single_role_needs_the_cluster_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    result = CliRunner().invoke(app, ["decode", "--redis-url", "redis://127.0.0.1:1"])
    assert KEY_VARIABLE in str(result.exception)
