"""What a client asked, as every part sees it: validated once by the router, immutable afterwards."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.common.errors import TandemError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    `seed` is always set (the router draws one when the client gave none), because the noise of a token is a
    function of (seed, choice, token index): the same request continues identically on any worker.
    `stop_token_ids` already contains the model's end-of-sequence ids unless `ignore_eos` was asked.
    """

    max_tokens: int
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    seed: int = 0  # unsigned 64 bits
    min_tokens: int = 0  # stop ids are forbidden before so many output tokens
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None  # None: none; k: the chosen token's and those of the k likeliest

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def finish_reason(self, output_len: int, last_token: int) -> str:
        """Why a choice ends behind its `output_len`-th token: "stop", "length", or "" while it goes on."""
        if output_len >= self.min_tokens and last_token in self.stop_token_ids:
            return "stop"
        return "length" if output_len >= self.max_tokens else ""


@dataclass(frozen=True, slots=True)
class Leg:
    """One attempt's work order for one worker: generate `choices` of a request.

    Several choices share the prompt, so they have no output yet. A leg that resumes after a lost worker carries
    one choice and the tokens its client already has in `output_ids`.
    """

    request_id: str
    attempt: int
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    choices: tuple[int, ...] = (0,)
    output_ids: tuple[int, ...] = ()
    cache_salt: bytes = b""  # separates the prefix caches of tenants
    timeout: float = 600.0  # seconds left until the request's deadline when the leg was sent
    ticket: bytes = b""  # encoded Ticket; empty: the decode worker prefills the prompt itself


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural log probabilities of one sampled token and of the likeliest ones, best first."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Token:
    """One sampled token of one choice. `index` counts output tokens from 0 without gaps."""

    choice: int
    index: int
    token_id: int
    finish_reason: str = ""  # "" while the choice goes on; "stop" or "length" on its last token
    logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True)
class LegStats:
    """A finished leg's timeline on its worker, seconds, and its prefix cache hit, tokens."""

    queued: float = 0.0  # from arrival to the first chunk
    computed: float = 0.0  # from the first chunk to the first token
    handed_off: float = 0.0  # from the first token to the decode worker's Ack
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LegUpdate:
    """What a worker tells about a leg: new tokens, and at its end either `stats` or `error`."""

    tokens: tuple[Token, ...] = ()
    stats: LegStats | None = None
    error: TandemError | None = None

    @property
    def last(self) -> bool:
        return self.stats is not None or self.error is not None
