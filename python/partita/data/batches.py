"""How batches reach a model, and where the loss is in what comes out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from partita.data.loader import ShardedLoader


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
    what = f"{type(outputs).__name__} of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else ""
    raise TypeError(
        f"train_batch() found no loss in the model's output ({what or type(outputs).__name__}): return a scalar "
        "tensor, a mapping or object with 'loss', or a tuple that starts with it; where the program computes the loss, "
        "call engine(...), engine.backward(loss) and engine.step()"
    )


class Reading:
    """Where a program is in the loaders that it gives again at every step."""

    def __init__(self) -> None:
        self._iterators: WeakKeyDictionary[DataLoader[Any], Iterator[Any]] = WeakKeyDictionary()

    def source(self, batch: Any, data_iter: Any, call: str) -> Any:
        """What `micro_batches` takes: a loader becomes an iterator that goes on where it was, over epochs.

        Raises:
            TypeError: both a batch and `data_iter` are given, or `data_iter` would begin anew; names the `call`.
        """
        if batch is not None and data_iter is not None:
            raise TypeError(f"{call}() takes a batch or data_iter, not both")
        given = batch if data_iter is None else data_iter
        if isinstance(given, ShardedLoader):
            return iter(given.next_batch, object())  # nothing equals the object, so this never ends
        if isinstance(given, DataLoader):
            return self._epochs(given)
        if data_iter is not None and not isinstance(data_iter, Iterator):
            raise TypeError(
                f"{call}(): data_iter is a {type(data_iter).__name__}, which would begin anew at every call: give a "
                "DataLoader, or make an iterator once, by iter() or partita.RepeatingLoader()"
            )
        return given

    def _epochs(self, loader: DataLoader[Any]) -> Iterator[Any]:
        while True:
            if loader not in self._iterators:
                self._iterators[loader] = iter(loader)
                count = 0
            else:
                count = 1  # of an epoch that had batches
            for batch in self._iterators[loader]:
                count += 1
                yield batch
            del self._iterators[loader]
            if not count:
                raise ValueError(f"an epoch of the {type(loader).__name__} has no batches (is the data set empty?)")


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
                raise ValueError(
                    f"the iterator ended after {i} of the {count} micro-batches of a step "
                    "(gradient_accumulation_steps): partita.RepeatingLoader(loader) goes on with the next epoch, and "
                    "engine.zero_grad() drops what has come so far"
                ) from None
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
