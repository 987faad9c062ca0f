"""The `nixl` connector: P writes into D's blocks through NIXL and its UCX backend (RDMA, NVLink, shared memory, TCP).

    D   registers its KV cache, publishes {NIXL's metadata, where the cache lies}        nixl/agent
    P   loads it, writes 16 random bytes as a trial, publishes them                      nixl/proof ──► D compares

**What is guaranteed.** NIXL cannot stop a posted write: releasing its handle leaves the write running. So each end of
each link has an agent of its own, and a write that fails, misses its deadline or meets `close` ends with the agent:
when `send` returns or raises, nothing reads P's memory any more. Bytes P handed to the network may still reach D,
until D's agent ends too, with its link. Between two processes of one host UCX writes by process_vm_writev, inside a
call that P makes; D cannot revoke that, so after a lost link D's blocks are safe once P answers or its process is gone.

**Whom it trusts.** P is trusted with all memory D registered, its KV cache; P checks block numbers before it writes.
UCX authenticates nobody and encrypts nothing, and its TCP transport writes wherever a peer says: use it on a network
without strangers. On a loopback host it listens there only; on others on the devices that UCX chooses, RDMA included;
UCX_NET_DEVICES and UCX_TLS restrict them. Digests protect what is decoded.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import ipaddress
import secrets
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import msgpack
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tandem.common.errors import ConfigError, TransferFailed
from tandem.common.handoff import Frame
from tandem.kv_transfer.context import Context
from tandem.kv_transfer.payload import Payload

_PACKAGES = ("nixl", "nixl_cu12", "nixl_cu13")  # the meta package, and the wheels it installs
_PROGRESS = 5000  # microseconds between looks of an idle agent's thread; what arrives wakes it before
_PAUSES = (0.0001, 0.001)  # seconds between looks at a write, at first and at most
_PROOF_BYTES = 16

Spans = NDArray[np.uint64]  # (n, 3): address, bytes, device


@functools.cache
def _bindings() -> Any:
    """NIXL's C++ classes, without its Python wrapper, whose agents keep a core busy each. Raises ConfigError."""
    reasons: list[str] = []
    for package in _PACKAGES:
        try:
            return importlib.import_module(f"{package}._bindings")
        except ImportError as exc:
            reasons.append(str(exc))
    raise ConfigError(f"NIXL is not installed ({'; '.join(reasons)}): pip install 'tandem[nixl]'")


def domain(context: Context) -> str:
    """Raises ConfigError."""
    _bindings()
    if context.memory is None:
        raise ConfigError("the KV cache is spread over several devices, and nixl needs it in one piece")
    return "nixl-ucx"


@dataclass(frozen=True, slots=True)
class Cache:
    """Where D's KV cache lies, as D tells P: block i has the `block_bytes` from `base + i * block_bytes` on."""

    metadata: bytes  # NIXL's: how to reach D's agent, and its memory
    base: int
    num_blocks: int
    block_bytes: int
    device: int
    proof: int  # address

    def pack(self) -> bytes:
        packed = msgpack.packb(astuple(self))
        assert packed is not None, "packb returns None only for streams"
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> Cache:
        """Raises TransferFailed."""
        with contextlib.suppress(ValueError, TypeError, msgpack.UnpackException):
            metadata, *numbers = msgpack.unpackb(data, max_array_len=8, max_map_len=0, max_ext_len=0)
            if type(metadata) is bytes and all(type(number) is int and number >= 0 for number in numbers):
                return cls(metadata, *numbers)
        raise TransferFailed("D's description of its KV cache cannot be read: it runs another version")

    def offset(self, frame: Frame, payload: Payload, targets: Sequence[int]) -> int:
        """Where in D's blocks `payload` begins. Raises TransferFailed unless every byte has its place there."""
        start = payload.row_bytes // frame.num_layers * frame.first_layer
        payload.check_place(targets, start, self.num_blocks, self.block_bytes)
        return start


def spans(payload: Payload, targets: Sequence[int], cache: Cache, start: int) -> tuple[Spans, Spans]:
    """Where each run of bytes lies at P, and where it goes at D; one run where both have whole neighbouring blocks."""
    rows, blocks = np.array(payload.rows, np.uint64), np.array(targets, np.uint64)
    apart = (np.diff(rows) != 1) | (np.diff(blocks) != 1)
    whole = payload.row_bytes == cache.block_bytes == payload.memory.stride(0)
    first = np.flatnonzero(np.concatenate(([True], apart if whole else np.ones_like(apart))))
    sizes = np.diff(np.append(first, len(rows))).astype(np.uint64) * np.uint64(payload.row_bytes)
    base, stride = payload.memory.data_ptr() + payload.start, payload.memory.stride(0)
    local = np.uint64(base) + rows[first] * np.uint64(stride)
    remote = np.uint64(cache.base + start) + blocks[first] * np.uint64(cache.block_bytes)
    device = np.full_like(sizes, _index(payload.memory.device))
    return np.stack((local, sizes, device), 1), np.stack((remote, sizes, np.full_like(sizes, cache.device)), 1)


def _index(device: torch.device) -> int:
    return device.index or 0


