"""P's end of a link: takes payloads from the worker's thread and pushes them to D in order, frame by frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tandem.common.handoff import Frame, Manifest, Message
from tandem.kv_transfer.base import Channel, Sender
from tandem.kv_transfer.frame import block_digests, blocks_per_frame
from tandem.kv_transfer.link import Link


@dataclass(slots=True, eq=False)
class _Job:
    transfer_id: bytes
    generation: int
    dropped: bool = field(default=False, kw_only=True)  # set by forget, also on the job being served


@dataclass(slots=True, eq=False)
class _Push(_Job):
    first_block: int
    payload: Tensor


@dataclass(slots=True, eq=False)
class _Finish(_Job):
    num_tokens: int
    hashes: tuple[bytes, ...]
    first_tokens: tuple[int, ...]


class PushLink(Link[_Push | _Finish, Sender]):
    """`on_message` gets everything D sends, from the channel's thread. The methods may be called from any thread.

    A header goes out immediately before its payload, so D never waits for a payload nobody sends, and a digest
    reaches the manifest only if its frame was sent.
    """

    def __init__(
        self,
        channel: Channel,
        sender: Sender,
        on_message: Callable[[Message], None],
        on_lost: Callable[[str], None],
        timeout: float,
    ) -> None:
        super().__init__(channel, sender, on_lost, timeout)
        self._on_message = on_message
        self._digests: dict[bytes, dict[int, bytes]] = {}  # transfer id -> prompt block -> digest, of what was sent
        self._serving: _Push | _Finish | None = None
        self._backlog = 0

    @property
    def backlog_bytes(self) -> int:
        """Payload bytes pushed by the worker and not yet taken by D: what this link holds in memory."""
        return 0 if self._ended else self._backlog

    def push(self, transfer_id: bytes, generation: int, first_block: int, payload: Tensor) -> None:
        """Queue whole blocks from prompt block `first_block` on: (num_blocks, block_bytes) uint8, all layers.

        The link keeps `payload`; nobody may change it (BlockStore.read returns a copy). On CUDA it must have been
        made on the device's default stream.
        """
        assert payload.dim() == 2 and payload.shape[1] == self._path.layout.block_bytes and payload.is_contiguous()
        with self._changed:
            self._backlog += payload.nbytes
        self._put(_Push(transfer_id, generation, first_block, payload))

    def finish(
        self,
        transfer_id: bytes,
        generation: int,
        num_tokens: int,
        hashes: Sequence[bytes],
        first_tokens: Sequence[int],
    ) -> None:
        """Queue the Manifest behind all frames of the transfer; it carries the digests of what was sent."""
        self._put(_Finish(transfer_id, generation, num_tokens, tuple(hashes), tuple(first_tokens)))

    def forget(self, transfer_id: bytes) -> None:
        """Drop what is queued of a transfer that was aborted; a frame whose header is out is completed first."""
        with self._changed:
            for job in (*self._jobs, self._serving):
                if job is not None and job.transfer_id == transfer_id:
                    job.dropped = True
            kept = [job for job in self._jobs if not job.dropped]
            self._backlog -= sum(_size(job) for job in self._jobs if job.dropped)
            self._jobs.clear()
            self._jobs.extend(kept)
            self._digests.pop(transfer_id, None)

    def _incoming_message(self, message: Message) -> None:
        self._on_message(message)

    def _take(self) -> _Push | _Finish | None:
        with self._changed:
            self._serving = super()._take()
            return self._serving

    def _serve(self, job: _Push | _Finish) -> None:
        if isinstance(job, _Push):
            self._send_frames(job)
        else:
            self._send_manifest(job)
        self._serving = None

    def _send_frames(self, job: _Push) -> None:
        step = blocks_per_frame(self._path.layout)
        for start in range(0, job.payload.shape[0], step):
            piece = job.payload[start : start + step]
            self._send_frame(job, job.first_block + start, piece)
            with self._changed:
                self._backlog -= piece.nbytes

    def _send_frame(self, job: _Push, first_block: int, payload: Tensor) -> None:
        digests = block_digests(payload)
        frame = Frame(
            transfer_id=job.transfer_id,
            generation=job.generation,
            first_block=first_block,
            num_blocks=payload.shape[0],
            first_layer=0,
            num_layers=self._path.layout.layers,
            num_bytes=payload.nbytes,
            digests=digests,
        )
        with self._changed:
            if job.dropped:
                return
            self._digests.setdefault(job.transfer_id, {}).update(enumerate(digests, first_block))
        self._channel.send(frame)
        self._path.send(frame, payload, self._timeout)

    def _send_manifest(self, job: _Finish) -> None:
        with self._changed:
            if job.dropped:
                return
            digests = self._digests.pop(job.transfer_id, {})
        self._channel.send(
            Manifest(
                transfer_id=job.transfer_id,
                generation=job.generation,
                num_tokens=job.num_tokens,
                hashes=job.hashes,
                digests=tuple(digests[block] for block in sorted(digests)),
                first_tokens=job.first_tokens,
            )
        )


def _size(job: _Push | _Finish) -> int:
    return job.payload.nbytes if isinstance(job, _Push) else 0
