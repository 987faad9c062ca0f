"""What the router reads of a model's directory beside the tokenizer: a few numbers, no weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

from tandem.common.errors import ModelError
from tandem.common.limits import RANGES

DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_vocab_size(directory: Path) -> int:
    """The rows of the embedding: what token ids the model takes. Raises ModelError."""
    path = directory / "config.json"
    config = _read_object(path)
    size = config.get("vocab_size")
    if type(size) is not int or size < 1:
        raise ModelError(f"{path}: vocab_size is {size!r}, not a positive integer")
    return size


def read_sampling_defaults(directory: Path) -> dict[str, float]:
    """What the model's author wants for requests that say nothing; {} without the file. Raises ModelError."""
    path = directory / "generation_config.json"
    if not path.exists():
        return {}
    config = _read_object(path)
    defaults = {name: config[name] for name in DEFAULTS if config.get(name) is not None}
    if config.get("do_sample") is False:  # written out, it is the author's word for greedy
        defaults["temperature"] = 0.0
    for name, value in defaults.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ModelError(f"{path}: {name} is {value!r}, not a number")
        if not RANGES[name].low <= value <= RANGES[name].high:
            raise ModelError(f"{path}: {name} = {value!r} is out of range")
    return defaults


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ModelError(f"{path} cannot be read: {exc}") from exc
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return cast(dict[str, Any], value)
