"""Which connector a pair ends up with: the first that both ends have and that works, or a clear refusal."""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tandem.common.errors import ConfigError, TransferFailed
from tandem.common.handoff import Grant
from tandem.common.kv_layout import KVLayout
from tandem.kv_transfer import registry
from tandem.kv_transfer.context import Context
from tandem.kv_transfer.inproc import InprocReceiver, InprocSender, channel_pair
from tandem.kv_transfer.land import LandLink
from tandem.kv_transfer.negotiation import NegotiatedReceiver, NegotiatedSender
from tandem.kv_transfer.payload import Payload
from tandem.kv_transfer.push import Piece, PushLink
from tandem.kv_transfer.registry import CONNECTORS, Connector
from tests.kv_transfer.pairs import SMALL, WAIT, Forwarding

CPU = torch.device("cpu")
AUTO = ("shm", "tcp", "nixl", "torch")
BROKEN = TransferFailed("a firewall")


class Made(Forwarding):
    """An end of `inproc` under another name, which works as `how` says."""

    def __init__(self, name: str, how: dict[str, Any], inner: Any) -> None:
        super().__init__(inner)
        self.name, self.how, self.closed = name, how, False
        how["made"].append(self)

    def open(self, timeout: float) -> None:
        if isinstance(self.how.get(self.name), TransferFailed):
            raise self.how[self.name]
        self.inner.open(timeout)

    def close(self) -> None:
        self.closed = True
        self.inner.close()


