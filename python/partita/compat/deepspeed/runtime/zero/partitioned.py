"""What DeepSpeed leaves on partitioned parameters, for programs that look there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from partita.compat.deepspeed.runtime.zero.absent import name_all
from partita.compat.deepspeed.runtime.zero.partition_parameters import ZeroParamStatus


def mark(model: nn.Module) -> None:
    """Gives parameters `ds_id`, `ds_shape`, `ds_numel` and `ds_status`, and modules a `state_dict()` with all names.

    The status stays "not available", also while a parameter is gathered: who gathers it once more does no harm.
    """
    for number, parameter in enumerate(model.parameters()):
        marks: dict[str, Any] = {"ds_id": number, "ds_shape": parameter.shape, "ds_numel": parameter.numel()}
        vars(parameter).update(marks, ds_status=ZeroParamStatus.NOT_AVAILABLE, ds_active_sub_modules=set())
    for module in model.modules():
        name_all(module)


class ParameterOffload:
    """`optimizer.parameter_offload`, whose hooks TRL takes away while it generates from gathered parameters.

    There are none to take away: hooks of Partita do nothing for parameters that are gathered.

    Attributes:
        module: the model's parameters as TRL asks for them.
        forward_hooks, backward_hooks: empty.
    """

    def __init__(self, model: nn.Module) -> None:
        self.module = _Parameters(model)
        self.forward_hooks: list[Any] = []
        self.backward_hooks: list[Any] = []

    def _register_deepspeed_module(self, module: Any) -> None:
        """Puts back the hooks that were taken away: none."""


class _Parameters:
    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def named_parameters(self, recurse: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        return self._model.named_parameters(recurse=recurse)

    def ds_external_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(())
