"""Some layers of some blocks, as the bytes they are; nothing is copied until a connector asks.

memory  (rows, row_bytes) uint8, each row one block        rows = (5, 6, 9), bytes [start, stop)

row 5   [··████··]
row 6   [··████··]        whole rows that are neighbours are one run of bytes: few large pieces
row 9   [··████··]        move faster than many small ones
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.common.errors import TransferFailed


@dataclass(frozen=True, slots=True, eq=False)
class Payload:
    memory: Tensor  # (n, row_bytes) uint8, rows contiguous
    rows: Sequence[int]
    start: int = 0  # bytes of each row [start, stop)
    stop: int = 0

    @classmethod
    def whole(cls, tensor: Tensor) -> Payload:
        """All of `tensor`, (n, bytes) uint8, contiguous."""
        assert tensor.dim() == 2 and tensor.dtype == torch.uint8 and tensor.is_contiguous()
        return cls(tensor, range(tensor.shape[0]), 0, tensor.shape[1])

    @classmethod
    def layers(cls, memory: Tensor, rows: Sequence[int], first_byte: int, num_bytes: int) -> Payload:
        return cls(memory, rows, first_byte, first_byte + num_bytes)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def row_bytes(self) -> int:
        return self.stop - self.start

    @property
    def nbytes(self) -> int:
        return len(self.rows) * self.row_bytes

    def __getitem__(self, part: slice) -> Payload:
        return Payload(self.memory, self.rows[part], self.start, self.stop)

    def row(self, index: int) -> Tensor:
        """(row_bytes,) uint8, a view."""
        return self.memory[self.rows[index], self.start : self.stop]

    def runs(self) -> Iterator[tuple[int, int, Tensor]]:
        """(index of its first row, number of rows, bytes) of each contiguous piece, in order; views."""
        for first, count in runs_of(self.rows) if self._is_whole else ((i, 1) for i in range(len(self.rows))):
            row = self.rows[first]
            yield first, count, self.memory[row : row + count, self.start : self.stop].reshape(-1)

    def tensor(self) -> Tensor:
        """(len, row_bytes) uint8, contiguous; a view if the rows are neighbours and whole, else a copy."""
        first, count = next(runs_of(self.rows))
        if self._is_whole and count == len(self.rows):
            return self.memory[self.rows[first] : self.rows[first] + count]
        if self.memory.device.type == "cpu":  # numpy moves rows several times faster than torch
            return torch.from_numpy(self.memory.numpy()[list(self.rows), self.start : self.stop])
        ids = torch.tensor(self.rows, dtype=torch.int64, device=self.memory.device)
        return self.memory[:, self.start : self.stop].index_select(0, ids)

    def check_place(self, targets: Sequence[int], start: int, num_blocks: int, block_bytes: int) -> None:
        """Raises TransferFailed unless each row, written from byte `start` of its target on, stays inside it."""
        fits = len(targets) == len(self) and all(0 <= block < num_blocks for block in targets)
        if not fits or start + self.row_bytes > block_bytes:
            raise TransferFailed(
                f"{len(self)} rows of bytes [{start}, {start + self.row_bytes}) do not fit {len(targets)} targets "
                f"among D's {num_blocks} blocks of {block_bytes} bytes"
            )

    @property
    def _is_whole(self) -> bool:
        return self.row_bytes == self.memory.shape[1]


def runs_of(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(index, length) of each longest stretch of consecutive numbers in `rows`."""
    first = 0
    for index in range(1, len(rows) + 1):
        if index == len(rows) or rows[index] != rows[index - 1] + 1:
            yield first, index - first
            first = index
