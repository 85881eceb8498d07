"""The optimizer that DeepSpeed's `initialize()` returns."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch.optim import Optimizer

from partita.compat.deepspeed.runtime.zero.partitioned import ParameterOffload
from partita.engine import EngineBase


class DeepSpeedOptimizer(Optimizer):
    """`engine.optimizer` of Partita with DeepSpeed's attributes; all others are that optimizer's, or the user's.

    Attributes:
        optimizer: the user's, or the one that the config names.
        parameter_offload: in stage 3.
        overflow: whether the last step whose outcome is known was skipped. Nobody waits for it: on a GPU that is the
            step before the last one.
    """

    parameter_offload: ParameterOffload

    def __init__(self, engine: EngineBase, sharded: Optimizer) -> None:  # has no groups and hooks of its own
        self._engine = engine
        self._sharded = sharded
        self.overflow = False
        self.optimizer: Optimizer = getattr(sharded, "inner", sharded)
        self._opt_called = True  # schedules warn when step() was not seen before theirs; engine.step() has it inside

    def __getattr__(self, name: str) -> Any:
        if name in ("_engine", "_sharded", "optimizer", "parameter_offload"):
            raise AttributeError(name)
        found = getattr(self._sharded, name, None)
        return getattr(self.optimizer, name) if found is None else found

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Those of the user's optimizer: what is written into them counts."""
        return self._sharded.param_groups

    @property
    def cur_scale(self) -> float:
        """What losses are multiplied by before backward; 1 outside float16."""
        return self._engine.loss_scale

    loss_scale = cur_scale

    def steps_by(self, step: Callable[[], None]) -> None:
        """`step()` of this optimizer and of the user's is this function, the engine's."""

        def own_step(optimizer: Optimizer, closure: Any = None) -> None:
            if closure is not None:
                raise RuntimeError("optimizer.step(closure): the engine has no loss to compute again; leave it out")
            step()

        own_step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # schedules warn of a step that is not theirs
        vars(self.optimizer)["step"] = MethodType(own_step, self.optimizer)  # updates themselves are the class's

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """The same as `engine.step()`."""
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops gradients since the last `engine.step()`."""
        self._sharded.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As `engine.optimizer.state_dict()` of Partita: in stage 0."""
        return self._sharded.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refused, as of Partita's."""
        self._sharded.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: a group that is added now would not be trained."""
        self._sharded.add_param_group(param_group)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"
