"""One choice's tokens turned into text: detokenized, ended at stop strings, with logprobs if asked."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.common.detokenizer import (
    BYTE_ALPHABET,
    BYTE_TOKEN,
    REPLACEMENT,
    IncrementalDetokenizer,
    StopChecker,
)
from tandem.common.request import Token
from tandem.common.tokenizer import Tokenizer
from tandem.router.work import OutputOptions

MIN_LOGPROB = -9999.0  # JSON has no -Infinity


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token: str
    bytes: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What one token added to a choice."""

    choice: int  # of the answer: prompt × n + choice of the prompt
    token_id: int
    text: str
    finish_reason: str | None
    logprob: TokenLogprob | None
    offset: int  # characters before this token's own text


class ChoiceText:
    """`put` every token of a choice in order; behind a delta with a finish reason there are no more.

    Invariant: `text` is the texts of all deltas. A worker's stop token counts as a token, but is no text.
    """

    def __init__(self, choice: int, tokenizer: Tokenizer, output: OutputOptions, prompt: str, min_tokens: int) -> None:
        self.choice = choice
        self.pieces: list[str] = []
        self.deltas: list[Delta] = []  # kept for the logprobs only
        self.tokens = 0
        self.token_ids: list[int] = []  # kept if asked for only
        self.finish_reason: str | None = None
        self._tokenizer = tokenizer
        self._output = output
        self._min_tokens = min_tokens
        self._detokenizer = IncrementalDetokenizer(tokenizer, output.skip_special_tokens)
        self._stop = StopChecker(output.stop, output.include_stop)
        self._echo = prompt if output.echo else ""  # goes out with the first token
        self._offset = len(self._echo)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def put(self, token: Token) -> Delta:
        self.tokens += 1
        if self._output.token_ids:
            self.token_ids.append(token.token_id)
        text = self._echo + self._stopped(self._visible(token), last=bool(token.finish_reason))
        self._echo = ""
        self.finish_reason = "stop" if self._stop.matched is not None else token.finish_reason or None
        logprob = self._logprob(token)
        delta = Delta(self.choice, token.token_id, text, self.finish_reason, logprob, self._offset)
        self.pieces.append(text)
        if logprob is not None:
            self.deltas.append(delta)
            self._offset += len(logprob.token)
        return delta

    def _visible(self, token: Token) -> str:
        hidden = token.finish_reason == "stop" and not self._output.include_stop
        text = "" if hidden else self._detokenizer.push(token.token_id)
        return text + self._detokenizer.flush() if token.finish_reason else text

    def _stopped(self, text: str, last: bool) -> str:
        if self.tokens > self._min_tokens:  # stop strings count behind min_tokens only
            text = self._stop.push(text)
        return text + self._stop.flush() if last else text

    def _logprob(self, token: Token) -> TokenLogprob | None:
        if self._output.top_logprobs is None or token.logprobs is None:
            return None
        top = tuple(self._named(token_id, logprob) for token_id, logprob in token.logprobs.top)
        return self._named(token.token_id, token.logprobs.chosen, top)

    def _named(self, token_id: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return TokenLogprob(text, _token_bytes(self._tokenizer, token_id, text), max(logprob, MIN_LOGPROB), top)


def _token_bytes(tokenizer: Tokenizer, token_id: int, text: str) -> bytes:
    """The token's own bytes, also where they are only a part of a character."""
    if REPLACEMENT not in text:
        return text.encode()
    spelled = tokenizer.token(token_id) or ""
    if byte := BYTE_TOKEN.fullmatch(spelled):
        return bytes.fromhex(byte[1])
    if all(character in BYTE_ALPHABET for character in spelled):
        return bytes(BYTE_ALPHABET[character] for character in spelled)
    return text.encode()
