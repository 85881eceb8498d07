"""A backward in two halves: the gradients of a module's inputs first (I), those of its weights later (W).

[Note: the weight split]
The forwards of Linear, Conv1d to Conv3d, Embedding and transformers' Conv1D call one autograd function of ours. While
nobody collects, its backward computes all gradients, as torch's own does and with the same bits. While a `WeightSplit`
collects, its backward computes the gradient of the input and keeps what the others need in a `Deferred`: the input and
the output's gradient. Modules are called as before, so hooks on modules and on activations run as in a joint backward,
in I. What cannot wait is computed in I: other layers, parameters whose gradients the program has hooks on, a backward
with `create_graph`, one that returns gradients (`autograd.grad()`).

Whether a backward is collected is an attribute of the `WeightSplit` and not of a thread: on a GPU autograd runs
backwards in threads of its own. Recomputed forwards (activation checkpoints) are forwards like others.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from partita.pipeline.layer_gradients import Choice, Gradients, Rule, choice_for
from partita.units import accumulates_into, has_hooks_of_program

_PLAIN = (Tensor, nn.Parameter)  # classes of tensors that do nothing of their own


@dataclass(frozen=True)
class _Work:
    """Gradients of one use of a layer that are still to be computed; None for a parameter that wants none."""

    rule: Rule
    x: Tensor
    grad: Tensor  # of the layer's output
    weight: nn.Parameter
    parameters: tuple[nn.Parameter | None, nn.Parameter | None]  # weight and bias
    versions: tuple[int, int]  # of x and grad, as autograd counts changes in place

    @torch.no_grad()
    def gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        if (self.x._version, self.grad._version) != self.versions:
            raise RuntimeError(
                f"the input of a layer with a weight of shape {tuple(self.weight.shape)}, or the gradient of its "
                "output, was changed in place before the gradient of the weight was computed: give the layer a copy of "
                "the input (.clone()), or take a schedule without W"
            )
        wants_weight, wants_bias = (parameter is not None for parameter in self.parameters)
        computed = self.rule.backward(self.grad, self.x, self.weight, (False, wants_weight, wants_bias))
        pairs = zip(self.parameters, computed[1:], strict=True)
        return [
            (parameter, gradient) for parameter, gradient in pairs if parameter is not None and gradient is not None
        ]


class Deferred:
    """The weight gradients that one backward has left.

    It holds layers' inputs and the gradients of their outputs, which nobody may change before they are used: a received
    tensor that is the input of a stage or the gradient of a stage's output may be among them.
    """

    def __init__(self) -> None:
        self._works: deque[_Work] = deque()
        # By the id of a parameter: how many of its gradients are still to come, and the sum of those that came.
        self._uses: Counter[int] = Counter()
        self._sums: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """The memory that is held. Storages that several layers use count once, whoever else holds them."""
        storages = [tensor.untyped_storage() for work in self._works for tensor in (work.x, work.grad)]
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())

    def put(self, work: _Work) -> None:
        """Gradients that wait."""
        self._works.append(work)
        self._uses.update(id(parameter) for parameter in work.parameters if parameter is not None)

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Computes the gradients, in the order in which the backward came to them, and releases what they needed.

        A parameter that was used several times comes once, after its last gradient: the sum, formed as autograd forms
        it. The gradients carry the loss scale that the backward carried. On a GPU, the current stream is the one that
        the forward ran on.
        """
        sums = self._sums
        while self._works:
            for parameter, gradient in self._works.popleft().gradients():
                key = id(parameter)
                self._uses[key] -= 1
                total = sums.pop(key) + gradient if key in sums else gradient
                if self._uses[key]:
                    sums[key] = total
                else:
                    yield parameter, total


