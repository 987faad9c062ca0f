"""The interface of all KV connectors: one small sender on P, one small receiver on D, for one pair of incarnations.

Headers (`Frame`, common/handoff.py) travel over the pair's authenticated channel, in order; a connector moves the
payload each header announces. So D knows what to expect before a byte arrives, and no operation waits unannounced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from tandem.common.handoff import Frame, Message, Rendezvous
from tandem.common.kv_layout import KVLayout


class BlockStore(Protocol):
    """The KV cache as a connector and a worker see it; called by the worker's thread only."""

    layout: KVLayout

    def read(self, blocks: Sequence[int]) -> Tensor:
        """A contiguous copy of the blocks' bytes: (len(blocks), layout.block_bytes) uint8 on the cache's device."""
        ...

    def write(self, blocks: Sequence[int], payload: Tensor) -> None:
        """Overwrite the blocks with `payload`, shaped as `read` returns it."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Copy one block (copy-on-write of a shared, partly filled block)."""
        ...


class Sender(Protocol):
    """P's end. Used by one thread."""

    @property
    def layout(self) -> KVLayout:
        """Of the blocks it moves; the same at both ends."""
        ...

    def open(self, timeout: float) -> None:
        """Set the data path up (both ends do, at the same time). Raises TransferFailed."""
        ...

    def rendezvous(self, message: Rendezvous) -> None:
        """Take what the peer's end published, at any time; called by the channel's thread. Raises TransferFailed."""
        ...

    def send(self, frame: Frame, payload: Tensor, timeout: float) -> None:
        """Move `payload`, (num_blocks, bytes) uint8, whose header was just sent. Raises TransferFailed."""
        ...

    def close(self) -> None:
        """Tear the data path down; unblocks a `send` in another thread. Idempotent."""
        ...


class Receiver(Protocol):
    """D's end. Used by one thread."""

    @property
    def layout(self) -> KVLayout: ...

    def open(self, timeout: float) -> None: ...

    def rendezvous(self, message: Rendezvous) -> None: ...

    def receive(self, frame: Frame, timeout: float) -> Tensor:
        """The payload `frame` announces, (num_blocks, bytes) uint8. Raises TransferFailed."""
        ...

    def close(self) -> None: ...


class Channel(Protocol):
    """An ordered, authenticated stream of messages to one peer incarnation."""

    def send(self, message: Message) -> None:
        """Queue a message; never blocks. Raises TransferFailed when the channel is closed."""
        ...

    def listen(self, on_message: Callable[[Message], None], on_close: Callable[[str], None]) -> None:
        """Deliver each incoming message, then `on_close(reason)` exactly once; from the channel's own thread."""
        ...

    def close(self) -> None: ...
