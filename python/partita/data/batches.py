"""How a batch enters a model, and where the loss is in what comes out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def call_with(module: Any, batch: Any) -> Any:
    """module(**batch) for a mapping, module(*batch) for a tuple or list, otherwise module(batch)."""
    if isinstance(batch, Mapping):
        return module(**batch)
    if isinstance(batch, tuple | list):
        return module(*batch)
    return module(batch)


def on_device(batch: Any, device: torch.device) -> Any:
    """The batch with its CPU tensors on `device`; the host does not wait for the copies."""
    if device.type == "cpu":
        return batch

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Mapping):  # of those that pytree does not know, a tokenizer's output say
            return {key: on_device(value, device) for key, value in leaf.items()}
        if isinstance(leaf, Tensor) and leaf.is_cpu:
            return leaf.pin_memory().to(device, non_blocking=True)
        return leaf

    return pytree.tree_map(move, batch, is_leaf=lambda node: isinstance(node, Mapping))


def loss_in(outputs: Any) -> Tensor:
    """The loss in a model's outputs: a scalar tensor, their `loss`, or the first of a sequence.

    Raises:
        TypeError: there is none.
    """
    candidates = [outputs]
    if isinstance(outputs, Mapping):
        candidates.append(outputs.get("loss"))
    elif isinstance(outputs, Sequence) and outputs:
        candidates.append(outputs[0])
    candidates.append(getattr(outputs, "loss", None))
    for candidate in candidates:
        if isinstance(candidate, Tensor) and candidate.numel() == 1:
            return candidate
    raise TypeError(
        f"train_batch() found no loss in the model's output ({type(outputs).__name__}): return a scalar tensor, a "
        "mapping or object with 'loss', or a tuple that starts with it"
    )


def micro_batches(source: Any, count: int) -> Iterator[Any]:
    """`count` micro-batches: the next ones of an iterator, or the parts of one batch along dimension 0.

    Raises:
        ValueError: the iterator ends early, or a tensor of the batch does not divide.
        TypeError: there are no tensors to divide.
    """
    if isinstance(source, Iterator):
        for i in range(count):
            try:
                yield next(source)
            except StopIteration:
                raise ValueError(f"the iterator ended after {i} of the {count} micro-batches of a step") from None
        return
    if count == 1:
        yield source
        return
    # Mappings that pytree does not know (a tokenizer's output) would count as one leaf.
    leaves, structure = pytree.tree_flatten(dict(source) if isinstance(source, Mapping) else source)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise TypeError(
            f"a {type(source).__name__} without tensors in it cannot be divided into {count} micro-batches "
            "(gradient_accumulation_steps): give train_batch() tensors, or an iterator over micro-batches"
        )
    for leaf in leaves:
        if isinstance(leaf, Tensor) and (leaf.dim() == 0 or leaf.shape[0] % count):
            raise ValueError(
                f"a tensor of shape {tuple(leaf.shape)} in the batch does not divide into {count} micro-batches "
                "(gradient_accumulation_steps) along dimension 0"
            )
    for i in range(count):
        yield pytree.tree_unflatten(
            [leaf.chunk(count)[i] if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure
        )