class WeightSplit:
    """Lets the weight gradients of a module wait, see [Note: the weight split].

    Modules get an attribute `forward`, which copies of them do not inherit. A module that has a forward of its own
    already, or whose class changes that of its kind, stays as it is.

    Args:
        module: of one stage; it may be wrapped in activation checkpoints, before or after.
        exits: takes the attributes away again.

    Attributes:
        deferred: where gradients wait; None: they are computed at once.
    """

    def __init__(self, module: nn.Module, exits: ExitStack) -> None:
        self.deferred: Deferred | None = None
        for layer in module.modules():
            if (choice := choice_for(layer)) is not None:
                layer.forward = _SplitForward(layer, *choice, self)
                exits.callback(partial(_take_away, layer, layer.forward))

    @contextmanager
    def collecting(self) -> Iterator[Deferred]:
        """A backward in this block computes the gradients of inputs, and leaves those of weights in the `Deferred`.

        Raises:
            RuntimeError: inside of another such block.
        """
        if self.deferred is not None:
            raise RuntimeError(
                "the weight gradients of this module are being collected already: end the collecting() block of one "
                "backward before the next one begins"
            )
        self.deferred = Deferred()
        try:
            yield self.deferred
        finally:
            self.deferred = None


class _SplitForward:
    """The forward of a layer whose weight gradients can wait."""

    def __init__(self, layer: nn.Module, choose: Choice, names: tuple[str, ...], split: WeightSplit) -> None:
        self._layer = layer
        self._plain = layer.forward
        self._choose = choose
        self._names = names
        self._split = split

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or len(args) != 1 or kwargs or not _records_plainly(args[0]):
            return self._plain(*args, **kwargs)
        own = self._layer._parameters  # a parametrised weight is not among them; to look at it computes it
        weight, bias = own.get("weight"), own.get("bias")
        if not _can_wait(weight) or any(name not in own for name in self._names):
            return self._plain(*args)
        if bias is not None and type(bias) is not nn.Parameter:
            return self._plain(*args)
        if (rule := self._choose(self._layer, args[0], weight)) is None:
            return self._plain(*args)
        return _SplitLayer.apply(args[0], weight, bias, rule, self._split)  # type: ignore[no-untyped-call]

    def __reduce__(self) -> tuple[Any, ...]:
        """What a copy of the layer has in the place of this: its class's forward."""
        return getattr, (self._layer, "forward")


def _take_away(layer: nn.Module, forward: _SplitForward) -> None:
    if vars(layer).get("forward") is forward:
        del layer.forward


def _can_wait(weight: nn.Parameter | None) -> TypeGuard[nn.Parameter]:
    return type(weight) is nn.Parameter and weight.requires_grad and weight.is_leaf


def _records_plainly(x: Any) -> bool:
    """Whether autograd records what is done with x for one ordinary backward, and casts nothing."""
    return (
        type(x) in _PLAIN
        and torch.is_grad_enabled()
        and not torch._C._is_any_autocast_enabled()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._is_tracing()
        and forward_ad._current_level < 0
    )


class _SplitLayer(torch.autograd.Function):
    """One use of a layer."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, rule: Rule, split: WeightSplit
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None)
        ctx.rule, ctx.split = rule, split
        ctx.weight, ctx.bias = weight, bias  # the parameters themselves, whatever hooks make of what is saved
        return rule.forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        x, saved = ctx.saved_tensors
        weight = ctx.weight if saved is None else saved
        wanted = ctx.needs_input_grad[:3]
        deferred = ctx.split.deferred
        if deferred is not None and _defers(ctx, wanted):
            parameters = (ctx.weight, ctx.bias if wanted[2] else None)
            deferred.put(_Work(ctx.rule, x, grad, ctx.weight, parameters, (x._version, grad._version)))
            wanted = (wanted[0], False, False)
            if not wanted[0]:
                return None, None, None, None, None
        gradients: Gradients = ctx.rule.backward(grad, x, weight, wanted)
        return (*gradients, None, None)


def _defers(ctx: Any, wanted: tuple[bool, bool, bool]) -> bool:
    """Whether the gradients of the parameters are only added to those that there are, and nobody looks at them."""
    if torch.is_grad_enabled():
        return False
    nodes = ctx.next_functions
    used = [(ctx.weight, nodes[1][0])] + ([(ctx.bias, nodes[2][0])] if wanted[2] else [])
    return all(
        accumulates_into(node)
        and not has_hooks_of_program(parameter)
        and getattr(parameter, "grad_dtype", None) in (None, parameter.dtype)
        for parameter, node in used
    )
