"""What is special to torch.distributed: where it listens, what it leaves behind, and how a dead peer is noticed."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest
import torch

from tandem.common.errors import ConfigError, TransferFailed
from tandem.common.handoff import Frame, Grant, Message, Rendezvous, Reserve
from tandem.common.kv_layout import KVLayout
from tandem.kv_transfer.base import Channel
from tandem.kv_transfer.context import Context
from tandem.kv_transfer.inproc import channel_pair
from tandem.kv_transfer.payload import Payload
from tandem.kv_transfer.rendezvous import Mailbox
from tandem.kv_transfer.torch_group import ChannelStore, TorchReceiver, TorchSender, _environment
from tests.kv_transfer.peer import wish

pytestmark = pytest.mark.timeout(60)
WAIT = 30.0  # seconds; only a failing test waits this long, or a first one on a busy machine
LAYOUT = KVLayout("test", "float32", 16, 8, 8, 128)  # 1 MiB a block
CPU = torch.device("cpu")
NOTICED = 2.0  # seconds within which a dead peer must be noticed; the operation's own deadline is 20


def frame(num_blocks: int, number: int = 0) -> Frame:
    size = num_blocks * LAYOUT.block_bytes
    return Frame(bytes(16), 1, number, num_blocks, 0, LAYOUT.layers, size, (b"d" * 16,) * num_blocks)


def payload_of(num_blocks: int) -> Payload:
    return Payload.whole(torch.zeros(num_blocks, LAYOUT.block_bytes, dtype=torch.uint8))


def listening(channel: Channel, host: str = "127.0.0.1") -> Context:
    context = Context(channel, LAYOUT, CPU, host)
    channel.listen(context.mailbox.deliver, lambda reason: None)  # pyright: ignore[reportArgumentType]
    return context


def open_ends(host: str = "127.0.0.1") -> tuple[TorchSender, TorchReceiver]:
    left, right = channel_pair()
    sender, receiver = TorchSender(listening(left, host)), TorchReceiver(listening(right, host))
    thread = threading.Thread(target=sender.open, args=(WAIT,))
    thread.start()
    receiver.open(WAIT)
    thread.join(WAIT)
    return sender, receiver


class Call:
    """One call on a thread of its own, and when and how it ended."""

    def __init__(self, function, *args) -> None:
        self.error = ""  # not the exception, whose traceback would keep the group alive
        self._thread = threading.Thread(target=self._run, args=(function, *args))
        self._thread.start()

    def _run(self, function, *args) -> None:
        try:
            function(*args)
        except TransferFailed as exc:
            self.error = exc.message

    def seconds_until_failed(self) -> float:
        started = time.monotonic()
        self._thread.join(19.0)
        assert not self._thread.is_alive() and self.error
        return time.monotonic() - started


# ------------------------------------------------------------------------------------------------- a peer that dies


def test_a_peer_killed_during_send_is_noticed_by_the_data_path_alone(victim):
    channel = victim.connect("stop_in_receive", "torch", LAYOUT)
    context = Context(channel, LAYOUT, CPU)
    granted = threading.Event()

    def on_message(message: Message) -> None:
        granted.set() if isinstance(message, Grant) else context.mailbox.deliver(message)  # type: ignore[arg-type]

    channel.listen(on_message, lambda reason: None)  # the closed channel is not passed on
    sender = TorchSender(context)
    sender.open(WAIT)
    channel.send(wish(bytes(16), 1, 0, range(8)))
    assert granted.wait(WAIT)
    channel.send(frame(8))
    call = Call(sender.send, frame(8), payload_of(8), (), 20.0)
    victim.wait_stopped()
    victim.kill()
    assert call.seconds_until_failed() < NOTICED
    sender.close()


def test_a_peer_killed_during_receive_is_noticed_by_the_data_path_alone(victim):
    channel = victim.connect("stop_in_send", "torch", LAYOUT)
    context = Context(channel, LAYOUT, CPU)
    announced = threading.Event()

    def on_message(message: Message) -> None:
        if isinstance(message, Rendezvous):
            context.mailbox.deliver(message)
        elif isinstance(message, Reserve):
            channel.send(Grant(message.transfer_id, 1, 0, 1, LAYOUT.block_size, ()))
        else:
            announced.set()

    channel.listen(on_message, lambda reason: None)
    receiver = TorchReceiver(context)
    receiver.open(WAIT)
    assert announced.wait(WAIT)
    call = Call(receiver.receive, frame(1), (), 20.0)
    victim.wait_stopped()
    victim.kill()
    assert call.seconds_until_failed() < NOTICED
    receiver.close()


# ------------------------------------------------------------------------------------------------------ close, leaks


def test_close_wakes_both_ends_at_once():
    sender, receiver = open_ends()
    calls = [Call(receiver.receive, frame(1), (), 20.0)]
    receiver.close()
    assert calls[0].seconds_until_failed() < 1.0
    with pytest.raises(TransferFailed):
        sender.send(frame(1), payload_of(1), (), 20.0)
    sender.close()
    sender.close()


# ---------------------------------------------------------------------------------------------------------- listening


def listening_sockets() -> set[str]:
    """Hex address:port of this process's listening TCP sockets, as /proc/net/tcp prints them."""
    owned = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            owned.add(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue
    lines = [
        line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return {f[1] for f in lines if f[3] == "0A" and f"socket:[{f[9]}]" in owned}


@pytest.mark.skipif(not Path("/proc/net/tcp6").exists(), reason="needs /proc")
def test_the_only_port_is_gloos_own_on_the_given_host():
    before = listening_sockets()  # of other tests' servers
    sender, receiver = open_ends("127.0.0.1")
    hosts = {address.split(":")[0] for address in listening_sockets() - before}
    assert hosts == {f"{int.from_bytes(socket.inet_aton('127.0.0.1'), 'little'):08X}"}
    sender.close()
    receiver.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "no-such-host.invalid"])  # noqa: S104
def test_a_host_that_is_no_single_address_is_refused(host):
    left, _ = channel_pair()
    sender = TorchSender(Context(left, LAYOUT, CPU, host))
    with pytest.raises(ConfigError, match="KV data path"):
        sender.open(WAIT)


# -------------------------------------------------------------------------------------------------------------- store


def test_the_store_is_replicated_to_the_peer_and_waits_no_longer_than_its_deadline():
    left, right = channel_pair()
    boxes = [Mailbox(left), Mailbox(right)]
    right.listen(lambda message: boxes[1].deliver(message), lambda reason: None)  # pyright: ignore[reportArgumentType]
    stores = [ChannelStore(box) for box in boxes]
    for store in stores:
        store.deadline = time.monotonic() + WAIT
    stores[0].set("0/0", b"\x00\xff")
    stores[1].wait(["0/0"])
    assert stores[1].get("0/0") == b"\x00\xff"
    assert stores[1].check(["0/0"]) and not stores[1].check(["0/0", "0/1"])
    stores[1].deadline = time.monotonic() + 0.05
    with pytest.raises(TransferFailed, match="did not publish"):
        stores[1].get("0/1")
    left.close()


def test_the_environment_is_restored(monkeypatch):
    monkeypatch.setenv("TANDEM_TEST_A", "old")
    monkeypatch.delenv("TANDEM_TEST_B", raising=False)
    with _environment({"TANDEM_TEST_A": "1", "TANDEM_TEST_B": "2"}):
        assert (os.environ["TANDEM_TEST_A"], os.environ["TANDEM_TEST_B"]) == ("1", "2")
    assert os.environ["TANDEM_TEST_A"] == "old" and "TANDEM_TEST_B" not in os.environ
