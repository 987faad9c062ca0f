"""The OpenAI API's answers as JSON objects: chat and text completions, whole and in chunks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tandem.router.text import ChoiceText, Delta, TokenLogprob
from tandem.router.work import ParsedRequest

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def to_json(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class AnswerFormat(Protocol):
    """How one of the two APIs writes an answer."""

    def opening(self, choice: int) -> Json | None:
        """The chunk before a choice's first."""
        ...

    def chunk(self, delta: Delta) -> Json: ...

    def usage_chunk(self, usage: Usage) -> Json: ...

    def whole(self, choices: Sequence[ChoiceText], usage: Usage) -> Json: ...


class _Format:
    def __init__(self, request: ParsedRequest) -> None:
        self._with_ids = request.output.token_ids

    def _ids(self, token_ids: list[int]) -> Json:
        """vLLM's field, present only when `return_token_ids` was asked."""
        return {"token_ids": token_ids} if self._with_ids else {}


class ChatFormat(_Format):
    def __init__(self, request: ParsedRequest) -> None:
        super().__init__(request)
        self._chunk = _envelope(request, "chat.completion.chunk")
        self._whole = _envelope(request, "chat.completion")

    def opening(self, choice: int) -> Json:
        return self._chunk | {"choices": [self._delta(choice, {"role": "assistant", "content": ""}, None, None)]}

    def chunk(self, delta: Delta) -> Json:
        content = {"content": delta.text} if delta.text or delta.finish_reason is None else {}
        written = self._delta(delta.choice, content, _chat_logprobs([delta]), delta.finish_reason)
        return self._chunk | {"choices": [written | self._ids([delta.token_id])]}

    def usage_chunk(self, usage: Usage) -> Json:
        return self._chunk | {"choices": [], "usage": usage.to_json()}

    def whole(self, choices: Sequence[ChoiceText], usage: Usage) -> Json:
        written = [
            {
                "index": choice.choice,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": _chat_logprobs(choice.deltas),
                "finish_reason": choice.finish_reason,
                **self._ids(choice.token_ids),
            }
            for choice in choices
        ]
        return self._whole | {"choices": written, "usage": usage.to_json()}

    def _delta(self, choice: int, delta: Json, logprobs: Json | None, finish_reason: str | None) -> Json:
        return {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


class CompletionFormat(_Format):
    def __init__(self, request: ParsedRequest) -> None:
        super().__init__(request)
        self._envelope = _envelope(request, "text_completion")

    def opening(self, choice: int) -> None:
        return None

    def chunk(self, delta: Delta) -> Json:
        written = _text_choice(delta.choice, delta.text, _text_logprobs([delta]), delta.finish_reason)
        return self._envelope | {"choices": [written | self._ids([delta.token_id])]}

    def usage_chunk(self, usage: Usage) -> Json:
        return self._envelope | {"choices": [], "usage": usage.to_json()}

    def whole(self, choices: Sequence[ChoiceText], usage: Usage) -> Json:
        written = [
            _text_choice(choice.choice, choice.text, _text_logprobs(choice.deltas), choice.finish_reason)
            | self._ids(choice.token_ids)
            for choice in choices
        ]
        return self._envelope | {"choices": written, "usage": usage.to_json()}


def _envelope(request: ParsedRequest, kind: str) -> Json:
    return {"id": request.id, "object": kind, "created": int(time.time()), "model": request.model}


def _text_choice(index: int, text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _chat_logprobs(deltas: Sequence[Delta]) -> Json | None:
    """None where no logprobs were asked."""
    content = [
        _chat_logprob(delta.logprob) | {"top_logprobs": [_chat_logprob(item) for item in delta.logprob.top]}
        for delta in deltas
        if delta.logprob is not None
    ]
    return {"content": content, "refusal": None} if content else None


def _chat_logprob(item: TokenLogprob) -> Json:
    return {"token": item.token, "logprob": item.logprob, "bytes": list(item.bytes)}


def _text_logprobs(deltas: Sequence[Delta]) -> Json | None:
    found = [(delta.logprob, delta.offset) for delta in deltas if delta.logprob is not None]
    if not found:
        return None
    return {
        "tokens": [item.token for item, _ in found],
        "token_logprobs": [item.logprob for item, _ in found],
        # the sampled token is always among them, as in OpenAI's API
        "top_logprobs": [{entry.token: entry.logprob for entry in (*item.top, item)} for item, _ in found],
        "text_offset": [offset for _, offset in found],
    }
