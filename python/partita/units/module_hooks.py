"""Hooks of the engine on modules, and what these find in the outputs of modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


class OwnHook:
    """A hook on a module that this engine trains.

    `copy.deepcopy()` and pickle copy the hooks of a module with the module. The copy is another model, of which the
    engine knows nothing: a hook on it would bring the parameters of the original, and run collectives for it. So the
    copy gets a hook that does nothing, and that is gone after the first call.
    """

    def __init__(self, hook: Callable[..., None]) -> None:
        self._hook = hook

    def __call__(self, *args: Any) -> None:
        self._hook(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _CopiedHook, ()


class _CopiedHook:
    """What a copy of a module has in place of an `OwnHook`."""

    def __call__(self, module: nn.Module, *_: Any) -> None:
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _CopiedHook)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)


def tensors_in(outputs: Any) -> Iterator[Tensor]:
    """The tensors in what a module returned, as far as its form is a common one."""
    for leaf in pytree.tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                yield from tensors_in(getattr(leaf, field.name))
