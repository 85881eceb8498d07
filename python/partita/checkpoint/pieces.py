"""What a training state puts into files: named tensors, and the part of each that this rank writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from partita.checkpoint.layout import TensorSpec
from partita.model import DTYPE_NAMES, WEIGHT, Quantity, TrainState
from partita.units import Slot, Unit

MODEL, OPTIMIZER = "model", "optimizer"  # what the names of files begin with
REMAINDER, PARAMETER = "remainder", "parameter"
RESERVED = (WEIGHT, REMAINDER, PARAMETER)  # what an optimizer's own quantities cannot be called


@dataclass(frozen=True)
class Place:
    """A tensor in a checkpoint: in which files it is, and its name there."""

    stem: str
    name: str


@dataclass(frozen=True)
class Piece:
    """A run of elements of a tensor that this rank writes.

    shape: of the whole tensor. first: of the run in the flattened tensor. values: flat, contiguous; only
    an update changes them, or who writes into parameters.
    """

    place: Place
    shape: tuple[int, ...]
    first: int
    values: Tensor

    @property
    def is_weight(self) -> bool:
        """Whether it is of the model, as it computes or as it is kept beside that; otherwise the optimizer's alone."""
        return self.place.stem == MODEL or self.place.name.partition("/")[0] in RESERVED

    @property
    def spec(self) -> TensorSpec:
        """Of the whole tensor."""
        return TensorSpec(self.place.name, dtype_name(self.values.dtype), self.shape)


