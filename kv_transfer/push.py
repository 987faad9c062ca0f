"""P's end of a link: takes payloads from the worker's thread and pushes them to D in order, frame by frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tandem.common.failpoints import failpoint
from tandem.common.handoff import Frame, Manifest, Message, Reserve
from tandem.kv_transfer.base import Sender
from tandem.kv_transfer.context import Context
from tandem.kv_transfer.frame import BlockDigests, piece_digests, rows_per_frame
from tandem.kv_transfer.link import Link
from tandem.kv_transfer.payload import Payload


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Prompt blocks from `first_block` on, some of their layers. Whoever pushes it keeps `payload` as it is until it
    is acknowledged, or until `forget` has called back."""

    first_block: int
    payload: Payload
    first_layer: int
    num_layers: int
    targets: tuple[int, ...] = ()  # D's blocks for a one-sided connector, one per row
    ready: Callable[[], None] | None = None  # waits until the device has written the payload


@dataclass(slots=True, eq=False)
class _Job:
    transfer_id: bytes
    generation: int
    work: Piece | Manifest
    on_sent: Callable[[], None] | None = None
    dropped: bool = field(default=False, kw_only=True)  # set by forget, also on the job being served


class PushLink(Link[_Job, Sender]):
    """`on_message` gets everything D sends, from the channel's thread. The methods may be called from any thread.

    Two-sided: a header goes out immediately before its payload, so D never waits for a payload nobody sends.
    One-sided: it goes out when the payload has been written. A digest reaches the manifest only if its frame was sent.
    """

    def __init__(
        self,
        context: Context,
        path: Sender,
        on_message: Callable[[Message], None],
        on_lost: Callable[[str], None],
        timeout: float,
    ) -> None:
        super().__init__(context, path, on_lost, timeout)
        self._on_message = on_message
        self._digests: dict[bytes, BlockDigests] = {}  # of what was sent, by transfer id
        self._named: dict[bytes, None] = {}  # transfers from Reserve to Ack or `forget`
        self._serving: _Job | None = None
        self._quiet: list[Callable[[], None]] = []  # to call behind the job being served
        self._backlog = 0

    @property
    def backlog_bytes(self) -> int:
        """Payload bytes pushed by the worker and not yet taken by D."""
        return 0 if self._ended else self._backlog

    def reserve(self, message: Reserve) -> None:
        """Ask for room; heartbeats name the transfer from now on."""
        with self._changed:
            self._named[message.transfer_id] = None
        self.post(message)

    def push(self, transfer_id: bytes, generation: int, piece: Piece) -> None:
        with self._changed:
            self._backlog += piece.payload.nbytes
        self._put(_Job(transfer_id, generation, piece))

    def finish(self, manifest: Manifest, on_sent: Callable[[], None] | None = None) -> None:
        """Queue the manifest behind all frames of the transfer; the digests of what was sent are filled in.

        `on_sent` is called from the link's thread when it has left.
        """
        self._put(_Job(manifest.transfer_id, manifest.generation, manifest, on_sent))

    def forget(self, transfer_id: bytes, on_quiet: Callable[[], None]) -> None:
        """Drop what is queued of a transfer that is over. `on_quiet` is called, at once or from the link's thread,
        when nothing of it is in flight any more: then, and not before, its blocks may be used for something else."""
        with self._changed:
            self._drop(transfer_id)
            busy = self._serving is not None and self._serving.transfer_id == transfer_id
            if busy:
                self._quiet.append(on_quiet)
        if not busy:
            on_quiet()

    def _drop(self, transfer_id: bytes) -> None:
        for job in (*self._jobs, self._serving):
            if job is not None and job.transfer_id == transfer_id:
                job.dropped = True
        kept = [job for job in self._jobs if not job.dropped]
        self._backlog -= sum(_size(job) for job in self._jobs if job.dropped)
        self._jobs.clear()
        self._jobs.extend(kept)
        self._digests.pop(transfer_id, None)
        self._named.pop(transfer_id, None)

    def _held(self) -> tuple[bytes, ...]:
        with self._changed:
            return tuple(self._named)

    def _incoming_message(self, message: Message) -> None:
        self._on_message(message)

    def _take(self) -> _Job | None:
        with self._changed:
            self._serving = super()._take()
            return self._serving

    def _serve(self, job: _Job) -> None:
        try:
            if isinstance(job.work, Piece):
                self._send_piece(job, job.work)
            else:
                self._send_manifest(job, job.work)
        finally:
            with self._changed:
                self._serving, quiet, self._quiet = None, self._quiet, []
            for callback in quiet:
                callback()

    def _send_piece(self, job: _Job, piece: Piece) -> None:
        if piece.ready is not None:
            piece.ready()
        step = rows_per_frame(piece.payload.row_bytes)
        for start in range(0, len(piece.payload), step):
            stop = start + step
            part = replace(
                piece,
                first_block=piece.first_block + start,
                payload=piece.payload[start:stop],
                targets=piece.targets[start:stop],
            )
            if not job.dropped:
                self._send_frame(job, part)
            with self._changed:
                self._backlog -= part.payload.nbytes

    def _send_frame(self, job: _Job, piece: Piece) -> None:
        digests = piece_digests(piece.payload, job.transfer_id)
        frame = Frame(
            transfer_id=job.transfer_id,
            generation=job.generation,
            first_block=piece.first_block,
            num_blocks=len(piece.payload),
            first_layer=piece.first_layer,
            num_layers=piece.num_layers,
            num_bytes=piece.payload.nbytes,
            digests=digests,
        )
        with self._changed:
            if job.dropped:
                return
            layers = self._context.layout.layers
            self._digests.setdefault(job.transfer_id, BlockDigests(layers)).add(frame)
        self._move(frame, piece)
        failpoint("prefill.pushed")

    def _move(self, frame: Frame, piece: Piece) -> None:
        if not self._path.one_sided:
            self._channel.send(frame)
        self._path.send(frame, piece.payload, piece.targets, self._timeout)
        if self._path.one_sided:
            self._channel.send(frame)

    def _send_manifest(self, job: _Job, manifest: Manifest) -> None:
        with self._changed:
            if job.dropped:
                return
            digests = self._digests.pop(job.transfer_id, BlockDigests(self._context.layout.layers))
        self._channel.send(replace(manifest, digests=digests.in_order()))
        if job.on_sent is not None:
            job.on_sent()


def _size(job: _Job) -> int:
    return job.work.payload.nbytes if isinstance(job.work, Piece) else 0
