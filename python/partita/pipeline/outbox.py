"""Messages of a rank on their way to others, in memory that is used again."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from partita.comm import Communicator, Handle
from partita.pipeline.payload import Leaf, fill, message_bytes, room_in


class Outbox:
    """Sends copies of tensors, so that a stage may do with them what it likes.

    A buffer is used again when its message was received: fresh memory would cost more than the copy. Of each size there
    are at most as many buffers for a rank as messages may be under way.

    Args:
        pipe: the ranks of the pipeline.
        room: messages of a size that may be under way to a rank; the next send waits.

    Attributes:
        room: at least that of the plan that runs; it may grow between steps.
    """

    def __init__(self, pipe: Communicator, room: int) -> None:
        self._pipe = pipe
        self.room = room
        self._buffers: dict[tuple[int, int], deque[tuple[Handle, Tensor]]] = {}  # by rank and size, in bytes
        self._used: set[tuple[int, int]] = set()  # in this step

    def send(self, tensors: Sequence[Tensor], leaves: Sequence[Leaf], rank: int) -> None:
        """Sends a message to a rank. leaves: the forms of the tensors."""
        key = (rank, message_bytes(leaves))
        self._used.add(key)
        under_way = self._buffers.setdefault(key, deque())
        if len(under_way) >= self.room:
            handle, buffer = under_way.popleft()
            handle.wait()
        else:
            buffer = self._pipe.empty(key[1], torch.uint8)
        message = room_in(buffer, leaves)
        fill(message, leaves, tensors)
        under_way.append((self._pipe.send(message, rank), buffer))

    def finish(self) -> None:
        """A step is over: sizes that it did not have are forgotten when their messages have been received."""
        for key in self._buffers.keys() - self._used:
            for handle, _ in self._buffers.pop(key):
                handle.wait()
        self._used.clear()
