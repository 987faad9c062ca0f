"""Renders the chat template of a model: a Jinja program of somebody else's, over a client's messages.

It runs in Jinja's immutable sandbox with the environment that `transformers` gives it (chat_template_utils.py), so
that every template of the hub renders the same text. Client text that would read as a special token leaves wrapped
in two marks (Unicode noncharacters, which no text may contain); Tokenizer.encode_chat turns them into plain text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from tandem.common.errors import InvalidRequest, ModelError

MARK_START = "\ufdd0"
MARK_END = "\ufdd1"
MAX_RENDERED = 4 << 20  # characters

# What a client's chat_template_kwargs cannot replace.
RESERVED = frozenset({"messages", "raise_exception", "strftime_now"})

Messages = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """`source` is None for a model without one. `tokens` are the named special tokens that templates refer to
    (bos_token, eos_token, …); `protect` marks special tokens in a client's string.

    Raises ModelError if `source` is no Jinja template.
    """

    def __init__(
        self, source: str | None, tokens: Mapping[str, str], protect: Callable[[str], str] | None = None
    ) -> None:
        self.source = source
        self._tokens = dict(tokens)
        self._protect = protect or (lambda text: text)
        self._template = None if source is None else _compile(source)

    def render(self, messages: Messages, /, *, add_generation_prompt: bool = True, **kwargs: Any) -> str:
        """The text of the prompt. `kwargs` are JSON values that the template may read (tools, documents, …).

        Raises InvalidRequest: no template, malformed messages, too long, or whatever the template objects to.
        """
        if self._template is None:
            raise InvalidRequest(
                "this model has no chat template, so it cannot serve chat completions; use /v1/completions",
                param="messages",
            )
        if reserved := RESERVED & kwargs.keys():
            raise InvalidRequest(f"a chat template argument may not be named {min(reserved)!r}", param=min(reserved))
        variables = {**self._tokens, "tools": None, "documents": None, **self._clean(kwargs)}
        variables["messages"] = self._clean(_plain_messages(messages))
        return self._run(self._template, {**variables, "add_generation_prompt": add_generation_prompt})

    def _run(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        pieces: list[str] = []
        length = 0
        try:
            for piece in template.generate(variables):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_RENDERED:
                    break
        except Exception as exc:  # a foreign program, which may raise anything about what it was given
            raise InvalidRequest(f"the model's chat template refused the messages: {exc}", param="messages") from exc
        if length > MAX_RENDERED:
            raise InvalidRequest(f"the rendered chat has more than {MAX_RENDERED} characters", param="messages")
        return "".join(pieces)

    def _clean(self, value: Any) -> Any:
        """A copy made of plain JSON types, its strings protected (but not its keys)."""
        if isinstance(value, str):
            return self._protect(value)
        if isinstance(value, Mapping):
            items = cast(Mapping[str, Any], value).items()
            return {str(key): self._clean(item) for key, item in items}
        if isinstance(value, list | tuple):
            return [self._clean(item) for item in cast(Sequence[Any], value)]
        if value is None or isinstance(value, bool | int | float):
            return value
        raise InvalidRequest(f"a chat template cannot be given a value of type {type(value).__name__}")


def unmark(text: str) -> str:
    """Rendered text as a reader wants to see it."""
    return text.replace(MARK_START, "").replace(MARK_END, "")


def _plain_messages(messages: Messages) -> list[dict[str, Any]]:
    """Content as one string, and no None: many templates print a list or None as Python would."""
    if not messages:
        raise InvalidRequest("messages is empty; send at least one message", param="messages")
    return [_plain_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _plain_message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(cast(Mapping[str, Any], message).get("role"), str):
        raise InvalidRequest(f"{where} has no role", param=f"{where}.role")
    plain = {key: value for key, value in cast(Mapping[str, Any], message).items() if value is not None}
    if isinstance(plain.get("content"), list | tuple):
        plain["content"] = _join_parts(f"{where}.content", plain["content"])
    elif not isinstance(plain.get("content", ""), str):
        raise InvalidRequest(f"{where}.content is neither a string nor a list of parts", param=f"{where}.content")
    return plain


def _join_parts(where: str, parts: Sequence[Any]) -> str:
    """Parts are joined by a line break, as vLLM does; so no special token can be assembled from two of them."""
    texts: list[str] = []
    for index, part in enumerate(parts):
        text = cast(Mapping[str, Any], part).get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str) or cast(Mapping[str, Any], part).get("type") != "text":
            param = f"{where}[{index}]"
            raise InvalidRequest(f'{param} is not of the form {{"type": "text", "text": "…"}}', param=param)
        texts.append(text)
    return "\n".join(texts)


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks text for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as exc:
        raise ModelError(f"the chat template is broken in line {exc.lineno}: {exc.message}") from exc


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape HTML, which the models never saw in training."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
