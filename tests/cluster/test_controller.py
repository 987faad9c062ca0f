"""The controller against workers that only exist as reports, on a clock that only the test moves."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest

from tandem.cluster.controller import MAX_BACKOFF, STABLE_AFTER, STOP_GRACE, Controller, Limits
from tandem.common.hosted import Report
from tandem.common.worker_config import Role


@dataclass
class FakeWorker:
    name: str
    report: Report | None = field(default_factory=lambda: Report("loading"))
    calls: list[str] = field(default_factory=list[str])

    def poll(self, now: float) -> Report | None:
        return self.report

    def drain(self, timeout: float) -> None:
        self.calls.append(f"drain {timeout:g}")

    def stop(self) -> None:
        self.calls.append("stop")

    def kill(self) -> None:
        self.calls.append("kill")


@dataclass
class FakeLauncher:
    launched: list[FakeWorker] = field(default_factory=list[FakeWorker])
    refusal: str = ""

    def launch(self, name: str, role: Role) -> FakeWorker:
        if self.refusal:
            raise RuntimeError(self.refusal)
        self.launched.append(FakeWorker(name))
        return self.launched[-1]

    def newest(self, name: str) -> FakeWorker:
        return next(worker for worker in reversed(self.launched) if worker.name == name)

    def count(self, name: str) -> int:
        return sum(worker.name == name for worker in self.launched)


class Bench:
    """A controller, its launcher and the time."""

    def __init__(self, prefill: int, decode: int) -> None:
        self.launcher = FakeLauncher()
        self.controller = Controller(
            self.launcher, {"prefill": prefill, "decode": decode}, Limits(startup=100, drain=50)
        )
        self.now = 1000.0

    def step(self, seconds: float = 0.25) -> None:
        self.now += seconds
        self.controller.step(self.now)

    def all_ready(self) -> None:
        self.step()
        for worker in self.launcher.launched:
            worker.report = Report("ready")
        self.step()

    def fail(self, name: str, error: str = "boom", permanent: bool = False) -> None:
        self.launcher.newest(name).report = Report("failed", error=error, permanent=permanent)

    @property
    def phases(self) -> dict[str, str]:
        return {worker.name: worker.phase for worker in self.controller.view().workers}


def test_starts_every_wanted_worker_and_settles_when_all_are_ready() -> None:
    bench = Bench(prefill=1, decode=2)
    bench.step()
    assert bench.phases == {"prefill-0": "loading", "decode-0": "loading", "decode-1": "loading"}
    assert not bench.controller.view().settled
    bench.all_ready()
    assert set(bench.phases.values()) == {"ready"}
    assert bench.controller.view().settled


def test_scaling_one_role_leaves_the_other_alone() -> None:
    bench = Bench(prefill=1, decode=1)
    bench.all_ready()
    bench.controller.scale({"prefill": 3})
    bench.step()
    assert bench.phases == {"prefill-0": "ready", "prefill-1": "loading", "prefill-2": "loading", "decode-0": "ready"}


def test_the_youngest_worker_leaves_first_and_is_drained_not_killed() -> None:
    bench = Bench(prefill=1, decode=2)
    bench.all_ready()
    bench.controller.scale({"decode": 1})
    bench.step()
    leaving = bench.launcher.newest("decode-1")
    assert bench.phases["decode-1"] == "draining" and bench.phases["decode-0"] == "ready"
    assert leaving.calls == ["drain 50"]
    leaving.report = Report("draining")
    bench.step(40)
    assert bench.phases["decode-1"] == "draining"
    leaving.report = Report("stopped")
    bench.step()
    assert "decode-1" not in bench.phases and leaving.calls == ["drain 50", "kill"]
    assert bench.controller.view().settled


def test_youngest_means_started_last_whatever_its_number() -> None:
    bench = Bench(prefill=0, decode=2)
    bench.all_ready()
    bench.controller.scale({"decode": 1})
    bench.step()
    bench.launcher.newest("decode-1").report = Report("stopped")
    bench.step()
    bench.controller.scale({"decode": 3})
    bench.all_ready()
    bench.fail("decode-0")
    bench.step()
    bench.step()
    bench.all_ready()
    bench.controller.scale({"decode": 2})
    bench.step()
    assert bench.phases == {"decode-0": "ready", "decode-1": "ready", "decode-2": "draining"}


def test_a_worker_that_does_not_end_its_drain_by_itself_is_killed() -> None:
    """At the timeout it gives up what still runs; it has STOP_GRACE seconds to do so."""
    bench = Bench(prefill=0, decode=2)
    bench.all_ready()
    bench.controller.scale({"decode": 1})
    bench.step()
    bench.launcher.newest("decode-1").report = Report("draining")
    bench.step(50 + STOP_GRACE - 1)
    assert "decode-1" in bench.phases
    bench.step(2)
    assert "decode-1" not in bench.phases
    assert bench.launcher.newest("decode-1").calls == ["drain 50", "kill"]


def test_growing_while_a_worker_drains_takes_a_fresh_name() -> None:
    bench = Bench(prefill=0, decode=2)
    bench.all_ready()
    bench.controller.scale({"decode": 1})
    bench.step()
    bench.controller.scale({"decode": 2})
    bench.step()
    assert bench.phases == {"decode-0": "ready", "decode-1": "draining", "decode-2": "loading"}


def test_a_dead_worker_comes_back_at_once_under_its_name() -> None:
    bench = Bench(prefill=1, decode=1)
    bench.all_ready()
    bench.fail("decode-0", "its process died")
    bench.step()
    bench.step()
    assert bench.phases["decode-0"] == "loading"
    assert bench.launcher.count("decode-0") == 2
    assert bench.launcher.launched[1].calls == ["kill"], "the old process must be gone, and its name free"
    worker = bench.controller.view().workers[1]
    assert (worker.failures, worker.detail) == (1, "its process died")


def test_a_crash_loop_backs_off_and_a_stable_worker_is_forgiven() -> None:
    bench = Bench(prefill=0, decode=1)
    starts: list[float] = []
    bench.step()
    for _ in range(9):
        starts.append(bench.now)
        launches = bench.launcher.count("decode-0")
        bench.fail("decode-0")
        while bench.launcher.count("decode-0") == launches:
            bench.step()
    gaps = [after - before for before, after in itertools.pairwise(starts)]
    assert gaps[0] <= 0.5
    assert gaps == sorted(gaps) and gaps[-1] == pytest.approx(MAX_BACKOFF, abs=0.5)
    bench.all_ready()
    bench.step(STABLE_AFTER)
    bench.fail("decode-0")
    bench.step()
    assert bench.controller.view().workers[0].failures == 1


def test_a_crash_loop_costs_the_others_nothing() -> None:
    """E27: whoever is ready stays so and is told nothing, in its role and the other; that is all readiness asks for."""
    bench = Bench(prefill=1, decode=2)
    bench.all_ready()
    for _ in range(50):
        bench.fail("decode-1", "killed while it loads")
        while bench.phases["decode-1"] != "loading":
            bench.step()
            assert (bench.phases["prefill-0"], bench.phases["decode-0"]) == ("ready", "ready")
    assert [worker.calls for worker in bench.launcher.launched if worker.name != "decode-1"] == [[], []]


def test_a_worker_that_never_loads_is_given_up_and_tried_again() -> None:
    bench = Bench(prefill=0, decode=1)
    bench.step()
    bench.step(101)
    assert bench.launcher.launched[0].calls == ["kill"]
    bench.step()
    assert bench.launcher.count("decode-0") == 2
    assert "did not load" in bench.controller.view().workers[0].detail


def test_a_refused_launch_is_tried_again() -> None:
    bench = Bench(prefill=0, decode=1)
    bench.launcher.refusal = "the name is taken"
    bench.step()
    assert bench.phases == {"decode-0": "backoff"}
    bench.launcher.refusal = ""
    bench.step()
    assert bench.phases == {"decode-0": "loading"}


def test_a_fault_that_cannot_heal_is_told_to_whoever_started_the_cluster() -> None:
    bench = Bench(prefill=0, decode=1)
    bench.step()
    bench.fail("decode-0", "model.safetensors: truncated", permanent=True)
    bench.step()
    bench.step()
    assert bench.controller.view().fault == "model.safetensors: truncated"
    assert bench.launcher.count("decode-0") == 1, "starting it again at once would fail the same way"


def test_no_news_is_no_change() -> None:
    bench = Bench(prefill=0, decode=1)
    bench.all_ready()
    bench.launcher.newest("decode-0").report = None
    bench.step(30)
    assert bench.phases == {"decode-0": "ready"}


def test_shrinking_drops_a_loading_worker_at_once() -> None:
    bench = Bench(prefill=0, decode=2)
    bench.step()
    bench.controller.scale({"decode": 1})
    bench.step()
    assert bench.phases == {"decode-0": "loading"}
    assert bench.launcher.newest("decode-1").calls == ["kill"]


def test_stop_asks_every_worker_and_does_not_wait_for_ever() -> None:
    bench = Bench(prefill=1, decode=1)
    bench.all_ready()
    bench.controller.stop(bench.now, grace=4.0)
    assert all(worker.calls == ["stop"] for worker in bench.launcher.launched)
    bench.launcher.newest("decode-0").report = Report("stopped")
    bench.step()
    assert set(bench.phases) == {"prefill-0"}
    bench.step(4)
    assert not bench.phases
    assert bench.launcher.newest("prefill-0").calls == ["stop", "kill"]


def test_a_drained_worker_is_replaced_at_once_and_was_no_failure() -> None:
    bench = Bench(prefill=1, decode=2)
    bench.all_ready()
    assert bench.controller.drain("decode-0", 7.0, bench.now)
    bench.step()
    assert bench.phases == {"prefill-0": "ready", "decode-0": "draining", "decode-1": "ready", "decode-2": "loading"}
    assert bench.launcher.newest("decode-0").calls == ["drain 7"]
    bench.fail("decode-0", "its process ended")
    bench.all_ready()
    assert bench.phases == {"prefill-0": "ready", "decode-1": "ready", "decode-2": "ready"}
    assert bench.controller.view().settled
    assert not any(worker.failures for worker in bench.controller.view().workers)


def test_only_a_ready_worker_can_be_drained() -> None:
    bench = Bench(prefill=0, decode=2)
    bench.step()
    assert not bench.controller.drain("decode-0", 7.0, bench.now)
    bench.all_ready()
    assert not bench.controller.drain("decode-7", 7.0, bench.now)
    assert bench.controller.drain("decode-0", 7.0, bench.now)
    assert not bench.controller.drain("decode-0", 7.0, bench.now), "it is leaving already"


@pytest.mark.parametrize("drained", [("decode-0",), ("prefill-0",), ("decode-0", "prefill-0")])
def test_the_last_ready_worker_of_a_pool_leaves_behind_its_successor(drained: tuple[str, ...]) -> None:
    bench = Bench(prefill=1, decode=1)
    bench.all_ready()
    old = list(bench.launcher.launched)
    for name in drained:
        assert bench.controller.drain(name, 7.0, bench.now)
    for _ in range(20):
        bench.step()
        ready = {worker.role for worker in bench.controller.view().workers if worker.phase == "ready"}
        assert ready == {"prefill", "decode"}, "a pool has nobody to serve"
        for worker in bench.launcher.launched:
            if worker.report == Report("loading"):
                worker.report = Report("ready")
            elif "drain 7" in worker.calls:
                worker.report = Report("stopped")
    assert bench.controller.view().settled
    assert [worker.calls for worker in old if worker.name in drained] == [["drain 7", "kill"]] * len(drained)


def test_two_drains_at_once_leave_somebody_to_serve() -> None:
    bench = Bench(prefill=0, decode=2)
    bench.all_ready()
    assert bench.controller.drain("decode-0", 7.0, bench.now) and bench.controller.drain("decode-1", 7.0, bench.now)
    bench.step()
    assert bench.phases == {"decode-0": "draining", "decode-1": "ready", "decode-2": "loading"}
    bench.launcher.newest("decode-0").report = Report("stopped")
    bench.launcher.newest("decode-2").report = Report("ready")
    bench.step()
    bench.step()
    assert bench.phases == {"decode-1": "draining", "decode-2": "ready", "decode-0": "loading"}


def test_a_crash_loop_may_last_for_a_year() -> None:
    bench = Bench(prefill=0, decode=1)
    bench.launcher.refusal = "no room"
    for _ in range(1100):  # 2.0 ** 1024 is no float
        bench.step(MAX_BACKOFF + 1)
    assert bench.controller.view().workers[0].failures > 1000


def test_a_worker_whose_process_was_told_to_leave_is_replaced_before_it_is_gone() -> None:
    bench = Bench(prefill=0, decode=1)
    bench.all_ready()
    bench.launcher.newest("decode-0").report = Report("draining")
    bench.step()
    assert bench.phases == {"decode-0": "draining", "decode-1": "loading"}
    assert not bench.launcher.newest("decode-0").calls
    bench.fail("decode-0", "its process ended")
    bench.all_ready()
    assert bench.phases == {"decode-1": "ready"}


@pytest.mark.parametrize(("prefill", "decode"), [(1, 1), (0, 1), (2, 2), (1, 3)])
def test_a_rolling_restart_replaces_every_worker_and_no_pool_is_ever_smaller_by_more_than_one(
    prefill: int, decode: int
) -> None:
    bench = Bench(prefill, decode)
    bench.all_ready()
    old = list(bench.launcher.launched)
    bench.controller.restart()
    least = {"prefill": max(min(prefill, 1), prefill - 1), "decode": max(1, decode - 1)}
    for _ in range(200):
        bench.step()
        for worker in bench.launcher.launched:
            if worker.report == Report("loading"):
                worker.report = Report("ready")
            elif "drain 50" in worker.calls:
                worker.report = Report("stopped")
        view = bench.controller.view()
        for role, count in least.items():
            assert sum(w.role == role and w.phase == "ready" for w in view.workers) >= count
        assert sum(worker.phase == "draining" for worker in view.workers) <= 1
        if view.settled:
            break
    assert bench.controller.view().settled
    assert all(worker.calls == ["drain 50", "kill"] for worker in old)
    assert not any(worker.calls for worker in bench.launcher.launched[len(old) :])
    assert len(bench.launcher.launched) == 2 * len(old)


def test_a_rolling_restart_waits_while_a_successor_does_not_come_up() -> None:
    """New workers that cannot start must not cost the old ones that still serve."""
    bench = Bench(prefill=0, decode=2)
    bench.all_ready()
    bench.controller.restart()
    bench.step()
    bench.launcher.newest("decode-0").report = Report("stopped")
    for _ in range(20):
        bench.step(5)
        bench.fail("decode-2", "model.safetensors: truncated")
    assert bench.phases["decode-1"] == "ready"
    assert not bench.launcher.newest("decode-1").calls
    assert not bench.controller.view().settled


def test_scaling_down_in_a_rolling_restart_keeps_a_worker_that_serves() -> None:
    bench = Bench(prefill=0, decode=2)
    bench.all_ready()
    bench.controller.restart()
    bench.step()
    bench.launcher.newest("decode-0").report = Report("stopped")
    bench.step()
    assert bench.phases == {"decode-1": "ready", "decode-2": "loading"}
    bench.controller.scale({"decode": 1})
    bench.step()
    assert bench.phases["decode-1"] == "ready"


def test_a_dead_worker_needs_no_second_replacement() -> None:
    bench = Bench(prefill=0, decode=3)
    bench.all_ready()
    bench.controller.restart()
    bench.fail("decode-1")
    bench.step()
    bench.step()
    assert [worker.outdated for worker in bench.controller.view().workers] == [True, False, True]
