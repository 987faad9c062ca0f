"""What a connector is told about the pair it serves."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tandem.common.kv_layout import KVLayout
from tandem.kv_transfer.base import Channel
from tandem.kv_transfer.rendezvous import Mailbox


@dataclass(slots=True, eq=False)
class Context:
    channel: Channel  # to the peer incarnation
    layout: KVLayout  # of this end's blocks
    device: torch.device  # where payloads are read from, and where they land
    host: str = "127.0.0.1"  # the one local address a data path may listen on; the peer must reach it
    memory: Tensor | None = None  # this end's KV cache, (num_blocks, block_bytes) uint8: BlockStore.memory
    fd: int | None = None  # BlockStore.fd
    mailbox: Mailbox = field(init=False)  # what a data path is set up with; over the channel

    def __post_init__(self) -> None:
        self.mailbox = Mailbox(self.channel)
