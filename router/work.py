"""A validated request as the router's own parts pass it on; made in openai.py and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.common.request import SamplingParams


@dataclass(frozen=True, slots=True)
class Work:
    """One prompt to be answered `choices` times. Its id is ours: nothing of a client's ever names a transfer."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    choices: int
    cache_salt: bytes
    deadline: float  # monotonic seconds


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """How tokens become an answer; workers know nothing of it."""

    stream: bool = False
    include_usage: bool = False  # a last chunk with the usage of a stream
    continuous_usage: bool = False  # … and the usage so far in every chunk
    stop: tuple[str, ...] = ()
    include_stop: bool = False  # leave the stop string or stop token in the text
    skip_special_tokens: bool = True
    echo: bool = False  # the prompt before the answer (completions)
    top_logprobs: int | None = None  # None: no logprobs
    token_ids: bool = False  # beside the text, the ids it was made from


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    id: str  # as the client sees it: "chatcmpl-…" or "cmpl-…"
    model: str  # the name the client used
    works: tuple[Work, ...]  # one per prompt
    output: OutputOptions
    arrival: float  # monotonic seconds

    @property
    def choices(self) -> int:
        """Per prompt."""
        return self.works[0].choices

    @property
    def prompt_tokens(self) -> int:
        return sum(len(work.prompt_ids) for work in self.works)
