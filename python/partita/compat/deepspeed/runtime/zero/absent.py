"""`state_dict()` of modules whose parameters are partitioned, as programs for DeepSpeed call it."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.hooks import RemovableHandle

from partita.zero import AbsentParameterError


def name_all(module: nn.Module) -> None:
    """From now on the module's own `state_dict()` names its absent parameters too.

    Their entries are the parameters themselves: names, shapes and dtypes can be read, and whoever wants values, saves
    them for example, learns that there are none here.
    """
    vars(module)["_save_to_state_dict"] = MethodType(_save_to_state_dict, module)


def name_all_that_is_built() -> RemovableHandle:
    """The same for every module that registers a parameter until the handle is removed."""

    def on_registration(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if "_save_to_state_dict" not in vars(module):
            name_all(module)

    return register_module_parameter_registration_hook(on_registration)


def _save_to_state_dict(module: nn.Module, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    own: dict[str, Any] = {}
    type(module)._save_to_state_dict(module, own, prefix, True)
    destination.update(own if keep_vars else {name: _detached(value) for name, value in own.items()})


def _detached(value: Any) -> Any:
    try:
        return value.detach() if hasattr(value, "detach") else value
    except AbsentParameterError:
        return value
