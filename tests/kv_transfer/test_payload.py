"""Some layers of some rows, against plain indexing."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from tandem.kv_transfer.payload import Payload, runs_of

MEMORY = torch.arange(20 * 12, dtype=torch.uint8).view(20, 12)
rows = st.lists(st.integers(0, 19), min_size=1, max_size=12)


@given(rows, st.integers(0, 11), st.data())
def test_a_payload_is_what_indexing_gives(rows, start, data):
    stop = data.draw(st.integers(start + 1, 12))
    payload = Payload.layers(MEMORY, rows, start, stop - start)
    expected = MEMORY[rows][:, start:stop]
    assert torch.equal(payload.tensor(), expected) and payload.tensor().is_contiguous()
    assert (len(payload), payload.row_bytes, payload.nbytes) == (len(rows), stop - start, expected.numel())
    assert torch.equal(payload.row(len(rows) - 1), expected[-1])
    cut = data.draw(st.integers(1, len(rows)))
    assert torch.equal(payload[:cut].tensor(), expected[:cut])
    pieces = list(payload.runs())
    assert torch.equal(torch.cat([piece for _, _, piece in pieces]), expected.reshape(-1))
    assert [first for first, _, _ in pieces] == [sum(count for _, count, _ in pieces[:i]) for i in range(len(pieces))]
    assert all(piece.data_ptr() == payload.row(first).data_ptr() for first, _, piece in pieces), "views, no copies"


@given(rows)
def test_runs_are_the_longest_stretches_of_consecutive_numbers(rows):
    runs = list(runs_of(rows))
    assert [row for first, count in runs for row in range(rows[first], rows[first] + count)] == rows
    assert all(rows[second] != rows[first] + count for (first, count), (second, _) in itertools.pairwise(runs))


def test_whole_neighbouring_rows_are_one_view_and_parts_of_rows_are_not():
    assert Payload.whole(MEMORY).tensor().data_ptr() == MEMORY.data_ptr()
    assert len(list(Payload.whole(MEMORY).runs())) == 1
    assert len(list(Payload.layers(MEMORY, range(3, 9), 0, 12).runs())) == 1
    assert len(list(Payload.layers(MEMORY, range(3, 9), 0, 11).runs())) == 6
