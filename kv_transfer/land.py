"""D's end of a link: receives each announced payload, compares it with its digests, and hands it to the worker."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tandem.common.errors import TransferFailed
from tandem.common.handoff import Abort, Frame, Message
from tandem.kv_transfer.base import Channel, Receiver
from tandem.kv_transfer.frame import check_frame, check_payload
from tandem.kv_transfer.link import Link


class LandLink(Link[Message, Receiver]):
    """Delivers P's messages in P's order: `on_frame(frame, payload)` for frames, `on_message` for the others.

    A payload that does not match its digests is dropped and its transfer aborted: P is told, and `on_message` gets
    the same Abort. A header that does not fit the layout loses the link: the payload behind it cannot be received.
    Both callbacks run on the link's thread. Payloads are on the connector's device, in memory of their own; whether
    a frame belongs to a current transfer is the worker's to decide (Landing).
    """

    def __init__(
        self,
        channel: Channel,
        receiver: Receiver,
        on_message: Callable[[Message], None],
        on_frame: Callable[[Frame, Tensor], None],
        on_lost: Callable[[str], None],
        timeout: float,
    ) -> None:
        super().__init__(channel, receiver, on_lost, timeout)
        self._on_message = on_message
        self._on_frame = on_frame

    def _incoming_message(self, message: Message) -> None:
        self._put(message)

    def _serve(self, job: Message) -> None:
        if not isinstance(job, Frame):
            self._on_message(job)
            return
        check_frame(job, self._path.layout)
        payload = self._path.receive(job, self._timeout)
        try:
            check_payload(job, payload)
        except TransferFailed as exc:
            abort = Abort(job.transfer_id, job.generation, exc.message)
            self._channel.send(abort)
            self._on_message(abort)
        else:
            self._on_frame(job, payload)
