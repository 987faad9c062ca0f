"""GET /status: the cluster as the router sees it, for `tandem status` and other people's dashboards."""

from __future__ import annotations

from typing import Any

from tandem.common.worker_info import Load
from tandem.router.membership import Membership, Worker
from tandem.router.settings import RouterSettings


def cluster_status(settings: RouterSettings, membership: Membership) -> dict[str, Any]:
    workers = sorted(membership.all_workers(), key=lambda worker: worker.name)
    taking_part = {worker.incarnation for worker in membership.workers()}
    return {
        "model": settings.served_model_names[0],
        "cluster": settings.cluster,
        "registry": "up" if membership.registry_up else "down",
        "max_model_len": membership.max_model_len,
        "workers": [_worker(worker, worker.incarnation in taking_part) for worker in workers],
    }


def not_ready_reason(settings: RouterSettings, membership: Membership) -> str | None:
    if not membership.can_serve():
        return "no decode worker is ready"
    if settings.prefill_expected and not membership.prefill_seen:
        return "no prefill worker is ready"
    return None


def _worker(worker: Worker, takes_part: bool) -> dict[str, Any]:
    about, load = worker.description, worker.load
    return {
        "name": about.name,
        "role": about.role,
        "pid": about.pid,
        "incarnation": about.incarnation,
        "state": worker.state if takes_part else "incompatible",
        "address": worker.client.address,
        "model": about.model,
        "max_num_seqs": about.max_num_seqs,
        "block_size": about.block_size,
        "running": load.running,
        "waiting": load.waiting,
        "waiting_tokens": load.waiting_tokens,
        "kv": _kv(load),
    }


def _kv(load: Load) -> dict[str, int]:
    return {
        "total": load.blocks_total,
        "free": load.blocks_free,
        "cached": load.blocks_cached,
        "owned": load.blocks_owned,
        "reserved": load.blocks_reserved,
        "quarantined": load.blocks_quarantined,
    }
