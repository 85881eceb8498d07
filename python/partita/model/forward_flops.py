"""How many floating-point operations a forward takes: counted once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from partita.model.flops import FlopCounter

BACKWARD = 2  # times a forward: of each product, the gradients of both factors
_NOTHING = nullcontext()


class ForwardFlops:
    """Counts the operations of the first forward, see `FlopCounter`.

    Attributes:
        count: operations, a product with a sum as two; None: not counted (yet).
    """

    def __init__(self, enabled: bool) -> None:
        self.count: int | None = None
        self._is_due = enabled

    def counting(self) -> AbstractContextManager[None]:
        """The block of a forward. The first one takes longer."""
        if not self._is_due or not torch.is_grad_enabled():
            return _NOTHING
        self._is_due = False
        return self._counted()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with FlopCounter() as counter:
            yield
        self.count = counter.total
