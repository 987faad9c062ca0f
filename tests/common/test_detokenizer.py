"""Streams of text equal batch decoding, whole characters only; stop strings independent of how text is cut."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.common.detokenizer import MAX_RUN, IncrementalDetokenizer, StopChecker
from tandem.common.errors import InvalidRequest
from tandem.common.tokenizer import Tokenizer
from tests.common.trained import TEXT

EXACT = ["chatml", "llama", "mistral", "legacy"]
ALL = [*EXACT, "words"]
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(TEXT)


def pushes(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    stream = IncrementalDetokenizer(tokenizer, skip)
    return [*(stream.push(token_id) for token_id in ids), stream.flush()]


@pytest.mark.parametrize("kind", ALL)
def test_texts_come_out_as_batch_decoding(loaded: Any, kind: str) -> None:
    tokenizer = loaded[kind]

    @given(UNICODE, st.booleans())
    def check(text: str, skip: bool) -> None:
        ids = tokenizer.encode(text)
        assert "".join(pushes(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)

    check()


@pytest.mark.parametrize("kind", EXACT)
def test_any_ids_come_out_as_batch_decoding(loaded: Any, kind: str) -> None:
    """Random ids: invalid UTF-8 everywhere, special tokens, ids that do not exist, byte tokens in runs."""
    tokenizer = loaded[kind]
    a_byte = st.integers(5, 260)  # of the byte-fallback kinds
    ids = st.lists(st.integers(0, tokenizer.vocab_size + 3) | a_byte, max_size=MAX_RUN // 2)

    @given(ids, st.booleans())
    def check(ids: list[int], skip: bool) -> None:
        # A last token that is text ends what is held back, so the end is no special case here.
        ids = [*ids, tokenizer.encode("x", False)[-1]]
        assert "".join(pushes(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)

    check()


@pytest.mark.parametrize("kind", EXACT)
def test_no_push_ever_shows_half_a_character(loaded: Any, kind: str) -> None:
    tokenizer = loaded[kind]
    text = "Größe 👨‍👩‍👧 你好 👋🏽 é مرحبا"
    shown = pushes(tokenizer, tokenizer.encode(text, False))
    assert not any("\ufffd" in piece for piece in shown)
    assert "".join(shown) == text
    assert sum(map(bool, shown)) > 5  # it does stream


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_a_cut_off_character_becomes_one_replacement(loaded: Any, kind: str, kept: int) -> None:
    tokenizer = loaded[kind]
    ids = [token_id for byte in "a😀".encode()[: 1 + kept] for token_id in one_byte(tokenizer, byte)]
    assert pushes(tokenizer, ids)[-1].endswith("\ufffd")
    assert "".join(pushes(tokenizer, ids)) == "a\ufffd"


def one_byte(tokenizer: Tokenizer, byte: int) -> list[int]:
    spelled = {0xF0: "ð", 0x9F: "Ł", 0x98: "ĺ", 0x80: "Ģ"}.get(byte, chr(byte))  # GPT-2's alphabet
    for name in (f"<0x{byte:02X}>" if byte > 127 else None, spelled):
        found = None if name is None else tokenizer.backend.token_to_id(name)
        if found is not None:
            return [found]
    raise AssertionError(f"no token for byte {byte}")


@pytest.mark.parametrize("kind", ["mistral", "legacy"])
def test_a_long_run_of_byte_tokens_is_shown_before_it_ends(loaded: Any, kind: str) -> None:
    tokenizer = loaded[kind]
    emoji = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in "😀".encode()]
    shown = pushes(tokenizer, emoji * MAX_RUN)
    assert "".join(shown) == "😀" * MAX_RUN
    assert sum(map(len, shown[: 3 * MAX_RUN])) > MAX_RUN // 2


@pytest.mark.parametrize("kind", ALL)
def test_endless_garbage_costs_constant_time_per_token(loaded: Any, kind: str) -> None:
    """Regression guard: holding back while the text ends in U+FFFD makes n invalid tokens cost n²."""
    tokenizer = loaded[kind]
    invalid = tokenizer.backend.token_to_id("<0xFF>") or tokenizer.backend.token_to_id("ÿ") or 10**6

    def seconds(count: int) -> float:
        stream = IncrementalDetokenizer(tokenizer)
        started = time.process_time()
        for _ in range(count):
            stream.push(invalid)
        return time.process_time() - started

    seconds(100)
    assert seconds(8000) < 20 * max(seconds(1000), 0.002)


@pytest.mark.parametrize("kind", EXACT)
def test_special_tokens_are_shown_on_request(loaded: Any, kind: str) -> None:
    tokenizer = loaded[kind]
    end = tokenizer.eos_token_ids[0]
    ids = [*tokenizer.encode("hello", False), end]
    assert "".join(pushes(tokenizer, ids, skip=True)) == "hello"
    assert "".join(pushes(tokenizer, ids, skip=False)) == "hello" + tokenizer.token(end)


# ---------------------------------------------------------------------------------------------------- stop strings


def stopped(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """By definition, one character at a time: the first end of a stop string, of those the longest."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces: list[str] = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [*pieces, text]


SHORT = st.text("ab<", min_size=1, max_size=4)


@given(
    st.text("ab<", max_size=20),
    st.lists(SHORT, max_size=4),
    st.lists(st.integers(0, 4), max_size=12),
    st.booleans(),
)
def test_stop_strings_by_definition(text: str, stops: list[str], sizes: list[int], include: bool) -> None:
    checker = StopChecker(stops, include)
    shown = "".join(checker.push(piece) for piece in cut(text, sizes)) + checker.flush()
    assert (shown, checker.matched) == stopped(text, stops, include)


@given(st.text("ab<", max_size=20), st.lists(SHORT, min_size=1, max_size=3))
def test_what_is_held_back_could_still_become_a_stop_string(text: str, stops: list[str]) -> None:
    checker = StopChecker(stops)
    shown = ""
    for count, character in enumerate(text, start=1):
        shown += checker.push(character)
        if checker.matched is None:
            held = text[len(shown) : count]
            assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_nothing_comes_behind_a_match() -> None:
    checker = StopChecker(["END"])
    assert checker.push("abcEN") == "abc"
    assert checker.push("D more") == ""
    assert checker.matched == "END"
    assert checker.push("text") == ""
    assert checker.flush() == ""


def test_without_stop_strings_nothing_is_held() -> None:
    assert StopChecker([]).push("a") == "a"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        StopChecker(["a", ""])
    assert caught.value.param == "stop"