class _End:
    """What both ends do alike. Invariant: the agent exists only while the end is open or a thread is inside it."""

    one_sided = True

    def __init__(self, context: Context) -> None:
        self._context = context
        self._mailbox = context.mailbox
        self._lock = threading.Lock()
        self._agent: Any = None  # nixlAgent; nothing else holds it, so dropping it ends it
        self._busy = False  # a thread is inside the agent
        self._closed = False

    def close(self) -> None:
        """Ends the agent, or leaves it to the thread that is inside, which notices within a millisecond."""
        with self._lock:
            self._closed = True
            if not self._busy:
                self._agent = None

    @contextlib.contextmanager
    def _inside(self, action: str) -> Generator[None]:
        """For one thread at a time. Whatever goes wrong ends the agent, and with it what is under way."""
        with self._lock:
            if self._closed:
                raise TransferFailed("the data path is closed")
            self._busy = True
        try:
            with self._on_device():
                yield
        except Exception as exc:
            self._closed = True
            if type(exc).__module__ == _bindings().__name__:
                raise TransferFailed(f"{action} by NIXL failed: {exc}") from exc
            raise
        finally:
            with self._lock:
                self._busy = False
                if self._closed:
                    self._agent = None

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        device = self._context.device
        return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

    def _start(self) -> None:
        nixl = _bindings()
        config = nixl.nixlAgentConfig()
        config.useProgThread = True
        config.pthrDelay = _PROGRESS
        self._agent = nixl.nixlAgent(secrets.token_hex(16), config)
        # UCX would listen on every interface; the operator's UCX_NET_DEVICES goes before this
        self._agent.createBackend(
            "UCX", {"engine_config": "NET_DEVICES=lo"} if _is_loopback(self._context.host) else {}
        )

    def _register(self, memory: Tensor) -> Any:
        descriptor = (memory.data_ptr(), memory.nbytes, _index(memory.device), "")
        registered = _bindings().nixlRegDList(self._kind, [descriptor])
        self._agent.registerMem(registered, [])
        return registered

    @property
    def _kind(self) -> Any:
        nixl = _bindings()
        return nixl.VRAM_SEG if self._context.device.type == "cuda" else nixl.DRAM_SEG


class NixlReceiver(_End):
    """Says where its KV cache is, and then only looks at it."""

    def open(self, timeout: float) -> None:
        """Raises TransferFailed."""
        deadline = time.monotonic() + timeout
        memory = self._cache
        proof = torch.zeros(_PROOF_BYTES, dtype=torch.uint8, device=memory.device)
        with self._inside("setting up the data path"):
            self._start()
            self._register(memory)
            self._register(proof)
            num_blocks, block_bytes = memory.shape
            place = (memory.data_ptr(), num_blocks, block_bytes, _index(memory.device), proof.data_ptr())
            cache = Cache(self._agent.getLocalMD(), *place)
            self._mailbox.publish("nixl/agent", cache.pack())
            if self._mailbox.take("nixl/proof", deadline) != bytes(proof.tolist()):
                raise TransferFailed("P's trial write through NIXL did not arrive")

    def receive(self, frame: Frame, targets: Sequence[int], timeout: float) -> Payload:
        if self._closed:
            raise TransferFailed("the data path is closed")
        layer_bytes = self._context.layout.layer_bytes
        first, size = frame.first_layer * layer_bytes, frame.num_layers * layer_bytes
        return Payload.layers(self._cache, targets, first, size)

    @property
    def _cache(self) -> Tensor:
        memory = self._context.memory
        assert memory is not None, "`domain` has looked"
        return memory


class NixlSender(_End):
    """Writes out of its KV cache, which it registers once, or out of a converted copy, which it registers meanwhile."""

    _peer = b""  # the name of D's agent
    _cache: Cache

    def open(self, timeout: float) -> None:
        """Raises TransferFailed."""
        deadline = time.monotonic() + timeout
        proof = secrets.token_bytes(_PROOF_BYTES)
        local = torch.tensor(list(proof), dtype=torch.uint8, device=self._context.device)
        with self._inside("setting up the data path"):
            self._start()
            if self._context.memory is not None:
                self._register(self._context.memory)
            self._register(local)
            self._cache = cache = Cache.unpack(self._mailbox.take("nixl/agent", deadline))
            self._peer = self._agent.loadRemoteMD(cache.metadata)
            source = np.array([[local.data_ptr(), _PROOF_BYTES, _index(local.device)]], np.uint64)
            self._write(source, np.array([[cache.proof, _PROOF_BYTES, cache.device]], np.uint64), deadline)
            self._mailbox.publish("nixl/proof", proof)

    def send(self, frame: Frame, payload: Payload, targets: Sequence[int], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        with self._inside(f"a write of {frame.num_bytes} bytes"):
            start = self._cache.offset(frame, payload, targets)
            registered = None if self._is_cache(payload.memory) else self._register(payload.memory)
            self._write(*spans(payload, targets, self._cache, start), deadline)
            if registered is not None:  # else, after a failure, the agent ends before the memory may be freed
                self._agent.deregisterMem(registered, [])

    def _is_cache(self, memory: Tensor) -> bool:
        cache = self._context.memory
        return cache is not None and memory.data_ptr() == cache.data_ptr()

    def _write(self, local: Spans, remote: Spans, deadline: float) -> None:
        """Returns when every byte is there."""
        nixl, kind = _bindings(), self._kind
        descriptors = nixl.nixlXferDList(kind, local), nixl.nixlXferDList(kind, remote)
        request = self._agent.createXferReq(nixl.NIXL_WRITE, *descriptors, self._peer, "", [])
        pause, longest = _PAUSES
        try:
            status = self._agent.postXferReq(request, "")
            while status != nixl.NIXL_SUCCESS:
                if self._closed:
                    raise TransferFailed("the data path was closed during a write")
                if time.monotonic() > deadline:
                    raise TransferFailed("a write by NIXL did not end before its deadline; D's side does not answer")
                time.sleep(pause)
                pause = min(2 * pause, longest)
                status = self._agent.getXferStatus(request)
        finally:
            self._agent.releaseXferReq(request)


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
