from __future__ import annotations

import pytest
import torch

from tandem.common.errors import ConfigError
from tandem.common.kv_layout import KVLayout
from tandem.kv_transfer.context import Context
from tandem.kv_transfer.inproc import InprocReceiver, InprocSender, channel_pair
from tandem.kv_transfer.registry import CONNECTORS, choose, create_receiver, create_sender
from tandem.kv_transfer.torch_group import TorchReceiver, TorchSender

LAYOUT = KVLayout("test", "float32", 4, 2, 2, 8)


@pytest.mark.parametrize(
    ("name", "device", "chosen", "why"),
    [
        ("auto", "cpu", "torch", "Gloo"),
        ("torch", "cpu", "torch", "Gloo"),
        ("auto", "cuda:1", "torch", "NCCL"),
        ("inproc", "cuda", "inproc", "process"),
    ],
)
def test_choose_says_which_and_why(name, device, chosen, why):
    got, reason = choose(name, torch.device(device))
    assert got == chosen and why in reason


def test_an_unknown_connector_or_device_is_named_with_what_there_is():
    with pytest.raises(ConfigError, match=r"'smoke'; there are: auto, torch, inproc"):
        choose("smoke", torch.device("cpu"))
    with pytest.raises(ConfigError, match="mps"):
        choose("auto", torch.device("mps"))


def test_both_ends_of_every_connector_are_made_by_name():
    context = Context(channel_pair()[0], LAYOUT, torch.device("cpu"))
    kinds = {name: (type(create_sender(name, context)), type(create_receiver(name, context))) for name in CONNECTORS}
    assert kinds == {"torch": (TorchSender, TorchReceiver), "inproc": (InprocSender, InprocReceiver)}
    assert type(create_sender("auto", context)) is TorchSender
