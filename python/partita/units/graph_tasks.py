"""The backwards that autograd runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

_autograd: Any = torch._C._autograd
_LAST = 1 << 63  # accumulations into parameters have greater numbers


def in_backward() -> bool:
    """Whether autograd runs a backward, of which this code is a part."""
    return torch._C._current_graph_task_id() != -1


def next_operation() -> int:
    """The number of the next operation that autograd records. A backward runs operations against these numbers."""
    return int(_autograd._get_sequence_nr())


def current_operation() -> int:
    """The number of the operation whose backward runs; -1 for none, and for what has no place in the order."""
    node = torch._C._current_autograd_node()
    number = -1 if node is None else int(node._sequence_nr())
    return number if number < _LAST else -1


def accumulates(parameters: Iterable[Tensor]) -> bool:
    """Whether the backward under way adds a gradient to one of these parameters: `autograd.grad()` does not."""
    with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad():  # parameters may be absent
        return any(parameter.requires_grad and accumulates_into(_accumulator(parameter)) for parameter in parameters)


def _accumulator(parameter: Tensor) -> Any:
    view: Any = parameter.view_as(parameter).grad_fn
    return view.next_functions[0][0]


def accumulates_into(accumulator: Any) -> bool:
    """Whether the backward under way adds a gradient to the parameter of this node of autograd's."""
    try:
        return bool(torch._C._will_engine_execute_node(accumulator))
    except RuntimeError:  # autograd.grad() returns the gradient of this parameter
        return False


class GraphTasks:
    """Tells when a backward is over that somebody has seen.

    Backwards may be nested: a reentrant checkpoint runs one inside of another.

    Args:
        over: called when the outermost one of those that were seen is over. Not called for one that raises.
    """

    def __init__(self, over: Callable[[], None]) -> None:
        self._over = over
        self._seen: list[int] = []

    def see(self) -> None:
        """A backward is under way."""
        task = torch._C._current_graph_task_id()
        if task not in self._seen:
            self._seen.append(task)
            torch.autograd.Variable._execution_engine.queue_callback(partial(_end, weakref.ref(self), task))

    @property
    def is_nested(self) -> bool:
        """Whether the backward under way is part of another one."""
        return len(self._seen) > 1

    def forget(self) -> None:
        """No backward is under way."""
        self._seen.clear()

    def end(self, task: int) -> None:
        """A backward is over, and with it all that began after it."""
        if task in self._seen:
            del self._seen[self._seen.index(task) :]
            if not self._seen:
                self._over()


def _end(tasks: weakref.ref[GraphTasks], task: int) -> None:
    if (alive := tasks()) is not None:
        alive.end(task)
