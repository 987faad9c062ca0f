"""Token ids to text, one token at a time: never a part of a character, never text behind a stop string.

    push(id) + push(id) + … + flush() == Tokenizer.decode(ids)

The two decoders that language models use, byte-level and byte-fallback, are followed exactly, at O(1) amortised
per token; any other decoder is asked for the text of a small window of tokens, as TGI and vLLM do.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any, Protocol, cast

from tandem.common.errors import InvalidRequest
from tandem.common.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
MAX_RUN = 64  # bytes of one run of byte tokens that are held back
MAX_WINDOW = 32  # tokens
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class IncrementalDetokenizer:
    """The text of one choice. At its end a cut-off character becomes one U+FFFD."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._stream = _create_stream(tokenizer, skip_special_tokens)

    def push(self, token_id: int) -> str:
        """The text that is certain now; "" while a character is incomplete."""
        return "" if token_id in self._skipped else self._stream.push(token_id)

    def flush(self) -> str:
        """What was held back. Call once, behind the last token."""
        return self._stream.flush()


class StopChecker:
    """Ends the text before (or, with `include`, behind) the stop string that is complete first.

    Text that may become a stop string is held back. The outcome does not depend on how the text is cut into pushes:
    of several matches the one that ends first counts, of those the longest.
    """

    def __init__(self, stop_strings: Sequence[str], include: bool = False) -> None:
        if not all(stop_strings):
            raise InvalidRequest("a stop string must not be empty", param="stop")
        self._stops = tuple(stop_strings)
        self._include = include
        self._longest = max(map(len, stop_strings), default=0)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that may be shown now. Once `matched` is set there is no more."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            end, start, self.matched = min(found)
            return self._release(end if self._include else start)
        return self._release(len(self._held) - self._hold())

    def flush(self) -> str:
        """What was held back and became no stop string."""
        return "" if self.matched is not None else self._release(len(self._held))

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _hold(self) -> int:
        """The length of the longest end of the held text that begins a stop string."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


class _Stream(Protocol):
    def push(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


def _create_stream(tokenizer: Tokenizer, skip_special_tokens: bool) -> _Stream:
    match _decoder_state(tokenizer):
        case {"type": "ByteLevel"}:
            return _ByteLevelStream(tokenizer)
        case {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": str(space)}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *rest,
            ],
        }:
            match rest:
                case []:
                    return _ByteFallbackStream(tokenizer, space, 0)
                case [{"type": "Strip", "content": " ", "start": int(strip), "stop": 0}]:
                    return _ByteFallbackStream(tokenizer, space, strip)
                case _:
                    pass
        case _:
            pass
    return _WindowStream(tokenizer, skip_special_tokens)


def _decoder_state(tokenizer: Tokenizer) -> dict[str, Any] | None:
    decoder = tokenizer.backend.decoder
    if decoder is None:
        return None
    return json.loads(cast(Any, decoder).__getstate__())  # the decoder's part of tokenizer.json


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where it is printable Latin-1, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_ALPHABET = _byte_level_alphabet()


class _ByteLevelStream:
    """A token is bytes, spelled in the alphabet; one that is not so spelled (an added token) is its own text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        token = self._tokenizer.token(token_id)
        return "" if token is None else self._utf8.decode(_spelled_bytes(token))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


def _spelled_bytes(token: str) -> bytes:
    try:
        return bytes([BYTE_ALPHABET[character] for character in token])
    except KeyError:
        return token.encode()


class _ByteFallbackStream:
    """A token is text with a mark for the space, or one byte written <0xE4>.

    A run of byte tokens is one text if it is UTF-8 as a whole; otherwise each of its bytes is one U+FFFD. So a run
    is held back until it ends: a word's worth, as spaces end it. One longer than MAX_RUN is shown character by
    character instead, because a stream must not stall.
    """

    def __init__(self, tokenizer: Tokenizer, space: str, strip: int) -> None:
        self._tokenizer = tokenizer
        self._space = space
        self._strip = strip  # leading spaces of the text still to be dropped
        self._run = bytearray()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._long = False  # the run is over the limit, its bytes are in `_utf8`

    def push(self, token_id: int) -> str:
        token = self._tokenizer.token(token_id)
        if token is None:
            return ""
        if byte := BYTE_TOKEN.fullmatch(token):
            return self._push_byte(int(byte[1], 16))
        return self._end_run(final=False) + self._stripped(token.replace(self._space, " "))

    def flush(self) -> str:
        return self._end_run(final=True)

    def _push_byte(self, byte: int) -> str:
        self._run.append(byte)
        if len(self._run) <= MAX_RUN and not self._long:
            return ""
        self._long = True
        data = bytes(self._run)
        self._run.clear()
        return self._stripped(self._utf8.decode(data))

    def _end_run(self, final: bool) -> str:
        data = bytes(self._run)
        self._run.clear()
        if self._long:
            self._long = False
            text = self._utf8.decode(data, final=True)
            self._utf8.reset()
        else:
            text = _run_text(data, final)
        return self._stripped(text)

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if not text.startswith(" "):
                self._strip = 0
                break
            text = text[1:]
            self._strip -= 1
        return text


def _run_text(data: bytes, final: bool) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        if final and exc.end == len(data) and exc.reason == "unexpected end of data":
            return data[: exc.start].decode() + REPLACEMENT  # cut off inside a character
        return REPLACEMENT * len(data)


class _WindowStream:
    """Decodes the tokens since the last two releases with and without the newest, and releases the difference.

    ids    [ … | anchor | held back | newest ]     the anchor makes the decoder treat the rest as a continuation
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._anchor: list[int] = []
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        self._held.append(token_id)
        text = self._pending()
        if (not text or text.endswith(REPLACEMENT)) and len(self._held) < MAX_WINDOW:
            return ""
        self._anchor, self._held = self._held, []
        return text

    def flush(self) -> str:
        text = self._pending()
        self._held = []
        return text

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._anchor, self._skip)
        return self._tokenizer.decode([*self._anchor, *self._held], self._skip)[len(before) :]
