"""State dicts for `torch.save`."""

from __future__ import annotations

from typing import Any

import torch

from partita.compat.deepspeed._absent import absent_names


def clone_tensors_for_torch_save(item: Any, device: torch.device | str = "cpu") -> Any:
    """The same lists, tuples and dicts with tensors of their own memory: a view would be saved with its whole buffer.

    Args:
        device: where the new tensors are.
    """
    if torch.is_tensor(item):
        return item.detach().clone().to(device)
    if isinstance(item, list | tuple):
        return type(item)(clone_tensors_for_torch_save(each, device) for each in item)
    if isinstance(item, dict):
        return type(item)({key: clone_tensors_for_torch_save(each, device) for key, each in item.items()})
    return item


__getattr__ = absent_names(__name__)
