"""The hooks that programs register on an optimizer's step, around a step that the engine takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import (  # torch's hooks for all optimizers, which have no other name
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

_pre_hooks, _post_hooks = attrgetter("_optimizer_step_pre_hooks"), attrgetter("_optimizer_step_post_hooks")


@dataclass(frozen=True)
class StepCall:
    """What `step()` is given beside the optimizer."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def has_closure(self) -> bool:
        """Whether a closure is among the arguments."""
        return any(value is not None for value in (*self.args, *self.kwargs.values()))


class StepHooks:
    """Runs torch's hooks of an optimizer's step: those of each optimizer, and the global ones, which see the first.

    Args:
        optimizers: those on which programs may have registered hooks.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = list(optimizers)

    @property
    def precede(self) -> bool:
        """Whether there are hooks to run before a step."""
        return bool(_global_optimizer_pre_hooks) or any(map(_pre_hooks, self._optimizers))

    @property
    def follow(self) -> bool:
        """Whether there are hooks to run after a step."""
        return bool(_global_optimizer_post_hooks) or any(map(_post_hooks, self._optimizers))

    def before(self) -> StepCall:
        """Runs the hooks that precede a step; returns what they make of its arguments.

        Raises:
            RuntimeError: a hook returns neither None nor (args, kwargs).
        """
        call = StepCall()
        for optimizer, hook in self._preceding():
            result = hook(optimizer, (optimizer, *call.args), call.kwargs)
            if result is None:
                continue
            if not isinstance(result, tuple) or len(result) != 2:
                raise RuntimeError(f"a step pre-hook returned {result!r}: it must be None or (new_args, new_kwargs)")
            call = StepCall(tuple(result[0])[1:], dict(result[1]))
        return call

    def after(self, call: StepCall) -> None:
        """Runs the hooks that follow a step."""
        for optimizer, hook in self._following():
            hook(optimizer, (optimizer, *call.args), call.kwargs)

    def _preceding(self) -> Iterator[tuple[Optimizer, Callable[..., Any]]]:
        yield from ((self._optimizers[0], hook) for hook in list(_global_optimizer_pre_hooks.values()))
        for optimizer in self._optimizers:
            yield from ((optimizer, hook) for hook in list(optimizer._optimizer_step_pre_hooks.values()))

    def _following(self) -> Iterator[tuple[Optimizer, Callable[..., Any]]]:
        for optimizer in self._optimizers:
            yield from ((optimizer, hook) for hook in list(optimizer._optimizer_step_post_hooks.values()))
        yield from ((self._optimizers[0], hook) for hook in list(_global_optimizer_post_hooks.values()))


def step_without_hooks(optimizer: Optimizer, call: StepCall) -> None:
    """`optimizer.step()` with its own hooks left to the caller."""
    step: Any = type(optimizer).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__
    step(optimizer, *call.args, **call.kwargs)
