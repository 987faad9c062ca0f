"""A small explicit-state model checker: breadth first over every state that a model can reach.

    safety      no step and no reachable state is broken
    liveness    from every reachable state, sure steps alone can lead to a state of rest

*Sure* steps happen by themselves in the end: deliveries, work, timers that nothing renews. Faults and the client's
whims are not sure: a system that needs somebody's death in order to come to rest is broken. Because the search goes
breadth first, no counterexample is shorter than the one that is found.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

S = TypeVar("S", bound=Hashable)


class Broken(Exception):
    """Raised by a model within a step: what went wrong."""


class Model(Protocol[S]):
    def initial(self) -> S: ...

    def steps(self, s: S, /) -> Iterable[tuple[str, bool, S | Broken]]:
        """Each step that can come next: its name, whether it is sure, and where it leads."""
        ...

    def broken(self, s: S, /) -> str:
        """What is wrong in `s`; empty if nothing is."""
        ...

    def at_rest(self, s: S, /) -> bool: ...


@dataclass(frozen=True)
class Counterexample:
    wrong: str
    trace: tuple[str, ...]  # the steps from the initial state

    def __str__(self) -> str:
        steps = (f"  {number:2}. {step}" for number, step in enumerate(self.trace, 1))
        return "\n".join([*steps, f"  ==> {self.wrong}"])


@dataclass(frozen=True)
class Report:
    states: int
    steps: int
    resting: int  # states
    counterexample: Counterexample | None


class Explorer(Generic[S]):
    """One search. `_states` numbers what was found; number i was first reached from `_parents[i]` by `_by[i]`."""

    def __init__(self, model: Model[S], max_states: int) -> None:
        self._model, self._max_states = model, max_states
        self._states: list[S] = []
        self._numbers: dict[S, int] = {}
        self._parents: list[int] = []
        self._by: list[str] = []
        self._before: list[list[int]] = []  # from where a sure step leads to state i
        self._steps = 0

    def run(self) -> Report:
        return self._report(self._search() or self._restless())

    def _search(self) -> Counterexample | None:
        self._number(self._model.initial(), -1, "")
        for number, state in enumerate(self._states):  # grows while it is walked through
            wrong = self._model.broken(state)
            if wrong:
                return Counterexample(wrong, self._trace(number))
            for name, sure, after in self._model.steps(state):
                self._steps += 1
                if isinstance(after, Broken):
                    return Counterexample(str(after), (*self._trace(number), name))
                reached = self._number(after, number, name)
                if sure:
                    self._before[reached].append(number)
        return None

    def _number(self, state: S, parent: int, by: str) -> int:
        number = self._numbers.setdefault(state, len(self._states))
        if number == len(self._states):
            if number == self._max_states:
                raise RuntimeError(f"more than {self._max_states} states; make the model's world smaller")
            self._states.append(state)
            self._parents.append(parent)
            self._by.append(by)
            self._before.append([])
        return number

    def _restless(self) -> Counterexample | None:
        """The first state that cannot come to rest, found by walking back from all that are at rest."""
        calm = [self._model.at_rest(state) for state in self._states]
        walk = [number for number, rests in enumerate(calm) if rests]
        while walk:
            for before in self._before[walk.pop()]:
                if not calm[before]:
                    calm[before] = True
                    walk.append(before)
        if all(calm):
            return None
        first = calm.index(False)
        return Counterexample(f"never comes to rest again: {self._states[first]}", self._trace(first))

    def _trace(self, number: int) -> tuple[str, ...]:
        names: list[str] = []
        while number > 0:
            names.append(self._by[number])
            number = self._parents[number]
        return tuple(reversed(names))

    def _report(self, counterexample: Counterexample | None) -> Report:
        resting = sum(map(self._model.at_rest, self._states))
        return Report(len(self._states), self._steps, resting, counterexample)


def check(model: Model[S], max_states: int = 400_000) -> Report:
    """Raises RuntimeError beyond `max_states`."""
    return Explorer(model, max_states).run()
