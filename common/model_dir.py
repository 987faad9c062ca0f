"""From a model's name to its directory, for the workers (weights) and for the router (the small files only)."""

from __future__ import annotations

import re
from pathlib import Path

from tandem.common.errors import ModelError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
WEIGHT_FILES = ["*.safetensors"]
IGNORED = ["consolidated*", "original/*"]  # the same weights again, under the publisher's own names


def resolve_model(model: str, weights: bool = True) -> Path:
    """The directory of `model`, a path or a Hugging Face hub id (fetched or from its cache). Raises ModelError."""
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path
    if path.exists() or not HUB_ID.fullmatch(model):
        raise ModelError(f"{model!r} is not a directory, and not a Hugging Face hub id (organisation/name)")
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]  # its tqdm_class

    wanted = SMALL_FILES + (WEIGHT_FILES if weights else [])
    try:
        return Path(snapshot_download(model, allow_patterns=wanted, ignore_patterns=IGNORED))
    except Exception as exc:  # the hub's, its HTTP client's and the file system's errors have no common base
        reason = next(iter(str(exc).splitlines()), type(exc).__name__)
        raise ModelError(f"{model!r} is not a directory, and cannot be fetched from the hub: {reason}") from exc


def model_name(model: str) -> str:
    """What clients call `model` when the operator names nothing: a hub id is itself, a directory its last part."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model
