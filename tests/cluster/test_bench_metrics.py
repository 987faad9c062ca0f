"""The arithmetic: what an event stream says about latency, exactly, with the times given."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from tandem.cluster.bench.answer import Answer
from tandem.cluster.bench.load import Part
from tandem.cluster.bench.metrics import Stats, Summary, meets, percentile
from tests.cluster.scripted_server import DONE, event, final_usage, sse


def heard(expected: int, pieces: Sequence[tuple[float, bytes]], sent: float = 100.0) -> Answer:
    """An answer to a request sent at 100 s, whose pieces came so many seconds later."""
    answer = Answer(expected, due=sent, sent=sent)
    for after, data in pieces:
        answer.feed(data, sent + after)
    answer.finish()
    return answer


def even(tokens: int, first: float, gap: float) -> Answer:
    pieces = [(first + gap * number, event(number + 1)) for number in range(tokens)]
    return heard(tokens, [*pieces, (first + gap * tokens, DONE)])


def test_one_token_an_event() -> None:
    answer = even(5, first=0.5, gap=0.1)
    assert answer.failure is None
    assert answer.ttft == pytest.approx(0.5)
    assert answer.waits() == pytest.approx([0.1] * 4)
    assert answer.tpot == pytest.approx(0.1)
    assert answer.e2el == pytest.approx(0.9)


def test_a_chunk_of_several_tokens_is_a_long_wait_of_each() -> None:
    """Divided by its tokens, or counted once beside waits of nothing, it would flatter the percentiles."""
    answer = heard(9, [(1.0, event(1)), (1.4, event(5)), (1.8, event(9)), (1.8, DONE)])
    assert answer.waits() == pytest.approx([0.4] * 8)
    assert answer.tpot == pytest.approx(0.1)


def test_tokens_of_the_first_chunk_do_not_make_the_rest_look_faster() -> None:
    answer = heard(8, [(1.0, event(6)), (1.2, event(8)), (1.2, DONE)])
    assert answer.tpot == pytest.approx(0.1)  # not 0.2 / 7
    assert answer.waits() == pytest.approx([0.2] * 2)


def test_events_that_one_read_brings_were_waited_for_together() -> None:
    answer = heard(4, [(1.0, event(1)), (1.3, event(2) + event(3) + event(4)), (1.3, DONE)])
    assert answer.waits() == pytest.approx([0.3] * 3)


def test_events_that_reads_cut_anywhere() -> None:
    stream = event(1, "é") + b": keep-alive\r\n\r\n" + event(2, "ü").replace(b"\n", b"\r\n") + DONE
    for cut in range(1, len(stream)):
        answer = heard(2, [(1.0, stream[:cut]), (1.0, stream[cut:])])
        assert (answer.failure, answer.tokens, list(answer.counts)) == (None, 2, [2]), cut


def test_without_usage_in_each_event_an_event_is_a_token_and_the_total_is_the_servers() -> None:
    pieces = [(1.0, event()), (1.1, event()), (1.2, event(text="")), (1.3, event(text="", finish_reason="length"))]
    answer = heard(4, [*pieces, (1.3, final_usage(4, prompt=7, cached=5)), (1.3, DONE)])
    assert answer.failure is None
    assert list(answer.counts) == [1, 1, 1]
    assert (answer.tokens, answer.prompt_tokens, answer.cached_tokens) == (4, 7, 5)
    assert answer.tpot == pytest.approx(0.2 / 3)


def test_the_opening_of_a_chat_is_no_token() -> None:
    def delta(**fields: str) -> bytes:
        return sse({"choices": [{"index": 0, "delta": fields, "finish_reason": None}]})

    pieces = [(0.1, delta(role="assistant", content="")), (0.9, delta(content="a")), (1.0, delta(reasoning="b"))]
    answer = heard(2, [*pieces, (1.0, final_usage(2)), (1.0, DONE)])
    assert answer.failure is None
    assert answer.ttft == pytest.approx(0.9)
    assert len(answer.times) == 2


@pytest.mark.parametrize(
    ("pieces", "kind"),
    [
        ([event(1), event(2)], "cut off"),
        ([event(), DONE], "no usage"),
        ([event(1), DONE], "length"),
        ([final_usage(2), DONE], "length"),
        ([event(1), sse({"error": {"message": "out of memory"}}), DONE], "error event"),
    ],
)
def test_answers_that_fail(pieces: list[bytes], kind: str) -> None:
    failure = heard(2, [(1.0, piece) for piece in pieces]).failure
    assert failure is not None and failure.kind == kind


def test_waits_within_a_window() -> None:
    answer = even(5, first=0.5, gap=0.1)  # deliveries at 100.5 … 100.9
    assert len(answer.waits(100.55, 100.85)) == 3


# ----------------------------------------------------------------------------------------------------------- statistics
@pytest.mark.parametrize("count", [1, 2, 3, 10, 101, 1000])
def test_statistics_are_numpys(count: int) -> None:
    rng = random.Random(count)
    values = [rng.expovariate(1.0) for _ in range(count)]
    stats, array = Stats.of(values), np.array(values) * 1e3
    assert stats is not None
    assert [stats.p50, stats.p90, stats.p95, stats.p99] == pytest.approx(
        np.percentile(array, [50, 90, 95, 99]).tolist()
    )
    assert (stats.mean, stats.std, stats.max) == pytest.approx((array.mean(), array.std(), array.max()))
    for share in (0.0, 0.123, 1.0):
        assert percentile(sorted(values), share) == pytest.approx(float(np.quantile(values, share)))


def test_statistics_of_nothing() -> None:
    assert Stats.of([]) is None


def test_a_summary_counts_what_succeeded_and_says_what_failed() -> None:
    answers = [even(5, 0.5, 0.1), even(3, 0.7, 0.2), heard(2, [(1.0, event(1))]), heard(2, []), heard(2, [(1, DONE)])]
    summary = Summary.of(Part(answers, duration=4.0), {})
    assert (summary.requests, summary.failed) == (5, 3)
    assert {kind: error.count for kind, error in summary.errors.items()} == {"cut off": 2, "no usage": 1}
    assert summary.errors["cut off"].first == "the answer ended without [DONE], after 1 tokens"
    assert (summary.request_throughput, summary.output_throughput) == (0.5, 2.0)
    assert (summary.input_tokens, summary.total_throughput) == (6, 14 / 4)
    assert summary.ttft is not None and summary.itl is not None
    assert summary.ttft.mean == pytest.approx(600)
    assert summary.itl.mean == pytest.approx((4 * 100 + 2 * 200) / 6)
    assert summary.goodput is None


def test_a_summary_without_a_success() -> None:
    summary = Summary.of(Part([heard(2, [])], duration=1.0), {"ttft": 1.0})
    assert (summary.ttft, summary.itl, summary.goodput, summary.good_share) == (None, None, 0.0, 0.0)


@pytest.mark.parametrize(
    ("objectives", "met"),
    [
        ({}, True),
        ({"ttft": 500.1}, True),
        ({"ttft": 499.9}, False),
        ({"e2el": 1900.1, "tpot": 140.1}, True),
        ({"e2el": 1899.9}, False),
        ({"tpot": 139.9}, False),
        ({"itl": 460.0}, False),  # the 99th percentile of nine waits of 100 ms and one of 500 ms is 464
        ({"itl": 464.1}, True),
        ({"itl": 464.1, "ttft": 499.9}, False),
    ],
)
def test_objectives_a_request_meets(objectives: dict[str, float], met: bool) -> None:
    times = [0.5 + 0.1 * number for number in range(10)] + [1.9]
    answer = heard(11, [*((at, event(number + 1)) for number, at in enumerate(times)), (1.9, DONE)])
    assert meets(answer, objectives) is met


def test_goodput_counts_requests_that_meet_all_objectives_and_failed_ones_as_bad() -> None:
    answers = [even(5, 0.5, 0.1), even(5, 0.9, 0.1), even(5, 0.5, 0.3), heard(2, [])]
    summary = Summary.of(Part(answers, duration=2.0), {"ttft": 600.0, "itl": 200.0})
    assert (summary.goodput, summary.good_share) == (0.5, 0.25)


def test_one_delivery_has_no_itl_and_no_tpot() -> None:
    answer = heard(3, [(0.5, event(3)), (0.5, DONE)])
    assert (answer.failure, answer.waits(), answer.tpot) == (None, [], None)
    assert meets(answer, {"itl": 1.0, "tpot": 1.0})
