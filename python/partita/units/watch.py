"""Hooks on parameters that tell of their gradients, and whose they are."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Watcher(Protocol):
    """Who is told of gradients."""

    def accumulated(self, index: int, parameter: nn.Parameter) -> None:
        """The gradient of a parameter, by the number that the watcher has given it, is complete."""


def watch(parameter: nn.Parameter, watcher: Watcher, index: int) -> RemovableHandle:
    """Tells a reducer of the gradients of a parameter, and does not keep it alive: a parameter's hooks are out of the
    garbage collector's sight."""
    hook = partial(_accumulated, weakref.ref(watcher), index)
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    return handle


def has_reducer(parameter: Tensor) -> bool:
    """Whether a reducer that is neither closed nor forgotten consumes the gradients of this parameter."""
    hooks = (parameter._post_accumulate_grad_hooks or {}).values()
    return any(_is_ours(hook) and hook.args[0]() is not None for hook in hooks)


def has_hooks_of_program(parameter: Tensor) -> bool:
    """Whether somebody else than reducers is told of the gradients of this parameter."""
    hooks = (parameter._post_accumulate_grad_hooks or {}).values()
    return bool(parameter._backward_hooks) or not all(map(_is_ours, hooks))


def _accumulated(watcher: weakref.ref[Watcher], index: int, parameter: nn.Parameter) -> None:
    if (alive := watcher()) is not None:
        alive.accumulated(index, parameter)


def _is_ours(hook: Any) -> bool:
    return isinstance(hook, partial) and hook.func is _accumulated
