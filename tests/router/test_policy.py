"""The choice of a worker: a pure function of what is known about the candidates."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tandem.router.policy import IMBALANCE, Candidate, choose


def worker(name: str, load: int = 0, cached: int = 0, **fields: Any) -> Candidate:
    return Candidate(incarnation=name * 2, name=name, load=load, capacity=16, cached_tokens=cached, **fields)


def chosen(*candidates: Candidate) -> str | None:
    candidate = choose(candidates)
    return candidate.name if candidate else None


def test_nobody() -> None:
    assert chosen() is None
    assert chosen(worker("a", draining=True)) is None


def test_longest_cached_prefix_wins_over_load() -> None:
    assert chosen(worker("a", cached=1), worker("b", load=IMBALANCE, cached=3)) == "b"


def test_equal_prefixes_are_decided_by_load_then_waiting_tokens() -> None:
    assert chosen(worker("a", load=2, cached=3), worker("b", load=1, cached=3), worker("c")) == "b"
    assert chosen(worker("a", waiting_tokens=10), worker("b", waiting_tokens=5)) == "b"


def test_full_draining_and_blamed_workers_are_avoided() -> None:
    assert chosen(worker("a", load=16, cached=9), worker("b", load=15)) == "b"
    assert chosen(worker("a", cached=9, draining=True), worker("b")) == "b"
    assert chosen(worker("a", cached=9, avoid=True), worker("b", load=16)) == "b"


def test_they_still_serve_when_there_is_nobody_else() -> None:
    assert chosen(worker("a", load=99)) == "a"
    assert chosen(worker("a", avoid=True), worker("b", draining=True)) == "a"


def test_a_popular_prefix_does_not_draw_everything_to_one_worker() -> None:
    assert chosen(worker("a", load=IMBALANCE, cached=1), worker("b")) == "a"
    assert chosen(worker("a", load=IMBALANCE + 1, cached=1), worker("b")) == "b"


CANDIDATES = st.lists(
    st.builds(
        Candidate,
        incarnation=st.uuids().map(str),
        name=st.text("abc", min_size=1, max_size=3),
        load=st.integers(0, 40),
        capacity=st.integers(1, 20),
        waiting_tokens=st.integers(0, 3),
        cached_tokens=st.integers(0, 5),
        draining=st.booleans(),
        avoid=st.booleans(),
    ),
    max_size=6,
)


@given(CANDIDATES)
def test_no_other_candidate_is_better_in_every_respect(candidates: list[Candidate]) -> None:
    best = choose(candidates)
    taking = [candidate for candidate in candidates if not candidate.draining]
    assert (best is None) == (not taking)
    for other in taking:
        assert best is not None
        assert not (
            other.avoid <= best.avoid
            and other.load < best.load
            and other.cached_tokens > best.cached_tokens
            and other.capacity >= best.capacity
        )
        if best.avoid:
            assert other.avoid
