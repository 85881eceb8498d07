"""How many floating-point operations a forward takes: counted once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from partita.model.flops import FlopCounter

BACKWARD = 2  # times a forward: of each product, the gradients of both factors


class ForwardFlops:
    """Counts the operations of the first forward, see `FlopCounter`.

    Attributes:
        count: operations, a product with a sum as two, without those of gradients that a function computes in its
            forward already; None: not counted (yet).
    """

    def __init__(self, enabled: bool) -> None:
        self.count: int | None = None
        self._is_due = enabled

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls `forward`. The first call with gradients enabled takes longer."""
        if not self._is_due or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        self._is_due = False
        with FlopCounter() as counter:
            outputs = forward(*args, **kwargs)
        self.count = counter.total - _of_gradients(outputs)
        return outputs


def _of_gradients(outputs: Any) -> int:
    """The `gradient_flops` of all functions that have made the outputs."""
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    waiting = [leaf.grad_fn for leaf in leaves if leaf.grad_fn is not None]
    seen = set(waiting)
    total = 0
    while waiting:
        node = waiting.pop()
        total += getattr(node, "gradient_flops", 0)
        for before, _ in node.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                waiting.append(before)
    return total
