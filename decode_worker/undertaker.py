"""Finds out whether a prefill worker whose link broke is dead: only then may its quarantined blocks be used again.

A broken link proves nothing: P may stand still, or the network may be cut one way only, and a write of P's may come
an hour later (rule H3). What proves it is that nobody, or somebody else, listens where P did.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from tandem.common.errors import TandemError
from tandem.common.service import incarnation_at
from tandem.decode_worker.worker import DecodeWorker

log = logging.getLogger("tandem.decode")

INTERVAL = 0.5  # seconds between looks
ANSWER_WITHIN = 2.0  # seconds, for P
STEP_WITHIN = 120.0  # seconds, for our own worker: one that takes longer is about to be replaced


@dataclass(frozen=True, slots=True)
class Peer:
    incarnation: str
    address: str  # host:port of its gRPC services


class Undertaker:
    """Belongs to the service's event loop; the worker's own state is touched on the worker's thread only."""

    def __init__(self, cluster_key: bytes, worker: DecodeWorker) -> None:
        self._key, self._worker = cluster_key, worker
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by incarnation

    def watch(self, peer: Peer) -> None:
        """Look after `peer` for as long as blocks of it are in quarantine."""
        if peer.address and peer.incarnation not in self._tasks:
            task = asyncio.create_task(self._follow(peer), name=f"undertaker-{peer.incarnation}")
            self._tasks[peer.incarnation] = task
            task.add_done_callback(lambda _: self._tasks.pop(peer.incarnation, None))

    async def _follow(self, peer: Peer) -> None:
        while peer.incarnation in await asyncio.wait_for(self._quarantined(), STEP_WITHIN):
            if await self._is_dead(peer):
                log.info("prefill worker %s is dead: its quarantined blocks are free", peer.incarnation)
                self._worker.inbox.put(lambda: self._worker.handoffs.peer_died(peer.incarnation))
            await asyncio.sleep(INTERVAL)

    async def _quarantined(self) -> set[str]:
        """Asked behind everything the broken link has put into the inbox."""
        answer: asyncio.Future[set[str]] = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()

        def look() -> None:
            peers = self._worker.handoffs.quarantined_peers
            loop.call_soon_threadsafe(lambda: None if answer.done() else answer.set_result(peers))

        self._worker.inbox.put(look)
        return await answer

    async def _is_dead(self, peer: Peer) -> bool:
        host, _, port = peer.address.rpartition(":")
        try:
            async with asyncio.timeout(ANSWER_WITHIN):
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
                writer.close()
                return await incarnation_at(peer.address, self._key) != peer.incarnation
        except ConnectionRefusedError:
            return True
        except (OSError, ValueError, TandemError):
            return False  # nobody can say; it may come back
