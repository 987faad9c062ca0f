"""Which connectors a worker may use, and in which order."""

from __future__ import annotations

import pytest
import torch

from tandem.common.errors import ConfigError
from tandem.kv_transfer.context import Context
from tandem.kv_transfer.inproc import InprocReceiver, InprocSender, channel_pair
from tandem.kv_transfer.registry import CONNECTORS, choose, preferred
from tandem.kv_transfer.torch_group import TorchReceiver, TorchSender
from tests.kv_transfer.pairs import SMALL


@pytest.mark.parametrize(
    ("name", "device", "allowed", "why"),
    [
        ("auto", "cpu", ("shm", "tcp", "nixl", "torch"), "auto: each pair takes the first both ends have of shm, tcp"),
        ("auto", "cuda:1", ("cuda_ipc", "nixl", "torch", "tcp"), "of cuda_ipc, nixl, torch, tcp"),
        ("torch", "cpu", ("torch",), "torch, as told"),
        ("inproc", "cuda", ("inproc",), "inproc, as told"),
        ("cuda_ipc", "cuda", ("cuda_ipc",), "cuda_ipc, as told"),
    ],
)
def test_choose_says_which_and_why(name, device, allowed, why):
    got, reason = choose(name, torch.device(device))
    assert got == allowed and why in reason


def test_what_cannot_be_used_is_named_with_what_can():
    with pytest.raises(ConfigError, match=r"'smoke'; there are: auto, cuda_ipc, shm, nixl, tcp, torch, inproc"):
        choose("smoke", torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"cuda_ipc moves no blocks of a cpu device; use shm, tcp"):
        choose("cuda_ipc", torch.device("cpu"))
    with pytest.raises(ConfigError, match="shm moves no blocks of a cuda device"):
        choose("shm", torch.device("cuda"))
    for name in ("auto", "tcp"):
        with pytest.raises(ConfigError, match="mps"):
            choose(name, torch.device("mps"))


def test_every_connector_is_preferred_somewhere():
    assert {*preferred("cpu"), *preferred("cuda")} == set(CONNECTORS)


def test_both_ends_of_a_connector_are_made_by_name():
    context = Context(channel_pair()[0], SMALL, torch.device("cpu"))
    for name, kinds in {"torch": (TorchSender, TorchReceiver), "inproc": (InprocSender, InprocReceiver)}.items():
        connector = CONNECTORS[name]()
        assert (type(connector.sender(context)), type(connector.receiver(context))) == kinds
