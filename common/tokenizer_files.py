"""The files of a model directory that concern its tokenizer, read once and checked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import tokenizers

from tandem.common.errors import ModelError

Json = dict[str, Any]

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_PROPERTIES = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """`named` maps "bos_token" … to the token's text. `added` are tokens that must exist besides tokenizer.json's."""

    tokenizer: Path
    named: dict[str, str]
    added: tuple[tokenizers.AddedToken, ...]
    eos_token_ids: frozenset[int]
    template: Path  # where `chat_template` was found, or is missed
    chat_template: str | None

    @classmethod
    def read(cls, directory: Path) -> TokenizerFiles:
        """Raises ModelError naming the file and the fault."""
        if not directory.is_dir():
            raise ModelError(f"{directory}: no such model directory")
        path = directory / "tokenizer_config.json"
        config = _read_json(path)
        decoder = _section(path, config, "added_tokens_decoder")
        if not decoder:  # transformers reads the older file only then
            config |= {key: value for key, value in _read_json(directory / "special_tokens_map.json").items() if value}
        named = {name: content for name in NAMED if (content := _content(path, name, config.get(name))) is not None}
        added = [_added_token(path, key, decoder[key]) for key in sorted(decoder, key=_as_index)]
        added += [tokenizers.AddedToken(content, special=True, normalized=False) for content in named.values()]
        return cls(
            directory / "tokenizer.json", named, tuple(added), _eos_token_ids(directory), *_template(directory, config)
        )


def load_backend(files: TokenizerFiles) -> tokenizers.Tokenizer:
    """Raises ModelError. Padding and truncation that the file asks for were for training; they are off."""
    path = files.tokenizer
    if not path.is_file():
        raise ModelError(f"{path}: missing; Tandem needs the fast tokenizer's file")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as exc:  # the only class that `tokenizers` raises
        raise ModelError(f"{path}: not a tokenizer: {_first_line(exc)}") from exc
    backend.no_padding()
    backend.no_truncation()
    for token in files.added:
        _add(backend, token)
    return backend


def _add(backend: tokenizers.Tokenizer, token: tokenizers.AddedToken) -> None:
    """tokenizer.json wins: only what it does not know yet as an added token is added."""
    if token.content in {known.content for known in backend.get_added_tokens_decoder().values()}:
        return
    if token.special:
        backend.add_special_tokens([token])
    else:
        backend.add_tokens([token])


def _eos_token_ids(directory: Path) -> frozenset[int]:
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = _read_json(directory / name).get("eos_token_id")
        ids = cast(list[Any], value) if isinstance(value, list) else [] if value is None else [value]
        for token_id in ids:
            if type(token_id) is not int or token_id < 0:
                raise ModelError(f"{directory / name}: eos_token_id is {value!r}, not a token id or a list of them")
            found.add(token_id)
    return frozenset(found)


def _template(directory: Path, config: Json) -> tuple[Path, str | None]:
    """A chat_template.jinja wins; else tokenizer_config.json holds one, or a list of them with names."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path, _read_text(path)
    path = directory / "tokenizer_config.json"
    value: Any = config.get("chat_template")
    if isinstance(value, list):
        items = [cast(Json, item) for item in cast(list[Any], value) if isinstance(item, dict)]
        value = next((item.get("template") for item in items if item.get("name") == "default"), None)
    if value is not None and not isinstance(value, str):
        raise ModelError(f"{path}: chat_template is neither a string nor a list")
    return path, value


def _added_token(path: Path, key: str, value: Any) -> tokenizers.AddedToken:
    content = _content(path, f"added_tokens_decoder.{key}", value)
    if content is None:
        raise ModelError(f"{path}: added_tokens_decoder.{key} is no token")
    properties = {name: bool(value[name]) for name in _PROPERTIES if name in value} if isinstance(value, dict) else {}
    return tokenizers.AddedToken(content, **properties)


def _content(path: Path, name: str, value: Any) -> str | None:
    """A token is written as its text, or as an object with its text under "content"."""
    if isinstance(value, dict):
        value = cast(Json, value).get("content")
    if value is None or isinstance(value, str):
        return value or None
    raise ModelError(f"{path}: {name} is neither a string nor an object with a string as content")


def _section(path: Path, config: Json, name: str) -> Json:
    value: Any = config.get(name, {})
    if not isinstance(value, dict):
        raise ModelError(f"{path}: {name} is not an object")
    return cast(Json, value)


def _as_index(key: str) -> tuple[int, str]:
    return (int(key) if key.isdecimal() else -1, key)


def _read_json(path: Path) -> Json:
    """An object; an empty one if the file does not exist. Raises ModelError."""
    if not path.exists():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as exc:
        raise ModelError(f"{path}: not valid JSON: {_first_line(exc)}") from exc
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object")
    return cast(Json, value)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ModelError(f"{path}: cannot be read: {_first_line(exc)}") from exc


def _first_line(exc: BaseException) -> str:
    return next(_lines(str(exc)), type(exc).__name__)


def _lines(text: str) -> Iterator[str]:
    return (line for line in text.splitlines() if line)
