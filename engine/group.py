"""The collectives of one tensor-parallel group, over a process group of our own (no world, no default group).

Rank 0 is the worker's process, ranks 1.. its followers (parallel.py). Every rank calls the same collectives in the
same order. With one rank they are all free. Only tensors travel, nothing is pickled.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore, Store  # public as torch.distributed.*, but not to pyright

from tandem.common.errors import WorkerFailed

JOIN_TIMEOUT = timedelta(seconds=60)  # all ranks are up and only have to connect
STEP_TIMEOUT = timedelta(seconds=60)  # ranks do equal work, so they reach a collective at about the same time
LOAD_TIMEOUT = timedelta(seconds=1800)  # one rank may read its weights from a much slower disk


class Group:
    """One rank's end. Used by the engine's thread only, except `abort`."""

    def __init__(self, rank: int = 0, world: int = 1, device: torch.device | None = None, backend: Any = None) -> None:
        self.rank = rank
        self.world = world
        self.device = device or torch.device("cpu")
        self._backend: Any = backend  # ProcessGroupGloo | ProcessGroupNCCL; None with one rank
        self.failure = ""  # why the group broke

    @classmethod
    def join(cls, store: Path, rank: int, world: int, device: torch.device) -> Group:
        """Meet the other ranks at the file `store`. Raises WorkerFailed when one does not come in time."""
        try:
            files = FileStore(str(store), world)
            files.set_timeout(JOIN_TIMEOUT)
            backend = _nccl(files, rank, world) if device.type == "cuda" else _gloo(files, rank, world)
            group = cls(rank, world, device, backend)
            group.minimum(0)  # NCCL connects at the first collective: from here on the store is not needed
        except RuntimeError as exc:
            raise WorkerFailed(f"tensor-parallel rank {rank} of {world} could not join its group: {exc}") from exc
        return group

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world > 1:
            self._wait(self._backend.allreduce, [values])
        return values

    def gather(self, values: Tensor) -> list[Tensor]:
        """On rank 0 every rank's `values`, which have one shape; elsewhere only its own."""
        if self.world == 1:
            return [values]
        values = values.contiguous()
        parts = [torch.empty_like(values) for _ in range(self.world)] if self.rank == 0 else []
        self._wait(self._backend.gather, parts, values, 0)
        return parts or [values]

    def scatter(self, parts: list[Tensor], out: Tensor) -> Tensor:
        """`parts[rank]` of rank 0's list, received into `out`."""
        self._wait(self._backend.scatter, out, [part.contiguous() for part in parts], 0)
        return out

    def broadcast(self, values: Tensor) -> Tensor:
        """Rank 0's `values`, a host tensor that has the same shape and dtype everywhere."""
        if self.world == 1:
            return values
        moved = values.to(self.device)
        self._wait(self._backend.broadcast, moved, 0)
        return values if self.rank == 0 else moved.cpu()

    def minimum(self, value: int) -> int:
        """The least `value` of all ranks; waits as long as loading may take."""
        if self.world == 1:
            return value
        cell = torch.tensor([value], dtype=torch.int64, device=self.device)
        self._wait(self._backend.allreduce, cell, dist.ReduceOp.MIN, LOAD_TIMEOUT)
        return int(cell.item())

    def abort(self, reason: str) -> None:
        """Another thread saw the group break. NCCL kernels do not notice a lost peer by themselves; Gloo does."""
        self.failure = self.failure or reason
        if self.device.type == "cuda" and self._backend is not None:
            self._backend.abort()

    def check(self) -> None:
        """Raises WorkerFailed when the group broke: what was computed meanwhile is worthless."""
        if self.failure:
            raise WorkerFailed(self.failure)

    def close(self) -> None:
        self._backend = None

    def _wait(self, collective: Any, *arguments: Any) -> None:
        self.check()
        try:
            collective(*arguments).wait()
        except RuntimeError as exc:
            self.failure = self.failure or f"tensor-parallel rank {self.rank} of {self.world} lost its group: {exc}"
            raise WorkerFailed(self.failure) from exc


def _gloo(store: Store, rank: int, world: int) -> Any:
    """All ranks are on this machine, so only loopback is listened on."""
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._timeout = STEP_TIMEOUT
    return gloo(store, rank, world, options)


def _nccl(store: Store, rank: int, world: int) -> Any:
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = STEP_TIMEOUT
    return nccl(store, rank, world, options)
