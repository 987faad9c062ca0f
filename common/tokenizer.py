"""Text to token ids and back, as `transformers.AutoTokenizer` does it, without importing transformers.

The router starts fast and stays small: all it needs is the `tokenizers` package, `tokenizer.json`, and the names of
the special tokens. What a model directory's files say is checked here, once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from tandem.common.chat_template import MARK_END, MARK_START, ChatTemplate
from tandem.common.errors import InvalidRequest, ModelError
from tandem.common.tokenizer_files import TokenizerFiles, load_backend

_MARKED = re.compile(f"{MARK_START}(.*?){MARK_END}|[{MARK_START}{MARK_END}]", re.DOTALL)
_NO_MARKS = str.maketrans("", "", MARK_START + MARK_END)


@dataclass(frozen=True, slots=True)
class _Specials:
    """How special tokens are recognised in a client's text. `folded` finds those that match behind the normalizer."""

    literal: re.Pattern[str]
    folded: re.Pattern[str] | None


class Tokenizer:
    """Safe to use from several threads: nothing changes after loading."""

    def __init__(self, backend: tokenizers.Tokenizer, files: TokenizerFiles) -> None:
        added = backend.get_added_tokens_decoder()
        self.backend = backend
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size = max(backend.get_vocab_size(with_added_tokens=True), *(i + 1 for i in added), 0)
        self.bos_token_id = self._id(files.named.get("bos_token"))
        eos = self._id(files.named.get("eos_token"))
        self.eos_token_ids = tuple(sorted({*files.eos_token_ids, *(() if eos is None else (eos,))}))
        self._specials = _specials(backend)
        self._newline = self._encode("\n", False)
        try:
            self.chat_template = ChatTemplate(files.chat_template, files.named, self.protect)
        except ModelError as exc:
            raise ModelError(f"{files.template}: {exc.message}") from exc

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Raises ModelError naming the file and the fault."""
        files = TokenizerFiles.read(Path(directory))
        return cls(load_backend(files), files)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Special tokens in `text` are parsed; `add_special_tokens` lets the model's post-processor add its BOS.

        Raises InvalidRequest for text that is no Unicode (lone surrogates).
        """
        return self._encode(text, add_special_tokens)

    def encode_chat(self, text: str) -> list[int]:
        """The ids of what `chat_template.render` returned.

        Special tokens of the template are parsed; what `protect` marked is plain text. The template writes BOS
        itself. Without marks the text is encoded whole. With them it is encoded in pieces, as transformers does for
        `sanitize_control_tokens`.
        """
        pieces = _MARKED.split(text)  # template, marked, template, marked, …; None for a mark that lost its partner
        ids = self._encode(pieces[0], False)
        for index, piece in enumerate(pieces[1:], start=1):
            if piece:
                ids += self._plain_piece(piece) if index % 2 else self._after_newline(piece, False)
        return ids

    def protect(self, text: str) -> str:
        """`text` with marks around everything in it that would be read as a special token."""
        text = text.translate(_NO_MARKS)  # else a client could forge them
        folded = self._specials.folded
        if folded is not None and folded.search(self._normalize(text)):
            return f"{MARK_START}{text}{MARK_END}"
        return self._specials.literal.sub(f"{MARK_START}\\g<0>{MARK_END}", text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Bytes that are no UTF-8 become U+FFFD; ids outside the vocabulary become nothing."""
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; None if there is none."""
        return self.backend.id_to_token(token_id)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()  # `tokenizers` would answer a lone surrogate with a TypeError about something else
        except UnicodeEncodeError as exc:
            raise InvalidRequest(f"the text is not valid Unicode: {exc.reason} at character {exc.start}") from exc
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def _normalize(self, text: str) -> str:
        normalizer = self.backend.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    def _plain(self, text: str) -> list[int]:
        """`text` without any added token: normalizer, pre-tokenizer, model."""
        text = self._normalize(text)
        splitter = self.backend.pre_tokenizer
        words = [text] if splitter is None else [word for word, _ in splitter.pre_tokenize_str(text)]
        return [token.id for word in words for token in self.backend.model.tokenize(word)]

    def _plain_piece(self, piece: str) -> list[int]:
        ids = self._after_newline(piece, True)
        if self.special_ids.isdisjoint(ids):
            return ids
        # The model itself knows the special token as a word: spell it.
        ids = [token_id for character in piece for token_id in self._after_newline(character, True)]
        if self.special_ids.isdisjoint(ids):
            return ids
        raise InvalidRequest(f"the text {piece!r} cannot be told from a special token of this model")

    def _after_newline(self, piece: str, plain: bool) -> list[int]:
        """The ids of a piece from the middle of a text: no prefix space as at the start."""
        ids = self._plain("\n" + piece) if plain else self._encode("\n" + piece, False)
        if ids[: len(self._newline)] == self._newline:
            return ids[len(self._newline) :]
        return self._plain(piece) if plain else self._encode(piece, False)


def _specials(backend: tokenizers.Tokenizer) -> _Specials:
    special = [token for token in backend.get_added_tokens_decoder().values() if token.special]
    normalizer = backend.normalizer
    folded: set[str] = set()
    if normalizer is not None:
        folded = {token.content for token in special if token.normalized}
        folded |= {normalizer.normalize_str(content) for content in folded}
    return _Specials(_any_of({token.content for token in special}), _any_of(folded) if folded else None)


def _any_of(words: set[str]) -> re.Pattern[str]:
    """Longest first: a token takes priority over those it contains. Matches nothing if there are none."""
    longest_first = sorted(words - {""}, key=lambda word: (-len(word), word))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
