"""An admitted request's answer: its prompts run side by side, their tokens become text, text becomes JSON.

    Dispatcher ──tokens──► PromptSink ──► ChoiceText ──Delta──► whole(): one object · stream(): server-sent events

Detokenizing is part of taking a token, so a stop string ends the workers' legs at once.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine
from typing import Any

from tandem.common.errors import Overloaded, TandemError
from tandem.common.failpoints import failpoint
from tandem.common.request import Token
from tandem.common.tokenizer import Tokenizer
from tandem.router.admission import Admission, Entry
from tandem.router.dispatch import Dispatcher, together
from tandem.router.formats import AnswerFormat, Usage
from tandem.router.metrics import RequestTimeline, RouterMetrics
from tandem.router.outbox import Outbox
from tandem.router.text import ChoiceText, Delta
from tandem.router.work import ParsedRequest, Work

DONE = b"data: [DONE]\n\n"
PARALLEL_PROMPTS = 64  # of one request

Part = Coroutine[Any, Any, None]  # one prompt's way to its last token


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class PromptSink:
    """Takes the tokens of one prompt; `room` is the client's."""

    def __init__(self, choices: list[ChoiceText], entry: Entry, timeline: RequestTimeline, answer: Answer) -> None:
        self._choices = choices
        self._entry = entry
        self._timeline = timeline
        self._answer = answer

    def put(self, token: Token) -> bool:
        failpoint("router.token" if token.index else "router.first_token")
        self._entry.leave(served=True)
        choice = self._choices[token.choice]
        self._timeline.token(choice.choice)
        self._answer.take(choice.put(token))
        return choice.finish_reason is not None

    async def room(self) -> None:
        if self._answer.outbox is not None:
            await self._answer.outbox.room()


class Answer:
    """The answer to one request in the making; with an outbox it leaves in chunks."""

    def __init__(self, request: ParsedRequest, form: AnswerFormat, outbox: Outbox | None) -> None:
        self.choices: list[ChoiceText] = []
        self.cached_tokens = 0
        self.outbox = outbox
        self.queue_limit = asyncio.timeout(None)  # until the first token
        self._request = request
        self._form = form

    @property
    def usage(self) -> Usage:
        completion = sum(choice.tokens for choice in self.choices)
        return Usage(self._request.prompt_tokens, completion, self.cached_tokens)

    def take(self, delta: Delta) -> None:
        if self.queue_limit.when() is not None and not self.queue_limit.expired():
            self.queue_limit.reschedule(None)
        if self.outbox is None:
            return
        output = self._request.output
        if self.choices[delta.choice].tokens == 1:
            self._send(self._form.opening(delta.choice))
        every = output.token_ids or output.continuous_usage  # also tokens that are no text yet
        if delta.text or delta.finish_reason or delta.logprob or every:
            self._send(self._form.chunk(delta))

    def finish_stream(self) -> None:
        if self.outbox is not None:
            if self._request.output.include_usage:
                self.outbox.put(event(self._form.usage_chunk(self.usage)))
            self.outbox.put(DONE)

    def _send(self, chunk: dict[str, Any] | None) -> None:
        if chunk is None or self.outbox is None:
            return
        if self._request.output.continuous_usage:
            chunk["usage"] = self.usage.to_json()
        elif self._request.output.include_usage:
            chunk["usage"] = None
        self.outbox.put(event(chunk))

    def whole(self) -> dict[str, Any]:
        return self._form.whole(self.choices, self.usage)


class Completions:
    """Serves parsed requests of both APIs."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        admission: Admission,
        tokenizer: Tokenizer,
        metrics: RouterMetrics,
        queue_timeout: float,
    ) -> None:
        """`queue_timeout`: seconds from a request's arrival within which it must have its first token."""
        self._queue_timeout = queue_timeout
        self._dispatcher = dispatcher
        self._admission = admission
        self._tokenizer = tokenizer
        self._metrics = metrics

    async def whole(self, request: ParsedRequest, form: AnswerFormat) -> dict[str, Any]:
        """The complete answer. Raises TandemError."""
        answer = Answer(request, form, None)
        await self._run(answer, request)
        return answer.whole()

    async def stream(self, request: ParsedRequest, form: AnswerFormat, outbox: Outbox) -> None:
        """Fill and close `outbox`; an error of ours is handed over in it."""
        answer = Answer(request, form, outbox)
        try:
            await self._run(answer, request)
        except TandemError as exc:
            outbox.close(exc)
            return
        answer.finish_stream()
        outbox.close()

    async def _run(self, answer: Answer, request: ParsedRequest) -> None:
        with self._metrics.request(request) as timeline:
            lengths = [len(work.prompt_ids) for work in request.works]
            entries = self._admission.admit(lengths, request.choices)
            try:
                failpoint("router.admitted")
                await self._within_limit(answer, request, self._parts(answer, request, entries, timeline))
            except Overloaded as exc:
                exc.retry_after = exc.retry_after or self._admission.retry_after()
                raise
            finally:
                for entry in entries:
                    entry.leave(served=False)
            timeline.finished([choice.finish_reason or "" for choice in answer.choices], answer.usage)

    async def _within_limit(self, answer: Answer, request: ParsedRequest, parts: list[Part]) -> None:
        """Raises Overloaded when no first token comes in time."""
        answer.queue_limit = asyncio.timeout(request.arrival + self._queue_timeout - time.monotonic())
        try:
            async with answer.queue_limit:
                await together(*parts)
        except TimeoutError as exc:
            raise Overloaded(f"no first token came within {self._queue_timeout:g} s; try again later") from exc

    def _parts(
        self, answer: Answer, request: ParsedRequest, entries: list[Entry], timeline: RequestTimeline
    ) -> list[Part]:
        gate = asyncio.Semaphore(PARALLEL_PROMPTS)
        parts: list[Part] = []
        for work, entry in zip(request.works, entries, strict=True):
            choices = self._choices(len(answer.choices), work, request)
            answer.choices += choices
            parts.append(self._prompt(work, PromptSink(choices, entry, timeline, answer), gate, answer))
        return parts

    async def _prompt(self, work: Work, sink: PromptSink, gate: asyncio.Semaphore, answer: Answer) -> None:
        async with gate:
            cached_tokens = await self._dispatcher.run(work, sink)
        answer.cached_tokens += cached_tokens

    def _choices(self, first: int, work: Work, request: ParsedRequest) -> list[ChoiceText]:
        output = request.output
        prompt = self._tokenizer.decode(work.prompt_ids) if output.echo else ""
        return [
            ChoiceText(first + choice, self._tokenizer, output, prompt, work.sampling.min_tokens)
            for choice in range(work.choices)
        ]
