"""What a connector is told about the pair it serves."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tandem.common.kv_layout import KVLayout
from tandem.kv_transfer.base import Channel


@dataclass(frozen=True, slots=True)
class Context:
    channel: Channel  # to the peer incarnation; carries the rendezvous
    layout: KVLayout
    device: torch.device  # where payloads are read from, and where they land
    host: str = "127.0.0.1"  # the one local address a data path may listen on; the peer must reach it

    def terms(self, connector: str) -> bytes:
        """What both ends must have in common before a byte moves."""
        return f"{connector}|{self.layout.fingerprint.hex()}".encode()
