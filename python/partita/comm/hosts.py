"""Which ranks share a host, and how they find each other there."""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import torch

from partita.comm.communicator import Communicator

DIGEST_BYTES = 32
TOKEN_BYTES = 16
LONGEST_ADDRESS = 108  # of a Unix socket


def this_host() -> str:
    """Equal on two processes when they can share memory: one kernel, the same namespaces, the same user."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespaces = [str(os.stat(f"/proc/self/ns/{kind}").st_ino) for kind in ("net", "pid", "user")]
    except OSError:  # no /proc, or a restricted one
        return no_host()
    return " ".join([boot, *namespaces, str(os.geteuid())])


def no_host() -> str:
    """A host of this process alone."""
    return secrets.token_hex(TOKEN_BYTES)


@dataclass(frozen=True)
class Contact:
    """What a rank tells all others: its host, where it listens there, and a token in case it is the host's first."""

    host: bytes
    address: bytes
    token: bytes

    def pack(self) -> torch.Tensor:
        """As uint8, of the same size for every contact."""
        raw = self.host + self.token + bytes([len(self.address)]) + self.address.ljust(LONGEST_ADDRESS, b"\0")
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8)

    @staticmethod
    def unpack(packed: torch.Tensor) -> Contact:
        """The reverse of `pack`."""
        raw = bytes(packed.tolist())
        host, token = raw[:DIGEST_BYTES], raw[DIGEST_BYTES : DIGEST_BYTES + TOKEN_BYTES]
        length, rest = raw[DIGEST_BYTES + TOKEN_BYTES], raw[DIGEST_BYTES + TOKEN_BYTES + 1 :]
        return Contact(host, rest[:length], token)


def exchange_contacts(everyone: Communicator, host: str, address: bytes) -> list[Contact]:
    """Every rank's contact, by rank. A collective."""
    own = Contact(hashlib.sha256(host.encode()).digest(), address, secrets.token_bytes(TOKEN_BYTES)).pack()
    gathered = torch.zeros(everyone.world_size * own.numel(), dtype=torch.uint8, device=everyone.device)
    everyone.slice_of(gathered).copy_(everyone.to_device(own))
    everyone.all_gather(gathered).wait()
    return [Contact.unpack(packed) for packed in everyone.slices(everyone.to_host(gathered))]


def ranks_by_host(contacts: list[Contact]) -> list[list[int]]:
    """The ranks of each host, in order; hosts in the order of their first ranks."""
    hosts: dict[bytes, list[int]] = {}
    for rank, contact in enumerate(contacts):
        hosts.setdefault(contact.host, []).append(rank)
    return list(hosts.values())
