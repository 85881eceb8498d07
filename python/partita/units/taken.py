"""What stands in `parameter.grad` after the engine has taken the gradient, and what a program does to it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from partita.units.layout import Slot
from partita.units.unit import Unit

logger = logging.getLogger("partita")

ADVICE = (
    "use gradient_clipping in the config and engine.get_global_grad_norm(), read a gradient with "
    "partita.utils.safe_get_full_grad(parameter), and change it with safe_set_full_grad() or by assigning "
    "parameter.grad = ..."
)
# What clipping by hand does to gradients: with norms of 0 and factors that are not used, nothing.
_NORMS = ("aten::linalg_vector_norm", "aten::norm", "aten::_foreach_norm")
_CHANGES = ("mul_", "div_", "clamp_", "clamp_min_", "clamp_max_", "detach_")
_SCALINGS = {f"aten::{prefix}{name}" for name in _CHANGES for prefix in ("", "_foreach_")}


class ReadByHand:
    """Says once that a program reads gradients that the engine has taken.

    Attributes:
        changed: the taken gradients that somebody has made zeros or added to; mostly none.
    """

    def __init__(self) -> None:
        self.changed: list[TakenGradient] = []
        self._is_said = False

    def warn(self, name: str) -> None:
        """The gradient of this parameter was read, or changed in place."""
        if not self._is_said:
            self._is_said = True
            logger.warning(
                "the gradient of parameter '%s' was clipped or read by hand, and nothing came of it (norms are 0): the "
                "engine has taken the gradients; %s",
                name,
                ADVICE,
            )


class TakenGradient(Tensor):
    """Has the form of a gradient, and no values and no memory.

    A program that drops its gradients, by any `zero_grad()` or by `parameter.grad = None`, drops this one: so the
    engine knows. Clipping by hand does nothing and is warned of. Any other use raises.

    Attributes:
        parameter_name: in the model.
        is_dropped: a program has made the gradient zeros.
        more: what autograd has added since.
        is_passed: autograd has put what it added into `parameter.grad` by itself (with `create_graph`).
    """

    parameter_name: str
    is_dropped: bool
    more: Tensor | None
    is_passed: bool
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[TakenGradient], parameter: Tensor, name: str, reading: ReadByHand) -> TakenGradient:
        """Of a parameter, which has this name in the model."""
        with torch._C.DisableTorchFunctionSubclass():  # the parameter may be absent
            dtype = getattr(parameter, "grad_dtype", None) or parameter.dtype
        made: TakenGradient = Tensor._make_wrapper_subclass(cls, parameter.shape, dtype=dtype, device=parameter.device)
        made.parameter_name = name
        made._reading = reading
        made.renew()
        return made

    _reading: ReadByHand

    def renew(self) -> None:
        """Stands for another gradient of the same parameter."""
        self.is_dropped, self.more, self.is_passed = False, None, False

    def __repr__(self) -> str:  # type: ignore[override]
        return f"TakenGradient('{self.parameter_name}')"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What every operation on such a tensor comes to, those of autograd's engine too."""
        name = func._schema.name
        given = args[0] if isinstance(args[0], list | tuple) else [args[0]]
        marks = [mark for mark in given if isinstance(mark, cls)]
        in_backward = torch._C._current_graph_task_id() != -1
        if marks and in_backward and name == "aten::add_":
            marks[0].more = args[1].detach().clone()  # autograd may need its own tensor again
            marks[0]._reading.changed.append(marks[0])
            return marks[0]
        if marks and in_backward and name == "aten::add":
            marks[0].is_passed = True
            marks[0]._reading.changed.append(marks[0])
            return args[1]
        if marks and name in ("aten::detach", "aten::alias"):
            return marks[0]
        if marks and name in ("aten::zero_", "aten::_foreach_zero_"):
            for mark in marks:
                mark.is_dropped = True
                mark._reading.changed.append(mark)
            return _result_in_place(args[0])
        if marks and name in (*_NORMS, *_SCALINGS):
            marks[0]._reading.warn(marks[0].parameter_name)
            if name in _SCALINGS:
                return _result_in_place(args[0])
            zeros = [torch.zeros((), dtype=mark.dtype, device=mark.device) for mark in given]
            return zeros if isinstance(args[0], list | tuple) else zeros[0]
        named = next((a.parameter_name for a in (*given, *args) if isinstance(a, cls)), "?")
        raise RuntimeError(
            f"the gradient of parameter '{named}' was used ({name.removeprefix('aten::')}), and the engine has taken "
            f"it: {ADVICE}"
        )


