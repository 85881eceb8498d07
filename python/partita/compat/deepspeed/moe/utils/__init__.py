"""Questions about experts, with the answers of a model that has none."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from partita.compat.deepspeed._absent import absent_names

__getattr__ = absent_names(__name__)


def has_moe_layers(m: nn.Module) -> tuple[bool, int]:
    """Whether a model has layers of experts, and how many experts: none."""
    return False, 0


def is_moe_param(param: Tensor) -> bool:
    """Whether a parameter is an expert's: no."""
    return False


def is_moe_param_group(param_group: dict[str, Any]) -> bool:
    """Whether all of a group's parameters are experts': no."""
    return False


def split_params_into_different_moe_groups_for_optimizer(
    param_groups: dict[str, Any] | tuple[dict[str, Any], ...] | list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """The groups as they are, in a list, as no parameter is an expert's. Their parameters become lists.

    Raises:
        ValueError: `param_groups` is neither a group nor a list or tuple of groups.
    """
    if isinstance(param_groups, dict):
        param_groups = [param_groups]
    if not isinstance(param_groups, (list, tuple)):
        raise ValueError(f"param_groups is a {type(param_groups).__name__}: give a param group, or a list of them")
    for group in param_groups:
        group["params"] = list(group["params"])
    return list(param_groups)
