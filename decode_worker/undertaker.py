"""Ends the quarantine of blocks whose link broke: when P says that nothing is in flight, or is dead.

A broken link proves nothing: P may stand still, or the network may be cut one way only, and a write of P's may come
an hour later (rule H3). Proof is P's own word, or that nobody, or another worker, listens where P did.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tandem.common.errors import TandemError

log = logging.getLogger("tandem.decode")

INTERVAL = 0.5  # seconds between looks
ANSWER_WITHIN = 30.0  # seconds; P may be in a long step


@dataclass(frozen=True, slots=True)
class Peer:
    incarnation: str
    address: str  # host:port of its gRPC services


@dataclass(frozen=True, slots=True)
class Answer:
    incarnation: str  # of who answers
    quiet: bool  # nothing of a former link is in flight


@dataclass(frozen=True, slots=True)
class Undertaker:
    """Of one link. Belongs to the service's event loop."""

    quarantined: Callable[[], Awaitable[bool]]  # whether blocks of the link still are
    release: Callable[[], None]
    ask: Callable[[str], Awaitable[Answer]]  # the prefill worker at an address. Raises TandemError

    async def follow(self, peer: Peer) -> None:
        """Until no block that `peer` could write to is in quarantine. Raises TandemError when our worker is lost."""
        while await self.quarantined():
            if await self._is_over(peer):
                log.info("nothing of prefill worker %s is in flight: its quarantined blocks are free", peer.incarnation)
                self.release()
            await asyncio.sleep(INTERVAL)

    async def _is_over(self, peer: Peer) -> bool:
        host, _, port = peer.address.rpartition(":")
        try:
            async with asyncio.timeout(ANSWER_WITHIN):
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
                writer.close()
                answer = await self.ask(peer.address)
        except ConnectionRefusedError:
            return True
        except (OSError, ValueError, OverflowError, TandemError):
            return False  # nobody can say; it may come back
        return answer.quiet or answer.incarnation != peer.incarnation
