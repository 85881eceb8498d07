"""Adam and AdamW as a torch optimizer over the native update; usable without the engine."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from partita._core import AdamGroup
from partita.device import kernels
from partita.optim.fused_plan import Control, Plan

# Options of torch.optim.Adam that change the arithmetic; the native update has none of them.
UNSUPPORTED_OPTIONS = ("amsgrad", "maximize", "capturable", "differentiable")


class FusedAdam(Optimizer):
    """Adam (Kingma and Ba 2015), or AdamW (Loshchilov and Hutter 2019) with `decoupled_weight_decay`.

    One pass over memory per parameter. Parameters in float16 and bfloat16 have a float32 master copy in the state.

    Args:
        params: parameters or param groups; contiguous tensors on the CPU or on CUDA devices.
        lr: learning rate, at least 0.
        betas: decay rates of the first and second moment, in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: at least 0; joins the gradient (L2), or shrinks the weight when decoupled.
        decoupled_weight_decay: False: Adam; True: AdamW.
        bias_correction: False: the moments, which start at zero, are used as they are.

    Raises:
        ValueError: a value outside its range.
    """

    _plan: Plan | None  # of the last step
    _controls: dict[torch.device, Control]

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        bias_correction: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas) if isinstance(betas, list) else betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults)
        self._forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's.

        Raises:
            ValueError: a value outside its range.
        """
        _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters, indices, grads = self._with_gradients()
        if self._plan is None or not self._plan.fits(parameters, indices, grads, self.state):
            self._plan = None  # its states and parts first: the new one may need memory
            self._plan = Plan(parameters, indices, grads, self.state)
        groups = [adam_group(group) for group in self.param_groups]
        for batch, step in self._plan.begin_step(grads):
            device = batch.device
            # Otherwise a launch on another GPU than the current one might make a context on the latter.
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                if device not in self._controls:
                    self._controls[device] = Control(device)
                kernels.adam(batch.parts, groups, self._controls[device].at(step))
        return loss

    def _with_gradients(self) -> tuple[list[Tensor], list[int], list[Tensor]]:
        """The parameters that have a gradient, the indices of their groups, and the gradients, contiguous."""
        parameters: list[Tensor] = []
        indices: list[int] = []
        grads: list[Tensor] = []
        for index, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if (grad := parameter.grad) is not None:
                    parameters.append(parameter)
                    indices.append(index)
                    grads.append(grad)
        if not all(map(_is_contiguous, grads)):
            grads = [grad.contiguous() for grad in grads]
        return parameters, indices, grads

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but states stay float32 (torch casts them to the parameter's dtype) and are copies."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, parameter in zip(saved, parameters, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor) and name != "step":
                    self.state[parameter][name] = value.detach().to(parameter.device, torch.float32, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        self._plan = None
        self._controls = {}


def _is_contiguous(grad: Tensor) -> bool:
    return grad.layout is not torch.strided or grad.is_contiguous()  # others are refused by name later


def _check_group(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not _is_number(group[name], below=math.inf):
            raise ValueError(f"FusedAdam: {name} is {group[name]!r}; it must be a finite number, at least 0")
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(_is_number(beta, below=1.0) for beta in betas):
        raise ValueError(f"FusedAdam: betas are {betas!r}; they must be two numbers, at least 0 and below 1")


def _is_number(value: Any, below: float) -> bool:
    return isinstance(value, int | float | Tensor) and bool(0 <= value < below)


def is_native(optimizer: Optimizer) -> bool:
    """Whether the native update computes what this optimizer computes."""
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) and not _updates_as_fused_adam(type(optimizer)):
        return False
    return not any(group.get(option) for group in optimizer.param_groups for option in UNSUPPORTED_OPTIONS)


def _updates_as_fused_adam(kind: type[Optimizer]) -> bool:
    """Whether a class is FusedAdam, perhaps with other arguments; torch wraps the `step` of the first that is made."""
    return issubclass(kind, FusedAdam) and inspect.unwrap(kind.step) is inspect.unwrap(FusedAdam.step)


def adam_group(group: dict[str, Any], waited: int = 0) -> AdamGroup:
    """The hyper-parameters that a param group has now (a schedule may change them between steps).

    Args:
        waited: steps that were taken without the parameters of this group.
    """
    beta1, beta2 = group["betas"]
    return AdamGroup(
        float(group["lr"]),
        float(beta1),
        float(beta2),
        float(group["eps"]),
        float(group["weight_decay"]),
        bool(group["decoupled_weight_decay"]),
        bool(group.get("bias_correction", True)),  # torch's have no such key
        waited,
    )