def fake(name: str, how: dict[str, Any]) -> Connector:
    def domain(context: Context) -> str:
        if isinstance(how.get(name), ConfigError):
            raise how[name]
        return "here"

    def sender(context: Context) -> Any:
        return Made(name, how, InprocSender(context))

    def receiver(context: Context) -> Any:
        return Made(name, how, InprocReceiver(context))

    return Connector(sender, receiver, domain)


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Makes every name a connector like `inproc`; per name the error that `domain` or `open` ends with."""
    how: dict[str, Any] = {"made": []}
    for name in AUTO:
        monkeypatch.setitem(CONNECTORS, name, lambda name=name: fake(name, how))
    return how


def negotiate(
    ours: Sequence[str] = AUTO,
    theirs: Sequence[str] = AUTO,
    layouts: tuple[KVLayout, KVLayout] = (SMALL, SMALL),
    timeout: float = WAIT,
) -> tuple[NegotiatedSender, NegotiatedReceiver, list[str]]:
    """Both ends, and what each one's `open` failed with."""
    contexts = [Context(channel, layout, CPU) for channel, layout in zip(channel_pair(), layouts, strict=True)]
    for context in contexts:
        context.channel.listen(context.mailbox.deliver, lambda reason: None)  # type: ignore[arg-type]
    ends = NegotiatedSender(contexts[0], ours), NegotiatedReceiver(contexts[1], theirs)
    errors: list[str] = []

    def run(end: NegotiatedSender | NegotiatedReceiver) -> None:
        try:
            end.open(timeout)
        except TransferFailed as exc:
            errors.append(exc.message)

    threads = [threading.Thread(target=run, args=(end,)) for end in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    contexts[0].channel.close()
    return *ends, errors


@pytest.mark.parametrize(
    ("changes", "ours", "theirs", "chosen"),
    [
        ({}, AUTO, AUTO, "shm"),
        ({}, AUTO, ("torch",), "torch"),
        ({}, ("nixl", "tcp"), AUTO[::-1], "tcp"),  # the order of preference, whatever is allowed
        ({"shm": ConfigError("no /proc")}, AUTO, AUTO, "tcp"),
        ({"shm": BROKEN}, AUTO, AUTO, "tcp"),
        ({"shm": BROKEN, "tcp": BROKEN, "nixl": ConfigError("not installed")}, AUTO, AUTO, "torch"),
    ],
)
def test_the_first_that_both_have_and_that_works(works, caplog, changes, ours, theirs, chosen):
    works.update(changes)
    caplog.set_level(logging.INFO, "tandem.kv_transfer")
    sender, receiver, errors = negotiate(ours, theirs)
    assert errors == [] and sender.name == receiver.name == chosen
    assert all(made.closed for made in works["made"] if made.name != chosen), "what did not work is closed"
    assert not any(made.closed for made in works["made"] if made.name == chosen)
    assert f"KV hand-off by {chosen}" in caplog.text
    if changes.get("shm") is BROKEN:
        assert "shm: a firewall" in caplog.text
    sender.close()
    receiver.close()
    assert all(made.closed for made in works["made"])


def test_one_that_opens_at_one_end_only_is_given_up_by_both(works, monkeypatch):
    class Half(Forwarding):
        one_sided = False

        def open(self, timeout: float) -> None:
            self.opened = True

    halves: list[Half] = []

    def half(context: Context) -> Any:
        halves.append(Half(InprocReceiver(context)))
        return halves[-1]

    works["shm"] = BROKEN
    broken = CONNECTORS["shm"]()
    monkeypatch.setitem(CONNECTORS, "shm", lambda: Connector(broken.sender, half, broken.domain))
    sender, receiver, errors = negotiate()
    assert errors == [] and sender.name == receiver.name == "tcp"
    assert len(halves) == 1 and halves[0].inner._closed
    sender.close()
    receiver.close()


def test_different_domains_are_nothing_in_common(works, monkeypatch):
    domains = iter(["this host", "another host"])
    connector = CONNECTORS["shm"]()
    monkeypatch.setitem(
        CONNECTORS, "shm", lambda: Connector(connector.sender, connector.receiver, lambda context: next(domains))
    )
    sender, receiver, errors = negotiate()
    assert errors == [] and sender.name == "tcp"
    sender.close()
    receiver.close()


def test_nothing_in_common_is_said_at_both_ends(works):
    works["tcp"] = ConfigError("no such host")
    sender, _, errors = negotiate(("shm", "tcp"), ("nixl",))
    assert len(errors) == 2
    for error in errors:
        assert "share no KV connector" in error and "['shm']" in error and "['nixl']" in error
        assert "give both the same --kv-connector" in error
    assert any("tcp: no such host" in error for error in errors)
    with pytest.raises(TransferFailed, match="not open"):
        _ = sender.one_sided


def test_nothing_that_works_is_said_at_both_ends(works):
    works["shm"] = works["tcp"] = BROKEN
    *_, errors = negotiate(("shm", "tcp"), ("shm", "tcp"))
    assert len(errors) == 2
    for error in errors:
        assert "no KV connector works between the two workers" in error
        assert "shm: a firewall" in error and "tcp: a firewall" in error


@pytest.mark.parametrize(
    "changes",
    [{"revision": "other"}, {"dtype": "bfloat16"}, {"layers": 3}, {"kv_heads": 1}, {"head_dim": 16}],
    ids=str,
)
def test_layouts_that_cannot_pair_are_refused_at_both_ends(works, changes):
    *_, errors = negotiate(layouts=(SMALL, dataclasses.replace(SMALL, **changes)))
    assert len(errors) == 2 and all("the two ends cannot pair" in error for error in errors)
    assert works["made"] == [], "nothing was set up"


def test_block_sizes_need_not_be_equal(works):
    sender, receiver, errors = negotiate(layouts=(SMALL, dataclasses.replace(SMALL, block_size=6)))
    assert errors == [] and sender.name == receiver.name == "shm"
    sender.close()
    receiver.close()


@pytest.mark.parametrize("rubbish", [b"", b"\xc1", b"\x92\xc4\x00\x90", b"\x81\x01\x02", b"\x93\x01\x02\x03"])
def test_a_peer_that_says_something_else_is_refused(works, rubbish):
    context = Context(channel_pair()[0], SMALL, CPU)
    context.mailbox._store("domains/1", rubbish)
    with pytest.raises(TransferFailed, match=r"another protocol version|cannot pair"):
        NegotiatedSender(context, AUTO).open(WAIT)


def test_close_while_it_is_being_set_up_ends_it(works):
    context = Context(channel_pair()[0], SMALL, CPU)
    end = NegotiatedSender(context, AUTO)
    end.close()
    context.mailbox._store("domains/1", _hello(context))
    with pytest.raises(TransferFailed, match="closed while its data path was being set up"):
        end.open(WAIT)


def _hello(context: Context) -> bytes:
    from tandem.kv_transfer.negotiation import _pack

    return _pack(context.layout.pairing, dict.fromkeys(AUTO, "here"))


def test_a_link_over_a_negotiated_path_works_as_over_any_other():
    left, right = channel_pair()
    to_push: queue.SimpleQueue[Any] = queue.SimpleQueue()
    to_land: queue.SimpleQueue[Any] = queue.SimpleQueue()
    allowed, why = registry.choose("torch", CPU)
    assert why == "torch, as told"
    context = Context(left, SMALL, CPU)
    push = PushLink(context, NegotiatedSender(context, allowed), to_push.put, to_push.put, WAIT)
    context = Context(right, SMALL, CPU)
    land = LandLink(
        context, NegotiatedReceiver(context, allowed), to_land.put, lambda f, p: to_land.put(p), to_land.put, WAIT
    )
    push.open()
    land.open()
    land.grant(Grant(b"i" * 16, 1, 0, 2, 4, ()), [8, 9])
    assert isinstance(to_push.get(timeout=WAIT), Grant)
    payload = Payload.whole(torch.arange(2 * SMALL.block_bytes, dtype=torch.uint8).view(2, -1))
    push.push(b"i" * 16, 1, Piece(0, payload, 0, SMALL.layers))
    landed = to_land.get(timeout=WAIT)
    assert isinstance(landed, Payload) and torch.equal(landed.tensor(), payload.tensor())
    assert land.one_sided is False
    for link in (push, land):
        link.close()
        assert link.join(WAIT)
