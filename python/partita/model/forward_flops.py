"""How many floating-point operations a forward takes: counted once."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

BACKWARD = 2  # times a forward: of each product, the gradients of both factors
_RECURRENT = {"mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn"}  # whole layers, of which torch has no formula
_NOTHING = nullcontext()


class ForwardFlops:
    """Counts the products of matrices, convolutions and attention of the first forward, by torch's formulas.

    Attributes:
        count: operations, a product with a sum as two; None: not counted (yet).
    """

    def __init__(self, enabled: bool) -> None:
        self.count: int | None = None
        self._is_due = enabled

    def counting(self) -> AbstractContextManager[Any]:
        """The block of a forward. The first one takes longer."""
        if not self._is_due or not torch.is_grad_enabled():
            return _NOTHING
        self._is_due = False
        return _Counting(self)


class _Counting(TorchDispatchMode):
    def __init__(self, owner: ForwardFlops) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owner = owner
        self._total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            self._total += flop_registry[packet](*args, **kwargs, out_val=result)
        elif packet.__name__ in _RECURRENT:
            self._total += _recurrent(args)
        return result

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self._owner.count = self._total
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]


def _recurrent(args: Any) -> int:
    """Every weight matrix is multiplied with each step of each sequence. args: first the input [steps, batch, ...]."""
    weights: list[Tensor] = []
    for value in args[1:]:
        weights += [w for w in (value if isinstance(value, list | tuple) else [value]) if _is_weight(w)]
    rows: int = args[0].shape[0] * args[0].shape[1]
    return 2 * rows * sum(w.numel() for w in weights)


def _is_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2
