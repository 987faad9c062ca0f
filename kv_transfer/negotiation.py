"""Which connector a pair uses: the first that both ends have, in the registry's order; each link finds out anew.

    P                                              D
    publish domains/0 {connector: domain, …}       publish domains/1
    both: connectors with equal domains, in the order of preference; for each in turn:
      open it ── opened/0/<name> ok | why not      opened/1/<name>
      both ok: that is it                          else: close it, try the next

A domain is a string two ends must share to be able to use a connector at all ("this host and user", "any"). What
cannot be known before, such as a firewall, shows when the path is opened; then the next one has its turn.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import msgpack

from tandem.common.errors import ConfigError, TandemError, TransferFailed
from tandem.common.handoff import Frame
from tandem.kv_transfer.base import Receiver, Sender
from tandem.kv_transfer.context import Context
from tandem.kv_transfer.payload import Payload
from tandem.kv_transfer.registry import CONNECTORS, Connector, preferred

log = logging.getLogger("tandem.kv_transfer")

End = TypeVar("End", Sender, Receiver)

OPEN_SHARE = 0.3  # of the time to set a link up, for one connector that does not answer


class _Negotiated(ABC, Generic[End]):
    """One end. `allowed`: the connectors this worker's --kv-connector permits."""

    rank: int  # P is 0, D is 1

    def __init__(self, context: Context, allowed: Sequence[str]) -> None:
        self._context = context
        self._allowed = allowed
        self._lock = threading.Lock()
        self._closed = False
        self._end: End | None = None
        self.name = ""  # of the connector agreed upon

    @property
    def one_sided(self) -> bool:
        return self._opened.one_sided

    @property
    def _opened(self) -> End:
        if self._end is None:
            raise TransferFailed("the data path is not open")
        return self._end

    def open(self, timeout: float) -> None:
        """Raises TransferFailed when the two ends share no connector that works."""
        deadline = time.monotonic() + timeout
        common = self._common(deadline)
        refused: list[str] = []
        for name in common:
            problem = self._try(name, timeout * OPEN_SHARE, deadline)
            if not problem:
                log.info("KV hand-off by %s%s", name, f" ({'; '.join(refused)})" if refused else "")
                return
            refused.append(f"{name}: {problem}")
        raise TransferFailed(f"no KV connector works between the two workers: {'; '.join(refused)}")

    def close(self) -> None:
        with self._lock:
            self._closed, end = True, self._end
        if end is not None:
            end.close()

    def _common(self, deadline: float) -> list[str]:
        mine, missing = self._domains()
        mailbox = self._context.mailbox
        pairing = self._context.layout.pairing
        mailbox.publish(f"domains/{self.rank}", _pack(pairing, mine))
        theirs = _unpack(mailbox.take(f"domains/{1 - self.rank}", deadline), pairing)
        order = preferred(self._context.device.type)
        common = [name for name in order if name in mine and mine[name] == theirs.get(name)]
        if not common:
            raise TransferFailed(
                f"the two workers share no KV connector: this one has {sorted(mine)} ({'; '.join(missing)}), the peer "
                f"{sorted(theirs)}; give both the same --kv-connector"
            )
        return common

    def _domains(self) -> tuple[dict[str, str], list[str]]:
        mine: dict[str, str] = {}
        missing: list[str] = []
        for name in self._allowed:
            try:
                mine[name] = CONNECTORS[name]().domain(self._context)
            except ConfigError as exc:
                missing.append(f"{name}: {exc.message}")
        return mine, missing

    def _try(self, name: str, timeout: float, deadline: float) -> str:
        """Why `name` does not work between the two, or ''."""
        problem = self._open_one(name, timeout)
        mailbox = self._context.mailbox
        mailbox.publish(f"opened/{self.rank}/{name}", problem.encode()[:1024])
        theirs = mailbox.take(f"opened/{1 - self.rank}/{name}", deadline).decode(errors="replace")
        if not problem and not theirs:
            self.name = name
            return ""
        with self._lock:
            end, self._end = self._end, None
        if end is not None:
            end.close()
        return problem or f"the peer says: {theirs}"

    def _open_one(self, name: str, timeout: float) -> str:
        end = self._make(CONNECTORS[name]())
        with self._lock:
            if self._closed:
                raise TransferFailed("the link was closed while its data path was being set up")
            self._end = end
        try:
            end.open(timeout)
        except TandemError as exc:
            return exc.message
        return ""

    @abstractmethod
    def _make(self, connector: Connector) -> End:
        """This end of `connector`."""


class NegotiatedSender(_Negotiated[Sender]):
    rank = 0

    def _make(self, connector: Connector) -> Sender:
        return connector.sender(self._context)

    def send(self, frame: Frame, payload: Payload, targets: Sequence[int], timeout: float) -> None:
        self._opened.send(frame, payload, targets, timeout)


class NegotiatedReceiver(_Negotiated[Receiver]):
    rank = 1

    def _make(self, connector: Connector) -> Receiver:
        return connector.receiver(self._context)

    def receive(self, frame: Frame, targets: Sequence[int], timeout: float) -> Payload:
        return self._opened.receive(frame, targets, timeout)


def _pack(pairing: bytes, domains: dict[str, str]) -> bytes:
    packed = msgpack.packb([pairing, sorted(domains.items())])
    assert packed is not None, "packb returns None only for streams"
    return packed


def _unpack(data: bytes, pairing: bytes) -> dict[str, str]:
    """Raises TransferFailed unless the peer has the same kind of blocks."""
    with contextlib.suppress(ValueError, TypeError, msgpack.UnpackException):
        theirs, domains = msgpack.unpackb(data, max_map_len=0, max_ext_len=0, max_array_len=64)
        if theirs != pairing:
            raise TransferFailed(
                "the two ends cannot pair: their model revision, dtype or heads differ; start both workers from the "
                "same model and flags"
            )
        return {str(name): str(domain) for name, domain in domains}
    raise TransferFailed("the peer speaks another protocol version: its list of connectors cannot be read")
