"""Floating-point operations of what runs: counted where torch dispatches them, in all and by module.

A multiplication and an addition that belong together are one multiply-accumulate (MAC) and two operations (FLOPs).
Counted are matrix products, convolutions, attention and recurrent layers, forward or backward, whoever calls them: a
module, a function, a compiled kernel's fallback. All else, such as activations, norms and look-ups of embeddings,
counts as nothing: together these are a few per cent of a model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import prod
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

aten = torch.ops.aten


class FlopCounter(TorchDispatchMode):
    """In this block, operations are counted. It makes each operation slower.

    Args:
        modules: by name, whose forwards are told apart; None: all is one. Hooks on them end with the block.

    Attributes:
        by_module: FLOPs by the name of the innermost module that was running; "" is a model itself, and what runs
            outside of it.
    """

    def __init__(self, modules: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_module: Counter[str] = Counter()
        self._modules = modules or {}
        self._running = [""]
        self._hooks: list[RemovableHandle] = []

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What is to be compiled is compiled in this block, too: otherwise torch would never compile it."""
        return True

    @property
    def total(self) -> int:
        """FLOPs so far."""
        return sum(self.by_module.values())

    def __enter__(self) -> Self:
        for name, submodule in self._modules.items():
            if not takes_hooks(submodule):
                continue
            self._hooks.append(submodule.register_forward_pre_hook(self._enter(name), prepend=True))
            self._hooks.append(submodule.register_forward_hook(self._leave, always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _enter(self, name: str) -> Callable[..., None]:
        return lambda module, args: self._running.append(name)

    def _leave(self, module: nn.Module, args: Any, outputs: Any) -> None:
        self._running.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):  # such as torch.cond: what is in it is not seen
            return func(*args, **kwargs)
        packet = func._overloadpacket
        formula = FORMULAS.get(packet)
        if formula is None and packet not in flop_registry and torch.is_inference_mode_enabled():
            with _Inside(self):  # operations that are made of others arrive whole there
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        outputs = func(*args, **kwargs)
        if formula is not None:
            self.by_module[self._running[-1]] += formula(*args, **kwargs)
        elif packet in flop_registry:
            self.by_module[self._running[-1]] += flop_registry[packet](*args, **kwargs, out_val=outputs)
        return outputs


class _Inside(TorchDispatchMode):
    """Hands the operations that another one is made of to a counter."""

    def __init__(self, counter: FlopCounter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._counter.__torch_dispatch__(func, types, args, kwargs)


def modules_to_watch(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by name, without those inside of compiled ones: hooks on them would be compiled too, or refused."""
    found: dict[str, nn.Module] = {}
    compiled: list[str] = []
    for name, module in model.named_modules():  # those inside come later
        if not any(name.startswith(outer) for outer in compiled):
            found[name] = module
            if not takes_hooks(module) or isinstance(module, torch._dynamo.OptimizedModule):
                compiled.append(f"{name}." if name else "")
    return found


def takes_hooks(module: nn.Module) -> bool:
    """Whether hooks on the module are outside of what is compiled."""
    return module._compiled_call_impl is None  # it is compiled with its hooks by `module.compile()`


def count_flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """FLOPs of one call. A module's forward, say: `count_flops(model, inputs)`."""
    with FlopCounter() as counter:
        function(*args, **kwargs)
    return counter.total


# -- what torch's own table lacks


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> int:
    """Scores and weighted values, masked ones too: they are computed all the same, or could be."""
    *batch, queries, width = query.shape
    return 2 * prod(batch) * queries * key.shape[-2] * (width + value.shape[-1])


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> int:
    """The scores once more, and a gradient for each factor of both products."""
    *batch, queries, width = query.shape
    return 2 * prod(batch) * queries * key.shape[-2] * (3 * width + 2 * value.shape[-1])


def _matrix_vector(matrix: Tensor, *rest: Any, **options: Any) -> int:
    return 2 * matrix.numel()


def _plus_matrix_vector(added: Tensor, matrix: Tensor, *rest: Any, **options: Any) -> int:
    return 2 * matrix.numel()


def _plus_product(added: Tensor, left: Tensor, right: Tensor, **options: Any) -> int:
    return 2 * left.numel() * right.shape[-1]


def _mkldnn_layer(inputs: Tensor, weight_in: Tensor, weight_hidden: Tensor, *rest: Any, **options: Any) -> int:
    """One layer and direction: each step of each sequence multiplies both matrices with a vector."""
    steps = inputs.numel() // inputs.shape[-1]
    return 2 * steps * (weight_in.numel() + weight_hidden.numel())


def _cudnn_layers(inputs: Tensor, weights: Sequence[Tensor], *rest: Any, **options: Any) -> int:
    """All layers and directions, whose matrices are in the list; vectors are biases."""
    steps = inputs.numel() // inputs.shape[-1]
    return 2 * steps * sum(weight.numel() for weight in weights if weight.dim() == 2)


def _twice(formula: Callable[..., int]) -> Callable[..., int]:
    """Backward has a gradient for each factor of a product."""
    return lambda *args, **options: 2 * formula(*args, **options)


def _packets(names: Sequence[str]) -> list[Any]:
    """Those that this version of torch has."""
    return [getattr(aten, name) for name in names if hasattr(aten, name)]


_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)

FORMULAS: dict[Any, Callable[..., int]] = {
    **dict.fromkeys(_packets(_ATTENTION), _attention),
    **dict.fromkeys(_packets([f"{name}_backward" for name in _ATTENTION]), _attention_backward),
    **dict.fromkeys(_packets(["mv", "dot", "vdot"]), _matrix_vector),
    **dict.fromkeys(_packets(["addmv", "addmv_"]), _plus_matrix_vector),
    **dict.fromkeys(_packets(["addbmm", "addbmm_", "addmm_", "baddbmm_"]), _plus_product),
    **dict.fromkeys(_packets(["mkldnn_rnn_layer"]), _mkldnn_layer),
    **dict.fromkeys(_packets(["mkldnn_rnn_layer_backward"]), _twice(_mkldnn_layer)),
    **dict.fromkeys(_packets(["_cudnn_rnn", "miopen_rnn"]), _cudnn_layers),
    **dict.fromkeys(_packets(["_cudnn_rnn_backward", "miopen_rnn_backward"]), _twice(_cudnn_layers)),
}
"""FLOPs of operations that torch.utils.flop_counter does not know, or, of attention whose queries share keys, may
refuse."""
