"""The hand-off's protocol holds in every state it can reach, and each of its rules is needed for that.

`pytest -s tests/model` prints how many states were looked at, and how the world ends without each rule.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.model import handoff_state as at
from tests.model.checker import Report, check
from tests.model.handoff_model import Handoff
from tests.model.handoff_rules import Rule, World
from tests.model.handoff_state import State

NOTHING = frozenset[str]()
CONNECTORS = pytest.mark.parametrize("one_sided", [False, True], ids=["two-sided", "one-sided"])

FAULTY = World(one_sided=False)  # two requests, one retry, everything lost that can be: rest counts on timers alone
CALM = World(one_sided=False, requests=1, losses=False, once=NOTHING)  # rest counts on messages alone
ALONE = World(one_sided=False, requests=1, retry=False)
PAIR = World(one_sided=False, retry=False, losses=False, once=NOTHING)
QUIET = World(one_sided=False, requests=1, retry=False, losses=False, once=NOTHING)
BOTH_DIE = World(one_sided=False, requests=1, retry=False, losses=False)
REPLAYED = World(one_sided=False, requests=1, retry=False, once=frozenset({"replay"}))
DAMAGED = World(one_sided=False, requests=1, once=frozenset({"damage"}))
TWO_BLOCKS = World(one_sided=False, requests=1, once=frozenset({"P"}), blocks=2)


def explore(world: World, without: Rule | None = None) -> Report:
    report = check(Handoff(world, without))
    print(f"\n{world}\n  {report.states} states, {report.steps} steps, {report.resting} states of rest")
    return report


@pytest.mark.timeout(300)  # ten seconds of work for the largest world, on a core of its own
@CONNECTORS
@pytest.mark.parametrize(
    "world",
    [FAULTY, CALM, ALONE, PAIR, QUIET, BOTH_DIE, REPLAYED, DAMAGED, TWO_BLOCKS],
    ids=["faulty", "calm", "alone", "pair", "quiet", "both-die", "replayed", "damaged", "two-blocks"],
)
def test_protocol_holds(world: World, one_sided: bool) -> None:
    """Among the worlds are all those below, so that a counterexample there is the missing rule's doing."""
    report = explore(of(world, one_sided))
    assert report.counterexample is None, f"\n{report.counterexample}"
    assert report.resting > 0


def of(world: World, one_sided: bool) -> World:
    return World(one_sided, world.requests, world.retry, world.losses, world.once, world.blocks)


TWO, ONE, BOTH = (False,), (True,), (False, True)


@pytest.mark.parametrize(
    ("rule", "world", "connectors", "wrong"),
    [
        (Rule.CURRENT_FRAMES, FAULTY, TWO, "lands in a block of B0"),
        (Rule.QUARANTINE, FAULTY, ONE, "lands in a block of B0"),
        (Rule.EARLY_RELEASE, CALM, ONE, "never comes to rest"),
        (Rule.TEAR_DOWN, FAULTY, ONE, "lands in a block of B0"),
        (Rule.VERIFY, FAULTY, TWO, "KV that never came"),
        (Rule.VERIFY, DAMAGED, ONE, "KV that was damaged"),
        (Rule.LEASE, ALONE, BOTH, "never comes to rest"),
        (Rule.TIMERS, ALONE, BOTH, "never comes to rest"),
        (Rule.GENERATION, FAULTY, BOTH, "D's blocks should be held by"),
        (Rule.ONE_END, FAULTY, BOTH, "ends its request a second time"),
        (Rule.CONTIGUOUS, FAULTY, BOTH, "when token 0 is due"),
        (Rule.GRANT_FIRST, PAIR, BOTH, "never comes to rest"),
        (Rule.CANCEL_P, QUIET, BOTH, "never comes to rest"),
        (Rule.CANCEL_D, QUIET, BOTH, "never comes to rest"),
        (Rule.LIVENESS, BOTH_DIE, BOTH, "never comes to rest"),
        (Rule.SINGLE_USE, REPLAYED, BOTH, "blocks should be held by"),
        (Rule.INCARNATION, FAULTY, ONE, "KV of A0 lands in a block of"),
        (Rule.PIN, FAULTY, ONE, "decodes on KV of"),
    ],
    ids=lambda value: value.name if isinstance(value, Rule) else "",
)
def test_each_rule_is_needed(rule: Rule, world: World, connectors: tuple[bool, ...], wrong: str) -> None:
    for one_sided in connectors:
        found = explore(of(world, one_sided), rule).counterexample
        assert found is not None, f"nothing goes wrong without {rule.value}"
        print(f"without {rule.value}:\n{found}")
        assert wrong in found.wrong


class Until(Handoff):
    """Looks for a state, as if it were broken."""

    def __init__(self, world: World, seen: Callable[[State], bool]) -> None:
        super().__init__(world)
        self._seen = seen

    def broken(self, s: State) -> str:
        return super().broken(s) or ("seen" if self._seen(s) else "")


def resumed_after_deaths(s: State) -> bool:
    """The retry goes on behind a token of the first attempt, on new incarnations of both."""
    return s.happened == {"P", "D"} and s.legs[1].base == 1 and s.legs[1].d == at.RUNNING


def late_beside_next(s: State) -> bool:
    """A message of a transfer that D gave up is still on its way while the next one lands in the same block."""
    return bool(s.legs[0].net) and s.legs[0].p == at.SENT and at.LANDING in (s.legs[1].d, s.legs[2].d)


@CONNECTORS
@pytest.mark.parametrize("seen", [resumed_after_deaths, late_beside_next])
def test_what_matters_can_happen(seen: Callable[[State], bool], one_sided: bool) -> None:
    """The model would also hold if nothing ever happened in it."""
    found = check(Until(World(one_sided, requests=1), seen)).counterexample
    assert found is not None and found.wrong == "seen"


@CONNECTORS
def test_every_request_can_be_answered(one_sided: bool) -> None:
    def answered(s: State) -> bool:
        return all(request == (at.TOKENS, True) for request in s.requests) and s.legs[1].router == at.UNBORN

    found = check(Until(of(PAIR, one_sided), answered)).counterexample
    assert found is not None and found.wrong == "seen"


def test_quarantine_waits_for_the_write() -> None:
    """One-sided: a transfer that is over on P has its block on D in quarantine as long as its write is in flight."""

    def waiting(s: State) -> bool:
        return s.legs[0].d == at.QUARANTINE and s.legs[0].p == at.DRAINING and at.WRITE in s.legs[0].net

    assert check(Until(World(one_sided=True, requests=1), waiting)).counterexample is not None
