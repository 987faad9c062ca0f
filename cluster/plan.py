"""What to ask Ray for, from the flags and from what Ray has."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

from tandem.cluster.options import ServeOptions
from tandem.cluster.ray_session import RaySession
from tandem.cluster.ray_workers import LaunchSpec, Placement
from tandem.common.errors import ConfigError
from tandem.common.worker_config import Role

ROLES: tuple[Role, ...] = ("prefill", "decode")
PREFILL_NICENESS = 5  # on one machine without GPUs decode's steps stay steady because prefill yields


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the workers register, and the key they share."""

    redis_url: str
    cluster_key: bytes


def launch_spec(options: ServeOptions, directory: str, ray: RaySession, endpoint: Endpoint) -> LaunchSpec:
    """Raises ConfigError when the workers cannot be placed."""
    if ray.nodes > 1 and not options.redis_url:
        raise ConfigError("workers on other machines cannot reach the embedded Redis; give --redis-url")
    gpus, sharing = _gpus(options, ray)
    engine = options.engine_config(directory)
    if sharing > 1:
        engine = replace(engine, gpu_memory_utilization=engine.gpu_memory_utilization / sharing)
    return LaunchSpec(
        engine=engine,
        redis_url=endpoint.redis_url,
        cluster_key=endpoint.cluster_key,
        cluster=options.cluster,
        kv_connector=options.kv_connector,
        log_level=options.log_level.value,
        host="127.0.0.1" if ray.nodes == 1 else "",
        drain_timeout=options.drain_timeout,
        keeper=os.getpid() if ray.local else 0,
        placement={role: _placement(options, ray, role, gpus) for role in ROLES},
    )


def threads_per_worker(options: ServeOptions) -> int:
    """Steps with many tiny operations are steadier on one thread than on cores that another worker uses too."""
    return max(1, (os.cpu_count() or 1) // _workers(options))


def _workers(options: ServeOptions) -> int:
    return max(1, options.prefill + options.decode)


def _sharing(options: ServeOptions, ray: RaySession, role: Role) -> int:
    """Workers on one node. Where nodes are made for a role, as on Kubernetes, each has one."""
    if ray.local:
        return 0  # `tandem serve` has set the threads of all
    return 1 if role in ray.resources else math.ceil(_workers(options) / max(1, ray.nodes))


def _placement(options: ServeOptions, ray: RaySession, role: Role, gpus: float) -> Placement:
    shares_cores = ray.local and not gpus and role == "prefill"
    return Placement(
        num_cpus=0.0 if ray.local else 1.0,
        num_gpus=gpus,
        resources={role: 1.0} if role in ray.resources else {},
        niceness=PREFILL_NICENESS if shares_cores else 0,
        sharing=_sharing(options, ray, role),
    )


def _gpus(options: ServeOptions, ray: RaySession) -> tuple[float, int]:
    """GPUs one worker asks for, and how many workers share one."""
    available = int(ray.resources.get("GPU", 0.0)) if options.device.value != "cpu" else 0
    ranks, workers = options.tensor_parallel_size, options.prefill + options.decode
    if not available:
        return 0.0, 1
    if workers * ranks <= available:
        return float(ranks), 1
    if ranks > 1:
        raise ConfigError(f"{workers} workers of {ranks} ranks need {workers * ranks} GPUs, Ray has {available}")
    sharing = math.ceil(workers / available)
    return math.floor(1e4 / sharing) / 1e4, sharing
