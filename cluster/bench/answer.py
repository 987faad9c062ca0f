"""One request's answer as it comes: when, how many tokens, and what went wrong.

Invariant: `times` and `counts` have an element per delivery, the tokens that one read from the socket brought. What
arrives together was waited for together, so several tokens in one event, or several events in one read, never count as
waits of nothing.
"""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

Json = dict[str, Any]


class Failure(NamedTuple):
    kind: str
    message: str


@dataclass(slots=True)
class Answer:
    """Times are readings of time.perf_counter, in seconds."""

    expected: int  # tokens
    keep: bool = False  # the text and the token ids, for the next turn
    due: float = 0.0
    sent: float = 0.0
    times: array[float] = field(default_factory=lambda: array("d"))
    counts: array[int] = field(default_factory=lambda: array("L"))
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, where the server tells
    text: str = ""
    token_ids: list[int] = field(default_factory=list[int])
    failure: Failure | None = None
    complete: bool = False  # the stream's last event has come
    _usage: Json | None = None
    _rest: bytes = b""

    def fail(self, kind: str, message: str) -> None:
        """The first failure counts."""
        self.failure = self.failure or Failure(kind, message[:300])

    def feed(self, data: bytes, now: float) -> None:
        """A part of the event stream. Raises ValueError, TypeError, KeyError or AttributeError where it is none."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def finish(self) -> None:
        """Nothing more will come: complete the counts, and see that all is there."""
        if self._usage is not None:
            self.prompt_tokens = self._usage["prompt_tokens"]
            details: Json = self._usage.get("prompt_tokens_details") or {}
            self.cached_tokens = details.get("cached_tokens") or 0
        if self.failure is None:
            self._check()

    def _check(self) -> None:
        if not self.complete:
            self.fail("cut off", f"the answer ended without [DONE], after {sum(self.counts)} tokens")
        elif self._usage is None:
            self.fail("no usage", "the server sent no usage, so its tokens are not known")
        elif self.tokens != self.expected or not self.times:
            self.fail("length", f"{self.tokens} tokens in {len(self.times)} parts instead of {self.expected} tokens")

    def _event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self.complete = True
            return
        event = cast(Json, json.loads(data))
        if event.get("error"):
            self.fail("error event", str(event["error"]))
        usage = event.get("usage")
        before = self.tokens
        if usage:
            self._usage, self.tokens = usage, usage["completion_tokens"]
        for choice in event.get("choices") or ():
            text = _text_of(choice)
            self._deliver(self.tokens - before if usage else int(_bears_token(choice, text)), now)
            if self.keep:
                self.text += text
                self.token_ids += choice.get("token_ids") or ()

    def _deliver(self, tokens: int, now: float) -> None:
        if tokens <= 0:
            return
        if self.times and self.times[-1] == now:
            self.counts[-1] += tokens
        else:
            self.times.append(now)
            self.counts.append(tokens)

    # ------------------------------------------------------------------------------------------- seconds, once finished
    @property
    def ttft(self) -> float:
        return self.times[0] - self.sent

    @property
    def e2el(self) -> float:
        """From sending to the last token."""
        return self.times[-1] - self.sent

    @property
    def tpot(self) -> float | None:
        """From the first delivery to the last, by the tokens behind the first; None: there are none."""
        rest = self.tokens - self.counts[0]
        return (self.times[-1] - self.times[0]) / rest if rest > 0 and len(self.times) > 1 else None

    def waits(self, since: float = float("-inf"), until: float = float("inf")) -> list[float]:
        """ITL: of each token behind the first delivery the wait from the delivery before its own, undivided. Those
        delivered within [since, until] only."""
        found: list[float] = []
        for index in range(1, len(self.times)):
            if since <= self.times[index] <= until:
                found += [self.times[index] - self.times[index - 1]] * self.counts[index]
        return found


def _text_of(choice: Json) -> str:
    delta = choice.get("delta")
    if delta is None:
        return choice.get("text") or ""
    return delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""


def _bears_token(choice: Json, text: str) -> bool:
    """For servers without usage in each event: the opening and the closing event without text carry none."""
    return bool(text) or not (choice.get("finish_reason") or "role" in (choice.get("delta") or ()))
