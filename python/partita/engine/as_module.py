"""An engine as the `nn.Module` that other libraries ask for: its one child is the model."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import Tensor, nn


class AsModule(nn.Module):
    """What `nn.Module` offers, for the model of an engine.

    The model is the child `module`, so names of parameters, buffers and modules begin with "module.", as in DDP.
    What the engine does not have is looked up in the model. Nothing can be registered beside the model, and conversions
    (`to`, `half`, `cuda`, ...) do nothing or are refused: the parameters lie in buffers of the engine.
    """

    module: nn.Module

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        vars(self)["module"] = module  # found at once, and not by __getattr__
        self._modules["module"] = module

    # -- attributes

    def __getattr__(self, name: str) -> Any:
        """The model's attribute; asked only for what the engine does not have."""
        if hasattr(type(self), name):  # a property of the engine raised: once more, for its own error
            return object.__getattribute__(self, name)
        model = vars(self).get("module")
        if model is None or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"an engine has no attribute '{name}'")
        try:
            return getattr(model, name)
        except AttributeError as error:
            raise AttributeError(f"neither the engine nor its model has '{name}': {error}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        # Asking for a Parameter goes through Python: only for tensors, so that other attributes cost little.
        if isinstance(value, nn.Module) or (isinstance(value, Tensor) and isinstance(value, nn.Parameter)):
            self._refuse_child(name)
        object.__setattr__(self, name, value)

    def _refuse_child(self, name: str) -> NoReturn:
        raise RuntimeError(
            f"engine.{name} would be beside the model, where training does not reach it: make it part of the model "
            "before initialize(), or set it on engine.module if it is not to be trained"
        )

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Refused, as are `register_module`, `register_parameter` and `register_buffer`."""
        self._refuse_child(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refused."""
        self._refuse_child(name)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Refused."""
        self._refuse_child(name)

    # -- the mode is the model's

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return self.module.training

    @training.setter
    def training(self, mode: bool) -> None:
        """Sets the model's own flag; `train()` sets those of its modules."""
        if "module" in vars(self):  # nn.Module sets it first, without a model
            self.module.training = mode

    # -- conversions and copies

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AsModule:
        """What `to`, `half`, `float`, `cuda`, `type`, ... do to each tensor.

        Raises:
            RuntimeError: a tensor would get another dtype, device or memory format; names it.
        """
        found: dict[Any, str] = {}
        for name, tensor in chain(self.module.named_parameters(), self.module.named_buffers()):
            key = (tensor.dtype, tensor.device, tensor.dim())
            if key not in found:
                found[key] = _change(fn, tensor)
            if found[key]:
                raise RuntimeError(
                    f"'{name}' would become {found[key]}: an engine does not convert its model, as the parameters "
                    "lie in its buffers; do that before initialize(), or say the precision in the config (fp16, bf16)"
                )
        return self

    def share_memory(self) -> NoReturn:
        """Refused."""
        raise RuntimeError("engine.share_memory(): the parameters lie in buffers of the engine and cannot be moved")

    def compile(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused."""
        raise RuntimeError("engine.compile(): compile the model before initialize(), by model.compile(), in stages 0-2")

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self.__reduce_ex__(2)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "an engine cannot be copied or pickled: it has process groups and buffers of this process; take "
            "engine.module_state_dict(), or deepcopy engine.module (in stage 3 inside zero.GatheredParameters)"
        )


def _change(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> str:
    """What a conversion would make of a tensor; empty if it stays as it is. Tried on a small one of its kind."""
    probe = torch.empty((2,) * tensor.dim(), dtype=tensor.dtype, device=tensor.device)
    made = fn(probe)
    if made.dtype != probe.dtype or made.device != probe.device:
        return f"{made.dtype} on {made.device} (it is {probe.dtype} on {probe.device})".replace("torch.", "")
    return "" if made.stride() == probe.stride() else "a tensor of another memory format"
