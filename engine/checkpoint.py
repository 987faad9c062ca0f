"""A model directory as it lies on disk: config.json and safetensors shards, trusted in nothing.

    shard:  u64 header length | JSON {name: {dtype, shape, data_offsets}} | data, without gaps or overlaps

Every fault is a ModelError of one line that names the file. Only headers are read here; tensors are views into a
memory map, so a process holds what it copies and no more.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from tandem.common.errors import ModelError

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
MAX_JSON_BYTES = 100 << 20  # as the safetensors library has it
SAMPLE_BYTES = 4096  # of each end of each tensor, for the revision
WIDTHS = {  # bytes of an element; the sub-byte types of quantized files are not among them
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
DTYPES = {  # that can be read
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
FLOATS = ("F32", "F16", "BF16")  # that weights have without a scale


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: bytes [begin, end) of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    directory: Path
    config: dict[str, object]  # config.json
    entries: dict[str, Entry]

    @classmethod
    def open(cls, directory: Path, weights: bool = True) -> Checkpoint:
        """Read config.json and, unless `weights` is false, all shard headers. Raises ModelError."""
        config = read_json(directory / CONFIG)
        entries = dict(_entries(directory)) if weights else {}
        return cls(directory, config, entries)

    @property
    def files(self) -> list[Path]:
        return sorted({entry.file for entry in self.entries.values()})

    def tensor(self, name: str) -> Tensor:
        """A view into a memory map of its own, which goes when the view goes."""
        entry = self.entries[name]
        with mapped(entry.file) as data:
            return tensor(data, entry)

    def revision(self) -> str:
        """Hex SHA-256 over config.json and, of each shard, name, size, header and both ends of every tensor.

        Not over all the data: that would read every byte at each start. Training changes a tensor everywhere, so
        its ends tell fine-tunes apart, whose headers are equal.
        """
        hasher = hashlib.sha256(b"tandem.model.v1")
        _update(hasher, (self.directory / CONFIG).read_bytes())
        for file in self.files:
            entries = [entry for entry in self.entries.values() if entry.file == file]
            with _mapped(file) as data:
                for part in _telling_parts(data, entries):
                    _update(hasher, part)
            _update(hasher, file.name.encode())
        return hasher.hexdigest()


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in `path`. Raises ModelError."""
    try:
        return _object(path.read_bytes()[: MAX_JSON_BYTES + 1], path)
    except OSError as exc:
        raise ModelError(f"{path}: cannot be read: {exc.strerror or exc}") from exc


def tensor(data: mmap.mmap, entry: Entry) -> Tensor:
    """`entry` as a view into its mapped file; it lives as long as the view does."""
    dtype = DTYPES[entry.dtype]
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=dtype)
    flat = torch.frombuffer(data, dtype=torch.uint8, count=entry.end - entry.begin, offset=entry.begin)
    if entry.begin % dtype.itemsize:  # old writers do not pad the header
        flat = flat.clone()
    return flat.view(dtype).view(entry.shape)


@contextmanager
def mapped(path: Path) -> Generator[mmap.mmap]:
    """The file in memory, privately writable because torch wants writable memory. Views may outlive the context."""
    with path.open("rb") as file:
        yield mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


@contextmanager
def _mapped(path: Path) -> Generator[mmap.mmap]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _telling_parts(data: mmap.mmap, entries: list[Entry]) -> Iterator[bytes]:
    yield len(data).to_bytes(8, "little")
    yield data[: 8 + int.from_bytes(data[:8], "little")]
    for entry in sorted(entries, key=lambda entry: entry.begin):
        yield data[entry.begin : min(entry.begin + SAMPLE_BYTES, entry.end)]
        yield data[max(entry.begin, entry.end - SAMPLE_BYTES) : entry.end]


def _update(hasher: hashlib._Hash, part: bytes) -> None:  # pyright: ignore[reportPrivateUsage]  # typeshed's only name
    hasher.update(len(part).to_bytes(8, "little"))
    hasher.update(part)


def _object(data: bytes, path: Path, what: str = "") -> dict[str, object]:
    if len(data) > MAX_JSON_BYTES:
        raise ModelError(f"{path}: {what}longer than {MAX_JSON_BYTES} bytes")
    try:
        value: object = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise ModelError(f"{path}: {what}not valid JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise ModelError(f"{path}: {what}not a JSON object")
    return cast(dict[str, object], value)


def _entries(directory: Path) -> Iterator[tuple[str, Entry]]:
    index = directory / INDEX
    if not index.exists():
        if not (directory / SINGLE).exists():
            raise ModelError(f"{directory}: has neither {SINGLE} nor {INDEX}; only safetensors weights can be loaded")
        yield from read_header(directory / SINGLE).items()
        return
    places = _weight_map(index)
    headers = {name: read_header(directory / name) for name in sorted(set(places.values()))}
    for name, file in places.items():
        if name not in headers[file]:
            raise ModelError(f"{directory / file}: tensor {name!r} is missing, though {INDEX} places it there")
        yield name, headers[file][name]


def _weight_map(index: Path) -> dict[str, str]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelError(f"{index}: 'weight_map' must be an object that gives each tensor's file")
    for name, file in cast(dict[str, object], places).items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(f"{index}: tensor {name!r} lies in {file!r}, which is not the name of a safetensors file")
    return cast(dict[str, str], places)


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file. Raises ModelError unless they fill its data exactly."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8 or length > MAX_JSON_BYTES:
                raise ModelError(f"{path}: its header should have {length} bytes, the file has {size}: {_BROKEN}")
            header = _object(file.read(length), path, "its header is ")
    except FileNotFoundError as exc:
        raise ModelError(f"{path}: the file is missing") from exc
    except OSError as exc:
        raise ModelError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    start = 8 + length
    entries = {name: _entry(path, name, value, start) for name, value in header.items() if name != "__metadata__"}
    _check_extent(path, entries, start, size)
    return entries


_BROKEN = "it is truncated or damaged, fetch it again"


def _entry(path: Path, name: str, value: object, start: int) -> Entry:
    fields = cast(dict[str, object], value) if isinstance(value, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), _naturals(fields.get("shape")), _naturals(fields.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2 or dtype not in WIDTHS:
        raise ModelError(f"{path}: the header's entry of tensor {name!r} is malformed: {value!s:.120}")
    begin, end = offsets
    if end - begin != math.prod(shape) * WIDTHS[dtype]:
        raise ModelError(f"{path}: tensor {name!r} {dtype} {list(shape)} does not have {end - begin} bytes: {_BROKEN}")
    return Entry(path, dtype, shape, start + begin, start + end)


def _naturals(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list):
        return None
    numbers = cast(list[object], value)
    valid = [item for item in numbers if isinstance(item, int) and not isinstance(item, bool) and item >= 0]
    return tuple(valid) if len(valid) == len(numbers) else None


def _check_extent(path: Path, entries: dict[str, Entry], start: int, size: int) -> None:
    position = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            fault = "overlaps another" if entry.begin < position else "leaves a gap before it"
            raise ModelError(f"{path}: tensor {name!r} {fault}: {_BROKEN}")
        position = entry.end
    if position != size:
        raise ModelError(f"{path}: its tensors end at byte {position}, the file at {size}: {_BROKEN}")
