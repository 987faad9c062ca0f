"""How one worker process takes part in a cluster; what it computes is in engine/config.py."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from tandem.common.errors import ConfigError

Role = Literal["prefill", "decode"]
ROLES: tuple[str, ...] = get_args(Role)

KEY_VARIABLE = "TANDEM_CLUSTER_KEY"
MIN_KEY_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Raises ConfigError for a role, port or key that cannot work. Secrets are kept out of repr()."""

    name: str  # e.g. "prefill-0"
    role: Role
    redis_url: str = field(repr=False)  # may hold a password
    cluster_key: bytes = field(repr=False)
    host: str = "127.0.0.1"
    port: int = 0  # 0: any free port
    cluster: str = "default"
    kv_connector: str = "auto"

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ConfigError(f"worker {self.name!r} has role {self.role!r}; the roles are {', '.join(ROLES)}")
        if not self.name or not self.name.isprintable():
            raise ConfigError(f"worker name {self.name!r} is empty or not printable")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port {self.port} of worker {self.name!r} is not between 0 and 65535")
        if len(self.cluster_key) < MIN_KEY_BYTES:
            raise ConfigError(f"the cluster key has fewer than {MIN_KEY_BYTES} bytes; set {KEY_VARIABLE}")


def cluster_key_from_env(environ: Mapping[str, str] | None = None) -> bytes:
    """The key every process of a cluster shares, from TANDEM_CLUSTER_KEY (hex). Raises ConfigError.

    Never a flag: command lines are visible to every user of a machine.
    """
    text = (os.environ if environ is None else environ).get(KEY_VARIABLE, "")
    hint = f"set the same {2 * MIN_KEY_BYTES} or more hex digits everywhere, e.g. from `openssl rand -hex 32`"
    if not text:
        raise ConfigError(f"{KEY_VARIABLE} is not set; {hint}")
    try:
        key = bytes.fromhex(text)
    except ValueError:
        # No `from`: the cause would quote a piece of the key.
        raise ConfigError(f"{KEY_VARIABLE} is not hexadecimal; {hint}") from None
    if len(key) < MIN_KEY_BYTES:
        raise ConfigError(f"{KEY_VARIABLE} has only {len(key)} bytes; {hint}")
    return key
