"""The flags of `tandem bench`. Where `vllm bench serve` has one, its name works, as the first or the second."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from tandem.common.errors import ConfigError

DEFAULT_SERVER = "http://127.0.0.1:8000"
FIRST_TOKEN_ID = 10  # leaves the special tokens out
CONCURRENCY = 8  # of a closed loop, where nothing is said
REQUESTS = 32  # where neither a number nor a duration is given
OBJECTIVES = ("ttft", "itl", "tpot", "e2el")

_COUNT_NAMES = ("--requests", "--num-prompts", "--max-requests")
_OBJECTIVE = re.compile(rf"({'|'.join(OBJECTIVES)}):(\d+(?:\.\d+)?)")


class Workload(StrEnum):
    random = "random"
    shared_prefix = "shared-prefix"
    multi_turn = "multi-turn"
    trace = "trace"
    disturbed = "disturbed"


class EndpointType(StrEnum):
    completions = "completions"
    chat = "chat"


def _flag(help_text: str, *names: str, **extra: Any) -> Any:
    return typer.Option(*names, help=help_text, **extra)


@dataclass(frozen=True, kw_only=True)
class WorkloadFlags:
    workload: Annotated[Workload, _flag("What is sent.")] = Workload.random
    endpoint_type: Annotated[EndpointType, _flag("Prompts are token ids, or words: about as many.")] = (
        EndpointType.completions
    )
    input_len: Annotated[int, _flag("Tokens of each prompt.", "--input-len", "--random-input-len", min=1)] = 512
    output_len: Annotated[int, _flag("Exactly so many tokens.", "--output-len", "--random-output-len", min=1)] = 64
    range_ratio: Annotated[float, _flag("Lengths vary by this share, up and down.", min=0.0, max=0.99)] = 0.0
    vocab_size: Annotated[int, _flag("Prompts are drawn from the ids below it.", min=FIRST_TOKEN_ID + 2)] = 1000
    prefix_len: Annotated[int, _flag("shared-prefix: tokens in common, before --input-len of its own.", min=1)] = 1500
    groups: Annotated[int, _flag("shared-prefix: how many groups take turns.", min=1)] = 1
    turns: Annotated[int, _flag("multi-turn: requests of a conversation.", min=1)] = 4
    trace: Annotated[Path | None, _flag("trace: a file in Mooncake's format (JSON lines).")] = None
    scale_lengths: Annotated[float, _flag("trace: lengths and blocks times this.", min=0.001, max=10.0)] = 1.0
    speed: Annotated[float, _flag("trace: time runs this much faster.", min=0.001)] = 1.0
    streams: Annotated[int, _flag("disturbed: streams that decode all along.", min=1)] = 4
    long_len: Annotated[int, _flag("disturbed: tokens of the prompts that come in between.", min=1)] = 2000
    long_output_len: Annotated[int, _flag("disturbed: … and of their answers.", min=1)] = 8
    long_interval: Annotated[float, _flag("disturbed: seconds from one to the next.", min=0.01)] = 2.0


@dataclass(frozen=True, kw_only=True)
class LoadFlags:
    concurrency: Annotated[int | None, _flag("Closed loop: so many clients. Default: 8.", min=1)] = None
    request_rate: Annotated[float | None, _flag("Open loop: arrivals a second.", min=0.001)] = None
    burstiness: Annotated[float, _flag("Open loop: shape of the gaps. 1: Poisson; inf: constant.", min=0.001)] = 1.0
    max_concurrency: Annotated[int | None, _flag("Open loop: so many at a time; others wait here.", min=1)] = None
    requests: Annotated[int | None, _flag("How many. Default: 32, or the whole trace.", *_COUNT_NAMES, min=1)] = None
    duration: Annotated[float | None, _flag("Seconds in which requests start.", min=0.001)] = None
    warmup: Annotated[int, _flag("Requests before each run that do not count.", "--warmup", "--num-warmups", min=0)] = 1
    seed: Annotated[int, _flag("Each round, and point of a sweep, has its own from it.")] = 7
    request_timeout: Annotated[float, _flag("Seconds until a request counts as failed.", min=0.001)] = 600.0
    extra_body: Annotated[str | None, _flag("JSON object merged into each request's body.")] = None


@dataclass(frozen=True, kw_only=True)
class BenchOptions(WorkloadFlags, LoadFlags):
    servers: Annotated[list[str] | None, typer.Argument(help=f"NAME=URL … or one URL. Default: {DEFAULT_SERVER}.")] = (
        None
    )
    model: Annotated[str | None, _flag("Default: the first one each server names.")] = None
    api_key: Annotated[str | None, _flag("Sent to every server.", envvar="TANDEM_API_KEY")] = None
    rounds: Annotated[int, _flag("How often; the servers take turns, in reversed order every other time.", min=1)] = 1
    goodput: Annotated[list[str] | None, _flag("Objectives in ms: ttft:500 itl:50 tpot:40 e2el:5000.")] = None
    sweep: Annotated[str | None, _flag("A curve: concurrency=1,2,4 or rate=0.5,1 or workers=1p1d,2p1d.")] = None
    save: Annotated[Path | None, _flag("Write everything there, as JSON.")] = None
    save_requests: Annotated[bool, _flag("… and the times of every request.", "--save-requests")] = False
    plot: Annotated[Path | None, _flag("Draw latency against load and throughput: FILE.png or FILE.svg.")] = None

    @property
    def server_arguments(self) -> list[str]:
        """Without the objectives that, as vLLM spells it, follow `--goodput ttft:500` without a flag of their own."""
        return [text for text in self.servers or [] if not _OBJECTIVE.fullmatch(text)] or [DEFAULT_SERVER]

    @property
    def objectives(self) -> dict[str, float]:
        """Metric → milliseconds. Raises ConfigError."""
        given = " ".join(self.goodput or []).replace(",", " ").split()
        given += [text for text in self.servers or [] if _OBJECTIVE.fullmatch(text)]
        found = {text: _OBJECTIVE.fullmatch(text) for text in given}
        for text, match in found.items():
            if match is None:
                raise ConfigError(f"--goodput {text}: write METRIC:MILLISECONDS with one of {', '.join(OBJECTIVES)}")
        return {match[1]: float(match[2]) for match in found.values() if match}

    @property
    def extra(self) -> dict[str, object]:
        """Raises ConfigError."""
        try:
            return dict(cast(dict[str, object], json.loads(self.extra_body or "{}")))
        except (ValueError, TypeError) as exc:
            raise ConfigError(f"--extra-body is no JSON object: {exc}") from exc

    @property
    def follows_trace(self) -> bool:
        """Whether requests start when the trace says."""
        return self.workload is Workload.trace and self.request_rate is None and self.concurrency is None

    @property
    def session_limit(self) -> int | None:
        """Conversations, which are single requests but for multi-turn; None: what the trace or the duration allows."""
        turns = self.turns if self.workload is Workload.multi_turn else 1
        endless = self.duration is not None or self.workload is Workload.trace
        requests = self.requests or (None if endless else REQUESTS)
        return requests and math.ceil(requests / turns)


_LENGTHS = frozenset(Workload) - {Workload.trace}
_LOADS = frozenset(Workload) - {Workload.disturbed}
_USED_BY: dict[str, frozenset[Workload]] = {
    **dict.fromkeys(("input_len", "output_len"), _LENGTHS),
    "range_ratio": _LENGTHS & _LOADS,
    **dict.fromkeys(("prefix_len", "groups"), frozenset({Workload.shared_prefix})),
    "turns": frozenset({Workload.multi_turn}),
    **dict.fromkeys(("trace", "scale_lengths", "speed"), frozenset({Workload.trace})),
    **dict.fromkeys(("streams", "long_len", "long_output_len", "long_interval"), frozenset({Workload.disturbed})),
    **dict.fromkeys(("concurrency", "request_rate", "max_concurrency", "requests", "duration"), _LOADS),
}


def check(options: BenchOptions) -> None:
    """Flags that contradict each other, before anything is sent. Raises ConfigError."""
    defaults = {field.name: field.default for field in fields(BenchOptions)}
    for name, workloads in _USED_BY.items():
        if options.workload not in workloads and getattr(options, name) != defaults[name]:
            raise ConfigError(f"--{name.replace('_', '-')} says nothing to --workload {options.workload}")
    _ = options.objectives, options.extra  # both raise for what they cannot read
    if options.workload is Workload.trace and options.trace is None:
        raise ConfigError("--workload trace needs --trace FILE")
    if options.concurrency is not None and options.request_rate is not None:
        raise ConfigError("--concurrency is a closed loop, --request-rate an open one; --max-concurrency caps the open")
    is_open = options.request_rate is not None or options.follows_trace
    if options.max_concurrency is not None and not is_open:
        raise ConfigError("--max-concurrency caps an open loop: give --request-rate, or --concurrency alone")
    if options.burstiness != defaults["burstiness"] and options.request_rate is None:
        raise ConfigError("--burstiness shapes the arrivals of --request-rate, which is missing")
    _check_output(options)


def _check_output(options: BenchOptions) -> None:
    if options.save_requests and options.save is None:
        raise ConfigError("--save-requests needs --save FILE")
    if options.plot is not None and options.plot.suffix not in (".png", ".svg"):
        raise ConfigError(f"--plot {options.plot}: the name has to end in .png or .svg")
    for path in (options.save, options.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {path.absolute().parent}")