class TakenGradients:
    """Which gradients of a model the engine has taken, as a program sees it in `parameter.grad`.

    Args:
        units: whose parameters' gradients are taken.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self._reading = ReadByHand()
        self._units = units
        self._marks = [[self._mark(slot.name, p) for slot, p in _named(unit)] for unit in units]
        self._count = sum(len(marks) for marks in self._marks)
        self._shown: set[int] = set()  # indices of units

    def show(self, index: int) -> None:
        """The gradients of a unit, by its index, have been taken."""
        self._shown.add(index)
        with torch._C.DisableTorchFunctionSubclass():  # absent parameters are asked often here
            for i, (parameter, mark) in enumerate(zip(self._units[index].parameters, self._marks[index], strict=True)):
                try:
                    parameter.grad = mark
                except (
                    RuntimeError
                ):  # a program has set grad_dtype, or converted the parameter, an error at the next step
                    parameter.grad = self._marks[index][i] = self._mark(mark.parameter_name, parameter)

    def withdraw(self) -> None:
        """No gradient is shown any more; what autograd and the program have given since stays in `parameter.grad`."""
        if not self._shown:
            return
        with torch._C.DisableTorchFunctionSubclass():
            for i in self._shown:
                for parameter, mark in zip(self._units[i].parameters, self._marks[i], strict=True):
                    if parameter.grad is mark:
                        parameter.grad = mark.more if self._reading.changed else None
        self._forget()

    def clear(self) -> None:
        """No parameter has any gradient any more."""
        with torch._C.DisableTorchFunctionSubclass():
            for unit in self._units:
                for parameter in unit.parameters:
                    parameter.grad = None
        self._forget()

    def _forget(self) -> None:
        self._shown.clear()
        for mark in self._reading.changed:
            mark.renew()
        self._reading.changed.clear()

    def receive(self, index: int, parameter: nn.Parameter) -> None:
        """Autograd has added to the gradient of a parameter of a unit, which may be shown."""
        if index in self._shown and isinstance(grad := parameter.grad, TakenGradient):
            parameter.grad, grad.more = grad.more, None

    def dropped(self) -> list[tuple[int, Slot]]:
        """(index of the unit, slot) of the shown gradients that the program has dropped or replaced."""
        found: list[tuple[int, Slot]] = []
        if not self._shown:
            return found
        dropped = {id(mark) for mark in self._reading.changed if mark.is_dropped}
        passed = {id(mark) for mark in self._reading.changed if mark.is_passed}
        with torch._C.DisableTorchFunctionSubclass():
            for i in sorted(self._shown):
                grads = [parameter.grad for parameter in self._units[i].parameters]
                if not self._reading.changed and all(map(is_, grads, self._marks[i])):  # almost always
                    continue
                slots = self._units[i].layout.slots
                for j, (grad, mark) in enumerate(zip(grads, self._marks[i], strict=True)):
                    is_here = grad is mark
                    if (is_here and dropped and id(mark) in dropped) or not (is_here or id(mark) in passed):
                        found.append((i, slots[j]))
        return found

    def decide(self, in_backward: bool, has_committed: bool) -> tuple[bool, list[tuple[int, Slot]]]:
        """(whether nothing is left of the micro-batch at hand, what is to be dropped of it otherwise).

        Args:
            in_backward: a backward has begun and not ended: the program goes on after an exception, if all are dropped.
            has_committed: gradients of micro-batches that are over are in the same buffers.

        Raises:
            RuntimeError: what was dropped cannot be told from these; names a parameter.
        """
        if not self.are_all_gone if in_backward else not self._shown:
            return False, []
        dropped = self.dropped()
        if dropped and has_committed:
            raise RuntimeError(
                f"the gradient of parameter '{dropped[0][1].name}' was dropped (zero_grad(), or .grad set by hand) but "
                "is added already to the gradients of this step's micro-batches before: begin the whole step anew with "
                "engine.zero_grad(), or keep the gradient from arising with requires_grad_(False)"
            )
        return (True, []) if in_backward or len(dropped) == self._count > 0 else (False, dropped)

    def _mark(self, name: str, parameter: nn.Parameter) -> TakenGradient:
        return TakenGradient(parameter, name, self._reading)

    @property
    def are_all_gone(self) -> bool:
        """Whether no parameter has any gradient, taken or not, but for zeros."""
        with torch._C.DisableTorchFunctionSubclass():
            return all(_is_nothing(parameter.grad) for unit in self._units for parameter in unit.parameters)

    @property
    def has_fresh(self) -> bool:
        """Whether a parameter has a gradient that has not been taken."""
        with torch._C.DisableTorchFunctionSubclass():
            return any(fresh(parameter) is not None for unit in self._units for parameter in unit.parameters)


def _result_in_place(changed: Any) -> Any:
    return changed if isinstance(changed, Tensor) else None  # operations on lists return nothing


def _is_nothing(grad: Tensor | None) -> bool:
    if isinstance(grad, TakenGradient):
        return grad.is_dropped
    return grad is None or not bool(grad.any())


def _named(unit: Unit) -> Iterator[tuple[Slot, nn.Parameter]]:
    return zip(unit.layout.slots, unit.parameters, strict=True)


def fresh(parameter: nn.Parameter) -> Tensor | None:
    """The gradient that autograd or the program has given and the engine has not taken."""
    grad = parameter.grad
    return None if type(grad) is TakenGradient else grad