class StoredNames:
    """The names that the model's tensors have in files: those of its state dict, where that has them.

    Buffers that the state dict leaves out are in no file: a module makes them itself.

    Attributes:
        aliases: other names of tensors that a state dict has several times, with the name that is stored.
        specs: of the model's tensors: those of its state dict, in its order, and the parameters that it leaves out.
        buffers: of the state dict, by stored name.
        renamed: names that parameters have in the model, with those in files, where they differ.

    Raises:
        ValueError: the state dict has something that is neither a parameter of this run nor a buffer, a buffer that
            could not be loaded, or a parameter of this run is gone; names it.
    """

    def __init__(self, state: TrainState) -> None:
        self.aliases: dict[str, str] = {}
        self.specs: list[tuple[Place, TensorSpec]] = []
        self.buffers: dict[str, Tensor] = {}
        parameters = state.parameters()
        _require_same_parameters(parameters, state)
        buffers = {id(buffer) for buffer in state.buffers().values()}
        known = {id(parameter) for parameter in parameters.values()} | buffers
        names: dict[int, str] = {}  # by the identity of a parameter or a buffer
        for module in state.modules:
            values: dict[str, Any] = module.state_dict(keep_vars=True)
            for name, value in values.items():
                _require_known(name, value, known)
                first = names.setdefault(id(value), name)
                if first != name:
                    self.aliases[name] = first
                    continue
                self.specs.append((Place(MODEL, name), _spec(name, value)))
                if id(value) in buffers:
                    _require_writable(name, value)
                    self.buffers[name] = value
        self._parameters: dict[str, Place] = {}
        for name, parameter in parameters.items():
            stored = names.get(id(parameter))
            place = Place(OPTIMIZER, f"{PARAMETER}/{name}") if stored is None else Place(MODEL, stored)
            self._parameters[name] = place
            if stored is None:
                self.specs.append((place, _spec(place.name, parameter)))
        by_name = Counter(place.name for place in self._parameters.values())
        twice = next((name for name, count in by_name.items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"two parameters would have the name '{twice}' in files: rename one of them")
        self.renamed = {name: place.name for name, place in self._parameters.items() if place.name != name}

    def of_parameter(self, name: str) -> Place:
        """Where a parameter of this name in the model is."""
        return self._parameters[name]


def _require_known(name: str, value: Any, known: set[int]) -> None:
    where = f"'{name}' in the model's state dict"
    if not isinstance(value, Tensor):
        raise ValueError(f"{where} is a {type(value).__name__} and no tensor: keep it in a buffer, or in client_state")
    if id(value) not in known:
        made = "get_extra_state()" if name.endswith("_extra_state") else "a hook of state_dict()"
        raise ValueError(
            f"{where} is neither a parameter nor a buffer of the model, but made by {made}: a checkpoint could not "
            "give it back. Keep it in a buffer, or in client_state"
        )


def _require_writable(name: str, buffer: Tensor) -> None:
    """Refuses a buffer into which nothing can be loaded. A save refuses it too: it could not be loaded into this model
    later."""
    why = ""
    if buffer.layout is not torch.strided:
        why = f"has the layout {buffer.layout}"
    elif buffer.is_inference():
        why = "was made in torch.inference_mode()"
    elif any(stride == 0 and n > 1 for stride, n in zip(buffer.stride(), buffer.shape, strict=True)):
        why = "has elements that share memory, as expand() makes them"
    if why:
        raise ValueError(
            f"the buffer '{name}' {why}, so a checkpoint cannot be loaded into it: make it of ordinary memory (clone() "
            "it), or register it with persistent=False"
        )


def _require_same_parameters(parameters: Mapping[str, nn.Parameter], state: TrainState) -> None:
    """The model must have the parameters that the engine took: others are not trained, and would be missing."""
    taken = {id(parameter) for parameter in parameters.values()}
    here = {id(p): name for module in state.modules for name, p in module.named_parameters()}
    added = next((name for key, name in here.items() if key not in taken), None)
    if added is not None:
        raise ValueError(
            f"the parameter '{added}' was added to the model, or replaced, after the engine was made: the engine does "
            "not have it. Change models before that, and write into parameters that are there"
        )
    gone = next((name for name, p in parameters.items() if id(p) not in here), None)
    if gone is not None:
        raise ValueError(
            f"the parameter '{gone}' was taken from the model, or replaced, after the engine was made, which still has "
            "it: change models before that"
        )


def _spec(name: str, value: Tensor) -> TensorSpec:
    return TensorSpec(name, dtype_name(value.dtype), tuple(value.shape))


def dtype_name(dtype: torch.dtype) -> str:
    """In a file's header; another dtype is refused by its own name when files are laid out."""
    return DTYPE_NAMES.get(dtype, str(dtype))


def stem_of(file: str) -> str:
    """What the name of a .safetensors file begins with."""
    return file.removesuffix(".safetensors").partition("-")[0]


def of_quantity(name: str, parameter: Place) -> Place:
    """Where a quantity of a parameter is."""
    return Place(OPTIMIZER, f"{name}/{parameter.name}")


def pieces(state: TrainState, names: StoredNames) -> Iterator[Piece]:
    """What this rank writes. Together the ranks write each element of each tensor once.

    Raises:
        ValueError: the optimizer keeps something under a name that files cannot have for it; names it.
    """
    for quantity in state.quantities():
        if isinstance(quantity.unit, Unit):
            _require_plain(quantity.unit.states)
        yield from _pieces_of(quantity, names)
    rank, world_size = state.world.rank, state.world.world_size
    for name, tensor in state.untrained().items():
        begin, end = (tensor.numel() * r // world_size for r in (rank, rank + 1))
        flat = tensor.contiguous().view(-1)
        yield Piece(names.of_parameter(name), tuple(tensor.shape), begin, flat[begin:end])
    if rank == 0:
        for name, tensor in names.buffers.items():
            # A copy: forwards change buffers. The bits of a conjugate view are not those of its memory.
            values = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format).view(-1)
            yield Piece(Place(MODEL, name), tuple(tensor.shape), 0, values)


def _require_plain(kept: Iterable[Any]) -> None:
    for key in kept:
        if not isinstance(key, str) or not key or "/" in key or key in RESERVED:
            raise ValueError(
                f"the optimizer keeps a value of each element under {key!r}: checkpoints need a text without '/' that "
                f"is none of {', '.join(RESERVED)}. Rename it in the optimizer"
            )


def _pieces_of(quantity: Quantity, names: StoredNames) -> Iterator[Piece]:
    for kind, flat in quantity.stored().items():
        for slot, first, where in shares(quantity):
            parameter = names.of_parameter(slot.name)
            place = of_quantity(kind, parameter) if kind else parameter
            yield Piece(place, slot.shape, first, flat[where])


def shares(quantity: Quantity) -> Iterator[tuple[Slot, int, slice]]:
    """What this rank writes of each parameter: the first of the elements in the parameter, and where they are in the
    quantity. In stage 0 all ranks have everything, and each writes its shard."""
    unit = quantity.unit
    shard = unit.layout.shard_range(unit.communicator.rank)
    for s in quantity.slices:
        start = unit.own.start + s.shard_offset
        begin, end = max(start, shard.start), min(start + s.numel, shard.stop)
        if begin < end:
            yield s.slot, s.parameter_offset + begin - start, slice(begin - unit.own.start, end - unit.own.start)
