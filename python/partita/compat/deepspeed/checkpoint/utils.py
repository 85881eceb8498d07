"""State dicts for `torch.save`."""

from __future__ import annotations

from typing import Any

import torch

from partita.compat.deepspeed._absent import absent_names


def clone_tensors_for_torch_save(item: Any, device: torch.device | str = "cpu") -> Any:
    """The same lists, tuples and dicts with tensors of their own memory: a view would be saved with its whole buffer.

    What was one tensor stays one, so that a tied weight is saved once.

    Args:
        device: where the new tensors are.
    """
    return _cloned(item, device, {})


def _cloned(item: Any, device: torch.device | str, clones: dict[Any, torch.Tensor]) -> Any:
    if torch.is_tensor(item):
        memory = (item.untyped_storage()._cdata, item.storage_offset(), item.shape, item.stride(), item.dtype)
        if item.numel() == 0 or memory not in clones:
            clones[memory] = item.detach().clone().to(device)
        return clones[memory]
    if isinstance(item, list | tuple):
        return type(item)(_cloned(each, device, clones) for each in item)
    if isinstance(item, dict):
        return type(item)({key: _cloned(each, device, clones) for key, each in item.items()})
    return item


__getattr__ = absent_names(__name__)
