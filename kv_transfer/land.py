"""D's end of a link: receives each announced payload, compares it with its digests, and hands it to the worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tandem.common.errors import TransferFailed
from tandem.common.handoff import Abort, Frame, Grant, Heartbeat, Message
from tandem.kv_transfer.base import Receiver
from tandem.kv_transfer.context import Context
from tandem.kv_transfer.frame import check_frame, check_payload
from tandem.kv_transfer.link import Link
from tandem.kv_transfer.payload import Payload


@dataclass(frozen=True, slots=True)
class Granted:
    """D's blocks of one grant: prompt block `first_block + i` is blocks[i]."""

    generation: int
    first_block: int
    blocks: tuple[int, ...]


class LandLink(Link[Message, Receiver]):
    """Delivers P's messages in P's order: `on_frame(frame, payload)` for frames, `on_message` for the others.

    A payload that does not match its digests is dropped and its transfer aborted: P is told, and `on_message` gets
    the same Abort. A header that does not fit the layout loses the link: the payload behind it cannot be received.
    A frame of no current grant is taken off the wire and dropped (rule H2). The callbacks run on the link's thread,
    for heartbeats on the channel's; the worker's account (Landing) has the last word on whether a frame is accepted.
    """

    def __init__(
        self,
        context: Context,
        path: Receiver,
        on_message: Callable[[Message], None],
        on_frame: Callable[[Frame, Payload], None],
        on_lost: Callable[[str], None],
        timeout: float,
    ) -> None:
        super().__init__(context, path, on_lost, timeout)
        self._on_message = on_message
        self._on_frame = on_frame
        self._granted: dict[bytes, Granted] = {}

    @property
    def one_sided(self) -> bool:
        """Whether P writes into D's blocks by itself. Known once P could ask for a grant."""
        return self._path.one_sided

    def grant(self, grant: Grant, blocks: Sequence[int]) -> None:
        """Tell P that `blocks` are its to fill; where it writes by itself, also which they are."""
        with self._changed:
            self._granted[grant.transfer_id] = Granted(grant.generation, grant.first_block, tuple(blocks))
        self.post(grant)

    def revoke(self, transfer_id: bytes) -> None:
        """The grant is over: frames of it are dropped from now on."""
        with self._changed:
            self._granted.pop(transfer_id, None)

    def _held(self) -> tuple[bytes, ...]:
        return ()

    def _incoming_message(self, message: Message) -> None:
        if isinstance(message, Heartbeat):
            self._on_message(message)  # now: the thread may be waiting for a payload
        else:
            self._put(message)

    def _serve(self, job: Message) -> None:
        if not isinstance(job, Frame):
            self._on_message(job)
            return
        check_frame(job, self._context.layout)
        blocks = self._blocks_of(job)
        if self._path.one_sided and blocks is None:
            return
        payload = self._path.receive(job, blocks or (), self._timeout)
        if blocks is None:
            return
        try:
            check_payload(job, payload)
        except TransferFailed as exc:
            abort = Abort(job.transfer_id, job.generation, exc.message)
            self._channel.send(abort)
            self._on_message(abort)
        else:
            self._on_frame(job, payload)

    def _blocks_of(self, frame: Frame) -> tuple[int, ...] | None:
        """D's blocks that `frame` is about; None when it is of no current grant, or outside it."""
        with self._changed:
            granted = self._granted.get(frame.transfer_id)
        if granted is None or granted.generation != frame.generation:
            return None
        start = frame.first_block - granted.first_block
        blocks = granted.blocks[start : start + frame.num_blocks] if start >= 0 else ()
        return blocks if len(blocks) == frame.num_blocks else None
