"""The model checker finds what is wrong in toy models, by the shortest way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.model.checker import Broken, check


class Counter:
    """Counts from 0 by one or by two; comes to rest at `rest`."""

    def __init__(self, rest: int, bad: int = -1, top: int = 6, trap: int = -1, sure: bool = True) -> None:
        self._rest, self._bad, self._top, self._trap, self._sure = rest, bad, top, trap, sure

    def initial(self) -> int:
        return 0

    def steps(self, state: int) -> Iterator[tuple[str, bool, int | Broken]]:
        for step in (1, 2):
            if state + step <= self._top and state != self._trap:
                yield f"add {step}", self._sure, state + step
        if state == 4 and self._bad == 100:
            yield "explode", True, Broken("bang")

    def broken(self, state: int) -> str:
        return f"{state} is bad" if state == self._bad else ""

    def at_rest(self, state: int) -> bool:
        return state == self._rest


def test_sound_model_passes() -> None:
    report = check(Counter(rest=6))
    assert (report.states, report.steps, report.resting, report.counterexample) == (7, 11, 1, None)


def test_broken_state_is_found_by_the_shortest_way() -> None:
    found = check(Counter(rest=6, bad=5)).counterexample
    assert found is not None
    assert (found.wrong, len(found.trace)) == ("5 is bad", 3)


def test_broken_step_is_found() -> None:
    found = check(Counter(rest=6, bad=100)).counterexample
    assert found is not None
    assert str(found) == "   1. add 2\n   2. add 2\n   3. explode\n  ==> bang"


def test_dead_end_is_found() -> None:
    found = check(Counter(rest=6, trap=3)).counterexample
    assert found is not None
    assert (found.wrong, len(found.trace)) == ("never comes to rest again: 3", 2)


def test_rest_is_not_reached_by_luck() -> None:
    found = check(Counter(rest=6, sure=False)).counterexample
    assert found is not None
    assert (found.wrong, found.trace) == ("never comes to rest again: 0", ())


def test_too_large_a_world_is_refused() -> None:
    with pytest.raises(RuntimeError, match="more than 5 states"):
        check(Counter(rest=6), max_states=5)
