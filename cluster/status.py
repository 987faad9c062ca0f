"""`tandem status`: the cluster as its router sees it."""

from __future__ import annotations

import json
import sys
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from tandem.cluster.api_client import ApiClient

_COLUMNS = ("worker", "role", "state", "pid", "running", "waiting", "KV used", "cached", "blocks", "incarnation")

_WIDTH = 110  # characters


def show(url: str, api_key: str | None, as_json: bool) -> None:
    """Raises ApiError."""
    status = ApiClient(url, api_key).get("/status")
    if as_json:
        json.dump(status, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        console = Console(highlight=False)
        console.width = max(console.width, _WIDTH)  # a table that is cut tells less than one that wraps
        console.print(table(status), summary(status))


def table(status: dict[str, Any]) -> Table:
    result = Table(*_COLUMNS, box=None, header_style="bold")
    for worker in cast(list[dict[str, Any]], status["workers"]):
        result.add_row(*row(worker))
    return result


def row(worker: dict[str, Any]) -> list[str]:
    kv = cast(dict[str, int], worker["kv"])
    total = kv["total"] or 1
    used = total - kv["free"] - kv["cached"]
    load = [str(worker[key]) for key in ("name", "role", "state", "pid", "running", "waiting")]
    return [*load, f"{used / total:.0%}", f"{kv['cached'] / total:.0%}", f"{kv['total']:,}", str(worker["incarnation"])]


def summary(status: dict[str, Any]) -> str:
    """One line: the model, and how many workers each role has."""
    counts: dict[str, int] = {}
    for worker in cast(list[dict[str, Any]], status["workers"]):
        if worker["state"] == "ready":
            counts[str(worker["role"])] = counts.get(str(worker["role"]), 0) + 1
    pools = ", ".join(f"{count} {role}" for role, count in sorted(counts.items(), reverse=True)) or "no worker ready"
    return f"\n{status['model']}: {pools}; registry {status['registry']}"
