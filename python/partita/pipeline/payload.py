"""What stages hand to each other: tensors in tuples, lists and dicts, described once and sent as one message."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

ALIGNMENT = 64  # bytes, of the tensors in a message
HEADER_BYTES = 8192
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class Leaf:
    """A tensor of a payload. is_differentiable: its gradient comes back."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    is_differentiable: bool

    @property
    def nbytes(self) -> int:
        """Of its values."""
        return prod(self.shape) * self.dtype.itemsize


HEADER = Leaf(torch.uint8, (HEADER_BYTES,), is_differentiable=False)


@dataclass(frozen=True)
class Form:
    """What a payload is, without the values of its tensors.

    structure: how leaves are put together. leaves: tensors, and other values as they are.
    """

    structure: pytree.TreeSpec
    leaves: tuple[Any, ...]

    @property
    def tensors(self) -> list[Leaf]:
        """The tensors, in their order."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Leaf)]

    @cached_property
    def gradients(self) -> list[Leaf]:
        """The tensors whose gradients come back."""
        return [leaf for leaf in self.tensors if leaf.is_differentiable]

    def put_together(self, tensors: Sequence[Tensor]) -> Any:
        """The payload with these tensors."""
        left = iter(tensors)
        values = [next(left) if isinstance(leaf, Leaf) else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(values, self.structure)

    def to_header(self) -> Tensor:
        """The form as HEADER_BYTES bytes on the CPU.

        Raises:
            ValueError: the form is too large.
            TypeError: it has other containers than tuples, lists and dicts.
        """
        try:
            structure = pytree.treespec_dumps(self.structure)
        except NotImplementedError as error:
            raise TypeError(
                f"a stage hands on a container that cannot be described ({error}): use tuples, lists and dicts"
            ) from None
        if not _is_described_by(structure, self.structure):
            raise TypeError(
                f"a stage hands on a container that cannot be described ({self.structure}): keys of dicts are texts or "
                "numbers"
            )
        text = json.dumps([structure, [_described(leaf) for leaf in self.leaves]]).encode()
        if len(text) > HEADER_BYTES - _LENGTH_BYTES:
            raise ValueError(
                f"a stage hands on {len(self.leaves)} values, whose description has {len(text)} bytes; there is room "
                f"for {HEADER_BYTES - _LENGTH_BYTES}: put several tensors into one"
            )
        data = len(text).to_bytes(_LENGTH_BYTES, "little") + text
        return torch.frombuffer(bytearray(data.ljust(HEADER_BYTES, b"\0")), dtype=torch.uint8)


def _is_described_by(text: str, structure: pytree.TreeSpec) -> bool:
    """Whether a reader of the text gets the structure; keys that are tuples come back as lists, say."""
    try:
        return bool(pytree.treespec_loads(text) == structure)
    except TypeError:
        return False


def form_of_header(header: Tensor) -> Form:
    """The reverse of `Form.to_header`."""
    data = header.numpy().tobytes()
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    structure, leaves = json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + length])
    return Form(pytree.treespec_loads(structure), tuple(_leaf(described) for described in leaves))


def taken_apart(payload: Any) -> tuple[Form, list[Tensor]]:
    """The form of a payload, and its tensors.

    Raises:
        TypeError: it has something else than tensors, numbers and texts; names it.
    """
    values, spec = pytree.tree_flatten(payload)
    leaves: list[Any] = []
    tensors: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            if value.layout is not torch.strided:
                raise TypeError(
                    f"a stage hands on a tensor of layout {value.layout}: layers at the border of a stage return dense "
                    "ones, .to_dense()"
                )
            leaves.append(Leaf(value.dtype, tuple(value.shape), value.requires_grad))
            tensors.append(value)
        elif value is None or type(value) in (bool, int, float, str):
            leaves.append(value)
        else:
            raise TypeError(
                f"a stage hands on a {type(value).__name__}: layers at the border of a stage take and return tensors, "
                "numbers and texts, in tuples, lists and dicts"
            )
    return Form(spec, tuple(leaves)), tensors


def message_bytes(leaves: Sequence[Leaf]) -> int:
    """The size of a message with these tensors."""
    return sum(_padded(leaf.nbytes) for leaf in leaves)


def room_in(memory: Tensor, leaves: Sequence[Leaf]) -> Tensor:
    """Memory for a message with these tensors, in at least as many bytes."""
    if len(leaves) == 1:
        return memory[: leaves[0].nbytes].view(leaves[0].dtype).view(leaves[0].shape)
    return memory[: message_bytes(leaves)]


def fill(message: Tensor, leaves: Sequence[Leaf], tensors: Sequence[Tensor]) -> None:
    """Writes tensors into a message."""
    for place, tensor in zip(tensors_in(message, leaves), tensors, strict=True):
        place.copy_(tensor.detach())


def room_for(leaves: Sequence[Leaf], device: torch.device) -> Tensor:
    """New memory for a message with these tensors."""
    return room_in(torch.empty(message_bytes(leaves), dtype=torch.uint8, device=device), leaves)


def tensors_in(message: Tensor, leaves: Sequence[Leaf]) -> list[Tensor]:
    """The tensors of a message, in its memory. For autograd, a write into one is none into another."""
    if len(leaves) == 1:
        return [message]
    tensors, begin = [], 0
    for leaf in leaves:
        part = message[begin : begin + leaf.nbytes].view(leaf.dtype).view(leaf.shape)
        alias = torch.empty(0, dtype=leaf.dtype, device=message.device)
        tensors.append(alias.set_(part))  # type: ignore[call-overload]
        begin += _padded(leaf.nbytes)
    return tensors


def classes_of(inputs: Sequence[Any]) -> list[int]:
    """Of each micro-batch's inputs: those whose tensors have the same shapes and dtypes are of one class."""
    numbers: dict[tuple[Any, ...], int] = {}
    classes = []
    for values in inputs:
        form = tuple((tensor.dtype, tuple(tensor.shape)) for tensor in tensors_of(values))
        classes.append(numbers.setdefault(form, len(numbers)))
    return classes


def tensors_of(values: Any) -> list[Tensor]:
    """The tensors of a program's data, in mappings that pytree does not know (a tokenizer's output), too."""
    leaves = pytree.tree_leaves(values)
    tensors: list[Tensor] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
        elif isinstance(leaf, Mapping):
            tensors += tensors_of(dict(leaf))
    return tensors


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _described(leaf: Any) -> Any:
    if not isinstance(leaf, Leaf):
        return {"value": leaf}
    return [str(leaf.dtype).removeprefix("torch."), leaf.shape, leaf.is_differentiable]


def _leaf(described: Any) -> Any:
    if isinstance(described, dict):
        return described["value"]
    dtype, shape, is_differentiable = described
    return Leaf(getattr(torch, dtype), tuple(shape), is_differentiable)
