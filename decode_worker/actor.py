"""The Ray actor that hosts one decode worker; see tandem.common.hosted for its life."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tandem.common.hosted import HostedWorker, HostOptions, OnProgress, Server
from tandem.common.worker_config import WorkerConfig
from tandem.engine.config import EngineConfig


class DecodeActor(HostedWorker):
    """The cluster passes this class to `ray.remote`; nothing here needs Ray before a node's address is asked for."""

    def __init__(self, worker: WorkerConfig, engine: EngineConfig, options: HostOptions) -> None:
        def start(on_progress: OnProgress) -> Server:
            # Imported here, in the loading thread: torch takes seconds, and report() must answer meanwhile.
            from tandem.decode_worker.service import DecodeServer

            return DecodeServer.start(_on_this_node(worker), engine, on_progress)

        super().__init__(worker.name, start, options)
        self.leave_on_sigterm()  # Ray calls the constructor on the main thread


def _on_this_node(worker: WorkerConfig) -> WorkerConfig:
    """An empty host stands for the node's own address, which is known only here."""
    if worker.host:
        return worker
    import ray.util

    util: Any = ray.util  # Ray's own annotations have unknowns
    return replace(worker, host=str(util.get_node_ip_address()))
