"""What a request's client already has, and so where the next attempt goes on.

Rule H7: token indices of a choice are contiguous from 0, whichever worker sends them; a gap or a repeat ends the
attempt. A choice ends once; what workers send afterwards is dropped. All tokens of a request are one model's: what
began on workers of one identity never goes on elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from tandem.common.errors import WorkerFailed
from tandem.common.request import Leg, Token
from tandem.router.membership import Identity
from tandem.router.work import Work


class Sink(Protocol):
    """Where tokens go. `put` never blocks, so that no token is both counted and lost when a leg is cancelled."""

    def put(self, token: Token) -> bool:
        """Take a token. True: the choice ends here, because a stop string was met."""
        ...

    async def room(self) -> None:
        """Wait while the client is slower than the workers."""
        ...


class Generation:
    """The progress of one Work over all its attempts."""

    def __init__(self, work: Work, sink: Sink) -> None:
        self.work = work
        self.outputs: list[list[int]] = [[] for _ in range(work.choices)]  # token ids, by choice
        self.identity: Identity | None = None  # of the workers that sent the tokens so far; None: nobody did
        self.avoid: set[str] = set()  # incarnations that failed an attempt
        self.transfer_failed = False  # some attempt's hand-off did
        self.cached_tokens = 0  # of the prompt, at the first attempt that told
        self._sink = sink
        self._ended: set[int] = set()
        self._cut: set[int] = set()

    def unfinished(self, choices: Iterable[int]) -> tuple[int, ...]:
        return tuple(choice for choice in choices if choice not in self._ended)

    def cut(self, choices: Iterable[int]) -> bool:
        """Whether one of `choices` met a stop string, which its worker does not know."""
        return any(choice in self._cut for choice in choices)

    def take(self, choices: tuple[int, ...], tokens: Iterable[Token]) -> None:
        """Tokens of a leg that generates `choices`. Raises WorkerFailed when they break H7."""
        for token in tokens:
            if token.choice not in choices:
                raise WorkerFailed(f"worker sent a token of choice {token.choice}, which its leg does not have")
            if not self._late(token.choice):
                self._take(token)

    async def room(self) -> None:
        await self._sink.room()

    def _late(self, choice: int) -> bool:
        """Rule H7, the one place that drops what comes behind a choice's end: tokens, and a second end."""
        return choice in self._ended

    def _take(self, token: Token) -> None:
        output = self.outputs[token.choice]
        if token.index != len(output):
            raise WorkerFailed(f"worker sent token {token.index} of choice {token.choice}, {len(output)} was due")
        output.append(token.token_id)
        stopped = self._sink.put(token)
        if stopped or token.finish_reason:
            self._ended.add(token.choice)
        if stopped and not token.finish_reason:
            self._cut.add(token.choice)

    def groups(self, choices: Iterable[int]) -> list[tuple[int, ...]]:
        """How the unfinished of `choices` are spread over legs: together while nothing is emitted, else one each."""
        rest = self.unfinished(choices)
        if any(self.outputs[choice] for choice in rest):
            return [(choice,) for choice in rest]
        return [rest] if rest else []

    def token_ids(self, choices: tuple[int, ...]) -> tuple[int, ...]:
        """The prompt and what `choices` already have in common: all that the next leg must have in its KV cache."""
        return (*self.work.prompt_ids, *self._common_output(choices))

    def leg(self, choices: tuple[int, ...], attempt: int, timeout: float, ticket: bytes) -> Leg:
        work = self.work
        return Leg(
            request_id=work.id,
            attempt=attempt,
            prompt_ids=work.prompt_ids,
            sampling=work.sampling,
            choices=choices,
            output_ids=self._common_output(choices),
            cache_salt=work.cache_salt,
            timeout=timeout,
            ticket=ticket,
        )

    def _common_output(self, choices: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.outputs[choices[0]]) if len(choices) == 1 else ()
