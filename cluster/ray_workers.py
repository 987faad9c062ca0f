"""Workers as named Ray actors, and the controller that keeps them, itself a named actor."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from tandem.cluster import ray_calls
from tandem.cluster.controller import ClusterView, Controller, Limits
from tandem.common.errors import ConfigError
from tandem.common.hosted import HostOptions, Report
from tandem.common.worker_config import Role, WorkerConfig
from tandem.engine.config import EngineConfig

log = logging.getLogger("tandem.cluster")

CONTROLLER = "controller"  # the actor's name in the cluster's namespace
STEP = 0.25  # seconds between looks at the workers
ANSWER_WITHIN = 10.0  # seconds a worker may take to report before it counts as dead


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What Ray is asked to set aside for one worker, and how its process runs."""

    num_cpus: float = 0.0
    num_gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict[str, float])
    niceness: int = 0
    sharing: int = 0  # workers that divide a node's cores; 0: OMP_NUM_THREADS is set for all


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """All the controller needs to start a worker of either role."""

    engine: EngineConfig
    redis_url: str = field(repr=False)
    cluster_key: bytes = field(repr=False)
    cluster: str
    kv_connector: str
    log_level: str
    host: str  # what workers listen on; empty: the address of their node
    drain_timeout: float = 120.0  # seconds
    keeper: int = 0  # process without which local workers end
    placement: Mapping[Role, Placement]

    def worker(self, name: str, role: Role) -> WorkerConfig:
        return WorkerConfig(
            name=name,
            role=role,
            redis_url=self.redis_url,
            cluster_key=self.cluster_key,
            host=self.host,
            cluster=self.cluster,
            kv_connector=self.kv_connector,
        )


def actor_class(role: Role) -> type:
    if role == "prefill":
        from tandem.prefill_worker.actor import PrefillActor

        return PrefillActor
    from tandem.decode_worker.actor import DecodeActor

    return DecodeActor


class RayHandle:
    """Asks its actor for a report about once a second and never waits for the answer."""

    def __init__(self, actor: ray_calls.ActorHandle) -> None:
        self._actor = actor
        self._asked = 0.0
        self._answered = False  # the first answer may take long: Ray has to find room and start a process
        self._pending: ray_calls.Reference | None = None

    def poll(self, now: float) -> Report | None:
        if self._pending is None:
            if now - self._asked >= (1.0 if self._answered else 0.0):
                self._pending, self._asked = self._actor.report.remote(), now
            return None
        if ray_calls.is_done(self._pending):
            return self._take()
        if self._answered and now - self._asked > ANSWER_WITHIN:
            return Report("failed", error=f"no answer for {ANSWER_WITHIN:.0f} s")
        return None

    def drain(self, timeout: float) -> None:
        self._actor.drain.remote(timeout)

    def stop(self) -> None:
        self._actor.stop.remote()

    def kill(self) -> None:
        ray_calls.kill(self._actor)

    def _take(self) -> Report:
        pending, self._pending = self._pending, None
        try:
            report: Report = ray_calls.get(pending, timeout=1.0)
        except ray_calls.ActorLost as exc:
            return Report("failed", error=exc.message)
        self._answered = True
        return report


class RayLauncher:
    def __init__(self, spec: LaunchSpec) -> None:
        self._spec = spec

    def launch(self, name: str, role: Role) -> RayHandle:
        spec, place = self._spec, self._spec.placement[role]
        options: dict[str, object] = {
            "name": name,
            "num_cpus": place.num_cpus,
            "num_gpus": place.num_gpus,
            "resources": dict(place.resources),
            "max_restarts": 0,  # the controller restarts, with a new incarnation
            "max_concurrency": 2,  # a report must not wait behind another call
        }
        host = HostOptions(spec.log_level, place.niceness, place.sharing, spec.drain_timeout, spec.keeper)
        return RayHandle(ray_calls.create(actor_class(role), options, spec.worker(name, role), spec.engine, host))


class ControllerActor:
    """Runs a Controller in a thread; methods answer at once."""

    def __init__(self, spec: LaunchSpec, wanted: Mapping[Role, int], limits: Limits) -> None:
        self._controller = Controller(RayLauncher(spec), wanted, limits)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return CONTROLLER

    def view(self) -> ClusterView:
        with self._lock:
            return self._controller.view()

    def scale(self, wanted: Mapping[Role, int]) -> ClusterView:
        with self._lock:
            self._controller.scale(wanted)
            self._controller.step(time.monotonic())
            return self._controller.view()

    def drain(self, name: str, timeout: float) -> bool:
        """False: no worker of that name is ready."""
        with self._lock:
            return self._controller.drain(name, timeout, time.monotonic())

    def restart(self) -> ClusterView:
        """Begin a rolling restart."""
        with self._lock:
            self._controller.restart()
            return self._controller.view()

    def stop(self, grace: float) -> None:
        """Stop every worker; returns when they are gone, after `grace` seconds at the latest."""
        with self._lock:
            self._controller.stop(time.monotonic(), grace)
        deadline = time.monotonic() + grace
        while self.view().workers and time.monotonic() < deadline:
            time.sleep(0.05)
        self._stopped.set()
        with self._lock:
            self._controller.kill()

    def _run(self) -> None:
        while not self._stopped.wait(STEP):
            try:
                with self._lock:
                    self._controller.step(time.monotonic())
            except Exception:  # a bug of ours must not leave the pools without anybody who looks after them
                log.exception("the controller's step failed; it tries again")


def start_controller(spec: LaunchSpec, wanted: Mapping[Role, int], limits: Limits) -> ray_calls.ActorHandle:
    """The workers belong to it and end with it. Raises ConfigError."""
    options = {"name": CONTROLLER, "num_cpus": 0, "max_restarts": 0, "max_concurrency": 4}
    try:
        return ray_calls.create(ControllerActor, options, spec, wanted, limits)
    except RuntimeError as exc:
        raise ConfigError(f"the controller cannot start: {exc}; another cluster there needs another --cluster") from exc


def stop_controller(controller: ray_calls.ActorHandle, grace: float) -> None:
    with contextlib.suppress(ray_calls.ActorLost):
        ray_calls.get(controller.stop.remote(grace), timeout=grace + 2.0)
    ray_calls.kill(controller)
