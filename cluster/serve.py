"""`tandem serve`: starts every process of a cluster, keeps them running, and ends them all.

    check of the model (torch)
    Redis, router ──► Ray with its dashboard ──► controller ──► prefill-0, decode-0, …

Whatever dies meanwhile is started again, a Ray of our own too (handover.py). Whatever way it ends, nothing stays
behind: children die with this process, and orphans become its children.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from tandem.cluster import process
from tandem.cluster.address import check_free, public_url, reachable_host
from tandem.cluster.check import Check, Verdict
from tandem.cluster.controller import ClusterView, Limits
from tandem.cluster.handover import LocalRay, Outgoing, outlive_ray
from tandem.cluster.local_redis import LocalRedis
from tandem.cluster.options import DEMO_NAME, ServeOptions
from tandem.cluster.router_process import RouterProcess, is_ready, router_command
from tandem.cluster.run_dir import Record, RunDir
from tandem.cluster.screen import Screen
from tandem.common.errors import ConfigError, TandemError, WorkerFailed
from tandem.common.model_dir import model_name
from tandem.common.worker_config import KEY_VARIABLE, cluster_key_from_env

log = logging.getLogger("tandem.cluster")

STARTING_TICK = 0.2  # seconds between looks at everything while it starts
TICK = 0.5  # … and afterwards
CHECK_TIMEOUT = 60.0  # seconds, for a directory
FETCH_TIMEOUT = 6 * 3600.0  # … and when the hub has to be asked
HOPELESS = 3  # failures in a row of one worker while the cluster starts
ANSWER_WITHIN = 20.0  # seconds for the controller
PATIENCE = 3  # answers of the controller that may be late, before it and its workers are started again
STOP_GRACE = 4.0  # seconds for the workers to leave in order
RAY_RETRY = 5.0  # seconds between attempts to start another Ray


class Stop(BaseException):
    """SIGINT, SIGTERM or SIGHUP came."""


@dataclass(slots=True)
class _Parts:
    """What runs so far."""

    run_dir: RunDir | None = None
    reaper: subprocess.Popen[bytes] | None = None
    check: Check | None = None
    redis: LocalRedis | None = None
    router: RouterProcess | None = None
    ray: Literal["", "starting", "up"] = ""
    local_ray: LocalRay | None = None
    controller: Any = None  # a Ray actor's handle


class Serve:
    def __init__(self, options: ServeOptions, screen: Screen | None = None) -> None:
        self._options = options
        self._screen = screen or Screen()
        self._parts = _Parts()
        self._stopping = False
        self._verdict: Verdict | None = None  # of the check that runs beside the start
        self._start_controller: Callable[[], Any]
        self._directory = ""  # of the model
        self._view = ClusterView({"prefill": options.prefill, "decode": options.decode}, ())  # the last one
        self._outgoing = Outgoing(options.drain_timeout)
        self._gpus = False  # the workers have some
        self._ray_retry_at = 0.0
        self._unanswered = 0  # questions to the controller, in a row
        self._key = cluster_key_from_env() if KEY_VARIABLE in os.environ else secrets.token_bytes(32)

    def run(self) -> None:
        """Until a signal. Raises TandemError, with the line to print, when it cannot start."""
        check_free(self._options.host, self._options.port)
        process.adopt_orphans()
        self._catch_signals()
        try:
            with self._screen:
                self._directory = self._prepare()
                dashboard_url = self._start_ray()
                self._until_ready()
            self._announce(dashboard_url)
            while not self._stopping:
                self._screen.update(self._look())
                time.sleep(TICK)
        except Stop:
            self._screen.step("stopping")
            if self._parts.ray == "starting":
                self._exit_now(0)  # half a Ray does not shut down, it crashes
        finally:
            self._shut_down()

    # ------------------------------------------------------------------ start

    def _prepare(self) -> str:
        """Starts what does not need Ray, and the check of the model, whose directory is returned."""
        options, parts = self._options, self._parts
        self._screen.step(f"checking {options.directory}")
        engine = options.engine_config(options.directory)
        parts.run_dir = RunDir()
        parts.reaper = process.start_reaper(parts.run_dir.path)
        parts.check = Check(engine, options.kv_connector, elsewhere=options.ray_address is not None)
        if options.redis_url is None:
            parts.redis = LocalRedis(parts.run_dir.redis_socket)
        directory = options.directory
        if Path(directory).expanduser().is_dir():
            threading.Thread(target=self._judge, args=(parts.check,), name="check", daemon=True).start()
        else:
            self._verdict = parts.check.wait(FETCH_TIMEOUT)
            directory = self._verdict.directory
        self._start_router(directory)
        if parts.redis is not None:
            parts.redis.wait()
        return directory

    def _judge(self, check: Check) -> None:
        """Starting Ray cannot be interrupted, and nobody should wait ten seconds to hear of a wrong file name: a model
        or flag that cannot work ends everything from here, as a second Ctrl-C would."""
        try:
            self._verdict = check.wait(CHECK_TIMEOUT)
        except TandemError as exc:
            if self._stopping:
                return
            self._stopping = True
            self._screen.close()
            print(f"tandem: error: {exc.message}", file=sys.stderr, flush=True)
            self._exit_now(1)

    def _start_router(self, directory: str) -> None:
        flags = replace(self._options, model=directory, served_model_name=self._names)
        command = router_command(flags, flags, self._redis_url, self._key, flags.prefill)
        self._parts.router = RouterProcess(command, lambda text: self._screen.line(f"(router) {text}"))

    def _start_ray(self) -> str:
        """Ray and the controller, which starts the workers. The dashboard's URL, or ''."""
        from tandem.cluster import ray_session

        outlive_ray()
        ray_session.prepare(self._options.ray_address)  # first: the modules below import Ray
        from tandem.cluster.plan import Endpoint, launch_spec, threads_per_worker
        from tandem.cluster.ray_workers import start_controller

        options, parts, space = self._options, self._parts, ray_session.namespace(self._options.cluster)
        assert parts.run_dir is not None
        parts.ray = "starting"
        if options.ray_address is None:
            self._screen.step("starting Ray")
            os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_worker(options)))
            processes = 1 + options.prefill + options.decode
            session = ray_session.start(parts.run_dir.ray, space, processes, options.dashboard)
            parts.local_ray = LocalRay()
        else:
            session = ray_session.join(options.ray_address, space, logs=True)
        parts.ray = "up"
        self._catch_signals()  # Ray has put its own handlers in place
        spec = launch_spec(options, self._directory, session, Endpoint(self._redis_url, self._key))
        limits = Limits(options.startup_timeout, options.drain_timeout)
        self._gpus = any(place.num_gpus for place in spec.placement.values())
        self._start_controller = lambda: start_controller(spec, self._view.wanted, limits)
        parts.controller = self._start_controller()
        parts.run_dir.write(Record(os.getpid(), self._url, session.address, space))
        return session.dashboard_url

    def _until_ready(self) -> None:
        options, router = self._options, self._parts.router
        assert router is not None
        deadline = time.monotonic() + options.startup_timeout
        if router.exit_code is None:
            router.show()
        while True:
            view = self._look()
            self._screen.update(view)
            if self._verdict and view.settled and is_ready(reachable_host(options.host), options.port):
                break
            if router.exit_code is not None:
                raise ConfigError(router.last_line or f"the router ended with status {router.exit_code}")
            _give_up_on(view)
            if time.monotonic() > deadline:
                raise WorkerFailed(f"not every worker was ready within {options.startup_timeout:.0f} s")
            time.sleep(STARTING_TICK)

    def _announce(self, dashboard_url: str) -> None:
        assert self._verdict is not None
        keyed = self._options.api_key is not None
        self._screen.ready(self._url, self._names[0], self._verdict.chat, keyed, dashboard_url)

    # ------------------------------------------------------------------ while it runs

    def _look(self) -> ClusterView:
        """The workers now; what else has died is started again."""
        from tandem.cluster import ray_calls

        if self._stopping:
            raise Stop
        self._revive()
        if self._ray_lost and not self._replace_ray():
            return self._view
        try:
            self._view = ray_calls.get(self._parts.controller.view.remote(), ANSWER_WITHIN)
            self._unanswered = 0
        except ray_calls.ActorLost as exc:
            self._unanswered += 1
            slow = isinstance(exc, ray_calls.ActorSlow) and self._unanswered < PATIENCE  # it may wait for Ray itself
            if self._ray_lost or slow:
                return self._view
            self._screen.step(f"the controller was lost ({exc.message}); starting it and its workers again")
            self._view = self._restart_controller()
        self._outgoing.step(self._view.settled or self._gpus, time.monotonic())
        return self._view

    def _restart_controller(self) -> ClusterView:
        """Ray gives a dead actor's name free only after a while. Raises what stands in the way at the deadline."""
        from tandem.cluster import ray_calls

        ray_calls.kill(self._parts.controller)
        deadline = time.monotonic() + ANSWER_WITHIN
        while True:
            try:
                self._parts.controller = self._start_controller()
                return ray_calls.get(self._parts.controller.view.remote(), ANSWER_WITHIN)
            except (ConfigError, ray_calls.ActorLost):
                if time.monotonic() > deadline:
                    raise
                time.sleep(TICK)

    @property
    def _ray_lost(self) -> bool:
        return self._parts.local_ray is not None and not self._parts.local_ray.alive

    def _replace_ray(self) -> bool:
        """The old workers stay until the new ones are ready; where both do not fit the GPUs, until they have drained.

        Whether another Ray is up; if not, this is to be called again, and the old workers go on. What is left of the
        old Ray goes first: its controller and its GCS would take the workers for dead, and kill them.
        """
        from tandem.cluster import ray_session

        if time.monotonic() < self._ray_retry_at:
            return False
        self._ray_retry_at = time.monotonic() + RAY_RETRY
        self._screen.step("Ray died; its workers go on while another one is started")
        children = [self._parts.redis, self._parts.router, self._parts.reaper]
        self._outgoing.add(self._view)
        self._view = replace(self._view, workers=())
        own = [child.pid for child in children if child is not None]
        process.kill_descendants(spare=[*own, *self._outgoing.family])
        try:
            ray_session.stop()
            self._start_ray()
        except Exception as exc:  # Ray has no class of its own for a start that fails
            self._screen.step(f"Ray did not start: {exc}; trying again in {RAY_RETRY:.0f} s")
            return False
        return True

    def _revive(self) -> None:
        redis, router = self._parts.redis, self._parts.router
        if redis is not None and not redis.alive:
            self._screen.step("Redis died; starting it again")
            redis.restart()
        if router is not None and router.shown and (news := router.revive(time.monotonic())):
            self._screen.step(news)

    # ------------------------------------------------------------------ end

    def _catch_signals(self) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._stopping:
            self._exit_now(128 + signum)
        self._stopping = True
        raise Stop

    def _exit_now(self, code: int) -> None:
        process.kill_descendants(grace=1.0)
        if self._parts.run_dir is not None:
            self._parts.run_dir.remove()
        os._exit(code)

    def _shut_down(self) -> None:
        """Whatever has started, and only that; a part that does not end in order is killed with the rest."""
        self._stopping = True
        parts = self._parts
        steps: list[Callable[[], None]] = []
        if parts.router is not None:
            router = parts.router
            steps.append(lambda: router.stop(self._options.shutdown_timeout + 2.0))
        if parts.ray == "up":
            steps.append(self._stop_ray)
        if parts.redis is not None:
            steps.append(parts.redis.stop)
        for step in [*steps, process.kill_descendants]:
            try:
                step()
            except Exception as exc:
                log.warning("while stopping: %s", exc)
        if parts.run_dir is not None:
            parts.run_dir.remove()

    def _stop_ray(self) -> None:
        from tandem.cluster import ray_session
        from tandem.cluster.ray_workers import stop_controller

        if self._parts.controller is not None:
            stop_controller(self._parts.controller, STOP_GRACE)
        ray_session.stop()

    # ------------------------------------------------------------------ names

    @property
    def _redis_url(self) -> str:
        if self._parts.redis is not None:
            return self._parts.redis.url
        assert self._options.redis_url is not None
        return self._options.redis_url

    @property
    def _url(self) -> str:
        return public_url(self._options.host, self._options.port)

    @property
    def _names(self) -> list[str]:
        default = DEMO_NAME if self._options.model is None else model_name(self._options.model)
        return self._options.served_model_name or [default]


def _give_up_on(view: ClusterView) -> None:
    """Raises the error of a worker that will not start."""
    if view.fault:
        raise ConfigError(view.fault)
    for worker in view.workers:
        if worker.failures >= HOPELESS:
            raise WorkerFailed(f"{worker.name} failed {worker.failures} times: {worker.detail}")
