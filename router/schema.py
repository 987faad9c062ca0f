"""The JSON bodies of the HTTP API, typed. Strict: "1" and true are no numbers, NaN is no JSON.

Absent and null mean the same everywhere. Ranges are checked in openai.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict, FailFast, ValidationError
from pydantic_core import ErrorDetails, from_json
from typing_extensions import TypeAliasType

from tandem.common.errors import InvalidRequest

# FailFast: a body of 200,000 wrong elements costs one error, not 200,000.
# An alias of its own, because FailFast is not hashable, as members of a union must be.
TokenIds = TypeAliasType("TokenIds", Annotated[list[int], FailFast()])
TokenLists = TypeAliasType("TokenLists", Annotated[list[TokenIds], FailFast()])
Strings = TypeAliasType("Strings", Annotated[list[str], FailFast()])

M = TypeVar("M", bound=BaseModel)


class StrictModel(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class StreamOptions(StrictModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ContentPart(StrictModel):
    type: str
    text: str | None = None


ContentParts = TypeAliasType("ContentParts", Annotated[list[ContentPart], FailFast()])


class Message(StrictModel):
    role: str
    content: str | ContentParts | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None


Messages = TypeAliasType("Messages", Annotated[list[Message], FailFast()])


class GenerationBody(StrictModel):
    """What chat and completions have in common."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | Strings | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None
    user: str | None = None


class ChatBody(GenerationBody):
    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(GenerationBody):
    prompt: str | Strings | TokenIds | TokenLists
    logprobs: int | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None


class TokenizeBody(StrictModel):
    """Either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(StrictModel):
    model: str | None = None
    tokens: TokenIds


def parse_json(data: bytes) -> dict[str, Any]:
    """One JSON object without NaN, Infinity, lone surrogates or deep nesting. Raises InvalidRequest."""
    try:
        value = from_json(data, allow_inf_nan=False)
    except ValueError as exc:
        raise InvalidRequest(f"the request body is not valid JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise InvalidRequest("the request body must be a JSON object")
    return cast(dict[str, Any], value)


def validate(cls: type[M], value: object) -> M:
    """`value` as a `cls`. Raises InvalidRequest that names the first field at fault."""
    try:
        return cls.model_validate(value)
    except ValidationError as exc:
        faults = exc.errors(include_url=False, include_context=False, include_input=False)
        param = _param(faults[0]["loc"])
        raise InvalidRequest(f"{param}: {_reason(faults)}", param=param) from exc


def request_body(cls: type[BaseModel]) -> dict[str, Any]:
    """`cls` as an OpenAPI request body, its nested models written in place."""
    schema = cls.model_json_schema()
    definitions = schema.pop("$defs", {})
    return {"required": True, "content": {"application/json": {"schema": _inline(schema, definitions)}}}


def _inline(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_inline(item, definitions) for item in cast(list[Any], node)]
    if not isinstance(node, dict):
        return node
    fields = cast(dict[str, Any], node)
    if name := str(fields.get("$ref", "")).removeprefix("#/$defs/"):
        return _inline(definitions[name], definitions)
    return {key: _inline(value, definitions) for key, value in fields.items()}


def _reason(faults: Sequence[ErrorDetails]) -> str:
    """Of a union each member has its own fault: tell what all would have taken."""
    if len(faults) > 1 and len({fault["loc"][0] for fault in faults}) == 1:
        return "; or ".join(dict.fromkeys(fault["msg"] for fault in faults))
    return "this field is required" if faults[0]["type"] == "missing" else faults[0]["msg"]


def _param(loc: tuple[int | str, ...]) -> str:
    """`messages[0].role` from ('messages', 0, 'role'); names of union members, such as 'list[str]', are left out."""
    names = {*Message.model_fields, *ContentPart.model_fields, *StreamOptions.model_fields}
    path = str(loc[0])
    for part in loc[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in names:
            path += f".{part}"
    return path
