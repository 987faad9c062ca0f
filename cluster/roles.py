"""`tandem router|prefill|decode`: one process in the foreground, for machines where an operator starts them.

SIGTERM and Ctrl-C drain, then exit; a second one exits at once.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import threading
from dataclasses import replace
from types import FrameType
from typing import Protocol, cast

from tandem.cluster.options import DEMO_NAME, ClusterFlags, RouterOptions, WorkerOptions
from tandem.cluster.router_process import router_command
from tandem.common import log as logs
from tandem.common.errors import ConfigError, WorkerFailed
from tandem.common.hosted import OnProgress, Server
from tandem.common.model_dir import model_name, resolve_model
from tandem.common.worker_config import Role, WorkerConfig, cluster_key_from_env
from tandem.engine.config import EngineConfig

log = logging.getLogger("tandem.cluster")

HEALTH_INTERVAL = 1.0  # seconds


class _ServerClass(Protocol):
    def start(self, config: WorkerConfig, engine: EngineConfig, on_progress: OnProgress | None = None) -> Server: ...


def run_router(options: RouterOptions) -> int:
    """The router's exit code. Raises ConfigError."""
    from tandem.router.__main__ import main

    default = DEMO_NAME if options.model is None else model_name(options.model)
    directory = str(resolve_model(options.directory, weights=False))
    flags = replace(options, model=directory, served_model_name=options.served_model_name or [default])
    command = router_command(flags, flags, _redis_url(options), cluster_key_from_env(), options.prefill)
    os.environ.update(command.secrets)
    return main(command.arguments)


def run_worker(role: Role, options: WorkerOptions) -> None:
    """Raises TandemError when it cannot start, or when its loop ended by itself."""
    config = WorkerConfig(
        name=options.name or f"{role}-{socket.gethostname()}",
        role=role,
        redis_url=_redis_url(options),
        cluster_key=cluster_key_from_env(),
        host=options.host,
        port=options.port,
        cluster=options.cluster,
        kv_connector=options.kv_connector,
    )
    logs.configure(options.log_level.value)
    leave = _Leave()
    server = _server_class(role).start(config, options.engine_config(options.directory))
    for fact, value in server.describe().items():
        log.info("%s: %s", fact, value)
    log.info("%s is ready", config.name)
    while not leave.asked.wait(HEALTH_INTERVAL):
        if not server.healthy():
            raise WorkerFailed(f"{config.name}: its loop ended; see the log")
    log.info("%s is draining", config.name)
    if not server.drain(options.drain_timeout):
        log.warning("%s gives up what still runs after %.0f s of draining", config.name, options.drain_timeout)
    server.stop()


class _Leave:
    """Turns the first signal into an event, the second into the end. Main thread only."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.asked.is_set():
            os._exit(128 + signum)
        self.asked.set()


def _server_class(role: Role) -> _ServerClass:
    module = importlib.import_module(f"tandem.{role}_worker.service")
    return cast(_ServerClass, getattr(module, f"{role.capitalize()}Server"))


def _redis_url(options: ClusterFlags) -> str:
    if not options.redis_url:
        raise ConfigError("a single role needs the cluster's registry: give --redis-url or TANDEM_REDIS_URL")
    return options.redis_url
