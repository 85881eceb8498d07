"""The state dict of a model whose parameters may be partitioned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from partita.units import holders_of


def state_tensors(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What is in the module's state dict, by name, each valid until the next is asked for.

    Partitioned parameters are gathered one unit at a time: a collective, which all ranks go through to the end. So the
    order is not that of the state dict.
    """
    state = module.state_dict(keep_vars=True)
    for holder, names in holders_of(state).items():
        if holder is None:
            for name in names:
                yield name, state[name].detach() if isinstance(state[name], torch.Tensor) else state[name]
            continue
        with holder.whole() as values_of:
            for name in names:
                yield name, values_of(state[name])


def weight_buckets(module: nn.Module, bucket_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """The tensors of the module's state dict by name, in buckets of at most `bucket_bytes`, or of one tensor.

    They have memory of their own. Inside a bucket, tensors that share memory still do. Partitioned parameters are
    gathered as by `state_tensors()`.
    """
    bucket: list[tuple[str, torch.Tensor]] = []
    clones: dict[tuple[object, ...], torch.Tensor] = {}
    size = 0
    for name, value in state_tensors(module):
        if not isinstance(value, torch.Tensor):
            continue
        key = _memory_of(value)
        if key not in clones and bucket and size + value.nbytes > bucket_bytes:
            yield bucket
            bucket, clones, size = [], {}, 0
        if key not in clones:
            clones[key] = value.clone()
            size += value.nbytes
        bucket.append((name, clones[key]))
    if bucket:
        yield bucket


def clone_state_dict(module: nn.Module, wanted: bool = True) -> dict[str, Any]:
    """The module's state dict with memory of its own; tensors that share memory still do.

    A collective if parameters are partitioned. `wanted`: false where another rank asks and this one does not.
    """
    clones: dict[tuple[object, ...], torch.Tensor] = {}
    values: dict[str, Any] = {}
    for name, value in state_tensors(module):
        if not wanted:
            continue
        if isinstance(value, torch.Tensor):
            key = _memory_of(value)
            if value.numel() == 0 or key not in clones:
                clones[key] = value.clone()
            value = clones[key]
        values[name] = value
    return {name: values[name] for name in module.state_dict(keep_vars=True) if name in values}


def _memory_of(value: torch.Tensor) -> tuple[object, ...]:
    return (value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride(), value.dtype)
