"""Starts a Ray of our own, or joins one; and reaches a running one for `tandem scale`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tandem.common.errors import ConfigError

# Ray reserves shared memory for objects; ours hold views of a few kilobytes.
_OBJECT_STORE_BYTES = 80 << 20

_AUTH_MODE = "RAY_AUTH_MODE"
_NICENESS = "RAY_worker_niceness"  # Ray's 15 would leave a worker's own threads no room below it, and all else above
_OTHER_NODES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # despite its name: "0" makes Ray listen on 127.0.0.1 only
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    _AUTH_MODE: "token",  # Ray's default for new clusters, said outright to spare its warning
    "RAY_DEDUP_LOGS": "0",
    "RAY_enable_metrics_collection": "0",  # the exporter's thread can end the process it is in (2.60: SIGSEGV at start)
    _NICENESS: "0",
}


@dataclass(frozen=True, slots=True)
class RaySession:
    address: str
    dashboard_url: str  # empty: none
    local: bool  # ours: ends with us
    nodes: int
    resources: dict[str, float]  # of the whole cluster


def namespace(cluster: str) -> str:
    """Of the cluster's actors; names are unique in it."""
    return "tandem" if cluster == "default" else f"tandem-{cluster}"


def prepare(address: str | None) -> None:
    """Set Ray's environment, which it reads when it is imported: call this before anything imports Ray.

    Raises ConfigError for a Ray that other machines reach and that asks for no token: whoever speaks to it may run
    code in it.
    """
    local = address is None or address.startswith("127.0.0.1:")
    plain = {} if sys.stdout.isatty() else {"RAY_COLOR_PREFIX": "0"}
    for name, value in (_QUIET | plain | ({_OTHER_NODES: "0"} if local else {})).items():
        os.environ.setdefault(name, value)  # the user's own settings win …
    alone = local and os.environ[_OTHER_NODES] == "0"
    mode = os.environ[_AUTH_MODE]
    if not alone and mode.lower() != "token":  # … but for this one
        raise ConfigError(
            f"{_AUTH_MODE}={mode} leaves Ray at {address or 'all addresses'} open to every machine that reaches it; "
            f"set {_AUTH_MODE}=token there and here, and the same RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        )


def start(directory: Path, namespace: str, processes: int, dashboard: bool) -> RaySession:
    """A Ray of one node, with its files below `directory`, ended by `stop`. Raises ConfigError.

    Main thread only: Ray's own processes die with the thread that started them.
    """
    prepare(None)
    return _init(
        address="local",
        namespace=namespace,
        include_dashboard=dashboard,
        dashboard_host="127.0.0.1",
        num_cpus=processes,  # our actors ask for none; so many interpreters are started ahead
        object_store_memory=_OBJECT_STORE_BYTES,
        _temp_dir=str(directory),
    )


def join(address: str, namespace: str, logs: bool) -> RaySession:
    """Connect to a running Ray. Raises ConfigError."""
    prepare(address)
    return _init(address=address, namespace=namespace, log_to_driver=logs)


def stop() -> None:
    import ray

    api: Any = ray
    api.shutdown()


@contextmanager
def joined(address: str, namespace: str) -> Generator[RaySession]:
    session = join(address, namespace, logs=False)
    try:
        yield session
    finally:
        stop()


def _init(**arguments: Any) -> RaySession:
    import ray
    import ray.exceptions

    api: Any = ray  # its own annotations have unknowns
    try:
        context = api.init(logging_level=logging.ERROR, **arguments)
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as exc:
        reason = next(iter(str(exc).splitlines()), type(exc).__name__)
        raise ConfigError(f"Ray could not be reached or started: {reason}") from exc
    nodes = [node for node in cast(list[dict[str, Any]], api.nodes()) if node["Alive"]]
    url = str(context.dashboard_url or "")
    return RaySession(
        address=str(context.address_info["address"]),
        dashboard_url=f"http://{url}" if url else "",
        local=arguments["address"] == "local",
        nodes=len(nodes),
        resources={str(name): float(amount) for name, amount in api.cluster_resources().items()},
    )
