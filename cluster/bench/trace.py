"""Traces in the format published with Mooncake (FAST'25): a JSON object a line with `timestamp` in milliseconds,
`input_length` and `output_length` in tokens, and `hash_ids`, the names of the prompt's 512-token blocks. Two requests
share a prefix exactly as far as their leading ids agree."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from tandem.common.errors import ConfigError

BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TraceRequest:
    at: float  # seconds after the first request
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


@lru_cache(maxsize=1)
def read_trace(path: Path) -> tuple[TraceRequest, ...]:
    """In the order of time. Raises ConfigError, which names the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read the trace {path}: {exc}") from exc
    found = [_request(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ConfigError(f"the trace {path} has no requests in it")
    first = min(at for at, _ in found)
    return tuple(
        TraceRequest(at - first, request["input_length"], request["output_length"], tuple(request["hash_ids"]))
        for at, request in sorted(found, key=lambda pair: pair[0])
    )


def _request(where: str, line: str) -> tuple[float, dict[str, Any]]:
    """Seconds, and the checked object."""
    try:
        request = cast(dict[str, Any], json.loads(line))
        at = float(request["timestamp"]) / 1e3
        lengths = (request["input_length"], request["output_length"])
        ids = cast(list[object], request["hash_ids"])
        numbers = [*lengths, *ids]
    except (ValueError, TypeError, KeyError) as exc:
        wanted = "an object with timestamp, input_length, output_length and hash_ids"
        raise ConfigError(f"{where}: expected {wanted}, got {line[:80]!r}") from exc
    if not all(type(number) is int and number >= 0 for number in numbers) or lengths[0] == 0:
        raise ConfigError(f"{where}: lengths and hash_ids have to be whole numbers, and input_length at least 1")
    if len(ids) != math.ceil(lengths[0] / BLOCK_TOKENS):
        blocks = math.ceil(lengths[0] / BLOCK_TOKENS)
        raise ConfigError(f"{where}: {lengths[0]} tokens are {blocks} blocks of {BLOCK_TOKENS}, not {len(ids)}")
    return at, request
