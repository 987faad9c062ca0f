"""The interface of all KV connectors: one small sender on P, one small receiver on D, for one pair of incarnations.

Headers (`Frame`, common/handoff.py) travel over the pair's authenticated channel, in order; a connector moves the
payloads. There are two kinds:

    two-sided   header, then payload; D receives into memory of its own and copies what it accepts     tcp, torch
    one-sided   P writes into the blocks D granted, then the header says that they are there    shm, nixl, cuda_ipc

With a two-sided connector nothing but D itself writes to D's blocks, so an aborted reservation is free at once (rule
H2). With a one-sided one a write may still be under way: the blocks wait in quarantine (rule H3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from tandem.common.handoff import Frame, Message
from tandem.common.kv_layout import KVLayout
from tandem.kv_transfer.payload import Payload


class BlockStore(Protocol):
    """The KV cache as a connector and a worker see it; called by the worker's thread only."""

    layout: KVLayout

    @property
    def memory(self) -> Tensor | None:
        """The cache itself, (num_blocks, layout.block_bytes) uint8; None when it is spread over several ranks."""
        ...

    @property
    def fd(self) -> int | None:
        """A file that backs `memory`, which another process may map; None: private memory."""
        ...

    def read(self, blocks: Sequence[int]) -> Tensor:
        """A contiguous copy of the blocks' bytes: (len(blocks), layout.block_bytes) uint8 on the cache's device."""
        ...

    def write(
        self, blocks: Sequence[int], payload: Tensor, first_layer: int = 0, num_layers: int | None = None
    ) -> None:
        """Overwrite layers of the blocks (all, unless told) with `payload`, (len(blocks), bytes) uint8."""
        ...

    def fence(self) -> Callable[[], None] | None:
        """Waits, in any thread, until the device has done what was asked of it so far; None: it has."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Copy one block (copy-on-write of a shared, partly filled block)."""
        ...

    def zero(self, blocks: Sequence[int]) -> None:
        """Overwrite blocks whose content must not be seen again: a NaN would live on in whoever gets them next."""
        ...


class Sender(Protocol):
    """P's end. Used by one thread, but for `close`."""

    @property
    def one_sided(self) -> bool: ...

    def open(self, timeout: float) -> None:
        """Set the data path up (both ends do, at the same time). Raises TransferFailed."""
        ...

    def send(self, frame: Frame, payload: Payload, targets: Sequence[int], timeout: float) -> None:
        """Move the payload of `frame`. Raises TransferFailed.

        Two-sided: its header was just sent; `targets` is empty. One-sided: write it into D's blocks `targets`, the
        frame's layers of each, and return when every byte is there. Either way nothing of it is in flight when this
        returns or raises: P's blocks are released then, and D is told so.
        """
        ...

    def close(self) -> None:
        """Tear the data path down; unblocks a `send` in another thread. Idempotent."""
        ...


class Receiver(Protocol):
    """D's end. Used by one thread, but for `close`."""

    @property
    def one_sided(self) -> bool: ...

    def open(self, timeout: float) -> None: ...

    def receive(self, frame: Frame, targets: Sequence[int], timeout: float) -> Payload:
        """The payload of `frame`. Raises TransferFailed.

        Two-sided: what `frame` announces, in memory of its own; `targets` is empty. One-sided: D's own blocks
        `targets`, once what P wrote before the header can be seen there; nothing is copied.
        """
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
