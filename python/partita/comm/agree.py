"""placeholder until the comm branch is merged"""

from __future__ import annotations

import torch

from partita.comm.communicator import Communicator


def any_rank(communicator: Communicator, condition: bool) -> bool:
    """Whether the condition holds on any rank."""
    flag = torch.full((1,), float(condition), device=communicator.device)
    communicator.all_reduce(flag).wait()
    return bool(flag.item())


def text_by_rank(communicator: Communicator, text: str) -> list[str]:
    """Every rank's text."""
    raw = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
    sizes = torch.zeros(communicator.world_size, dtype=torch.float64, device=communicator.device)
    sizes[communicator.rank] = len(text.encode())
    communicator.all_reduce(sizes).wait()
    texts = []
    for rank, size in enumerate(sizes.tolist()):
        buffer = torch.zeros(max(1, int(size)), dtype=torch.uint8, device=communicator.device)
        if rank == communicator.rank and size:
            buffer.copy_(raw)
        if size:
            communicator.broadcast(buffer, rank).wait()
        texts.append(bytes(buffer.tolist()[: int(size)]).decode())
    return texts
