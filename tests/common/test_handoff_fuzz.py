"""Hand-off messages from a peer gone wrong: damaged, and made to take memory."""

from __future__ import annotations

import dataclasses
import tracemalloc
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.common import handoff
from tandem.common.handoff import FrameError

INT = st.integers(0, 2**63 - 1)
BY_HINT: dict[Any, st.SearchStrategy[Any]] = {
    int: INT,
    bool: st.booleans(),
    str: st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    bytes: st.binary(max_size=40),
    float: st.floats(allow_nan=False),
    tuple[bytes, ...]: st.lists(st.binary(max_size=20), max_size=4).map(tuple),
    tuple[int, ...]: st.lists(INT, max_size=4).map(tuple),
    tuple[str, ...]: st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), max_size=4).map(tuple),
}


def built(cls: Any) -> st.SearchStrategy[Any]:
    hints = get_type_hints(cls)
    return st.builds(cls, *(BY_HINT[hints[field.name]] for field in dataclasses.fields(cls)))


MESSAGES = st.one_of([built(cls) for cls in get_args(handoff.Message)])
LENGTHS = [
    b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xdf\x7f\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01", b"\xcf" + b"\xff" * 8, b"\x91" * 600, b"\xd9\x02\xff\xfe",
]  # fmt: skip
EDIT = st.tuples(st.integers(0, 2000), st.integers(0, 3), st.sampled_from(LENGTHS) | st.binary(max_size=9))


@settings(max_examples=500)
@given(MESSAGES, st.lists(EDIT, max_size=3))
def test_a_damaged_message_is_a_message_or_a_frame_error(
    message: handoff.Message, edits: list[tuple[int, int, bytes]]
) -> None:
    """Bytes replaced, removed, put in: also lengths that promise gigabytes."""
    data = handoff.encode(message)
    for place, removed, added in edits:
        place %= len(data) + 1
        data = data[:place] + added + data[place + removed :]
    try:
        decoded = handoff.decode(data)
    except FrameError:
        return
    assert type(decoded) in get_args(handoff.Message)
    assert handoff.decode(handoff.encode(decoded)) == decoded


ROW = b"\xdd\x00\x01\x00\x00"  # an array of 65536
BOMBS = {
    "array that promises 4 G": b"\xdd\xff\xff\xff\xff",
    "bytes that promise 4 G": b"\x92\x01\xc6\xff\xff\xff\xff",
    "map that promises 4 G": b"\x92\x01\xdf\xff\xff\xff\xff",
    "deep arrays": b"\x91" * handoff.MAX_MESSAGE_BYTES,
    "arrays of arrays": b"\x94" + (ROW + b"\x91\x90" * 65536) * 4,
    "many floats": ROW + (b"\xcb" + bytes(8)) * 65536,
    "text that is none": b"\x91\xdb\x00\x3f\x00\x00" + b"\xff" * 0x3F0000,
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_no_message_takes_much_more_memory_than_its_size(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(FrameError):
            handoff.decode(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= (1 << 20) + 64 * len(data)
