"""The names that the tensors of a model have in files, on this rank and on all ranks of a pipeline together."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from partita.checkpoint.agreement import together
from partita.checkpoint.layout import TensorSpec
from partita.checkpoint.places import MODEL, OPTIMIZER, PARAMETER, Place, dtype_name, layer_of
from partita.comm import text_by_rank
from partita.model import TrainState


def stored_names(state: TrainState, what: str) -> StoredNames:
    """The names of the tensors of all ranks. A collective.

    Args:
        what: has failed where this raises; begins the message.

    Raises:
        CheckpointError: a rank has something that has no place in files, or two ranks have one name; on all ranks.
    """
    own = together(state.world, what, lambda: OwnNames(state))
    by_rank = [json.loads(text) for text in text_by_rank(state.pipe, json.dumps(own.told()))]
    return together(state.world, what, lambda: StoredNames(own, by_rank))


class OwnNames:
    """The names that this rank's tensors have in files: those of the state dict, where that has them.

    Buffers that the state dict leaves out are in no file: a module makes them itself.

    Attributes:
        aliases: other names of tensors that a state dict has several times, with the name that is stored.
        specs: of the model's tensors: those of its state dict, in its order, and the parameters that it leaves out.
        buffers: of the state dict, by stored name.
        parameters: the place of each, by the name in the model.

    Raises:
        ValueError: the state dict has something that is neither a parameter of this run nor a buffer, a buffer that
            could not be loaded, or a parameter of this run is gone; names it.
    """

    def __init__(self, state: TrainState) -> None:
        self.aliases: dict[str, str] = {}
        self.specs: list[tuple[Place, TensorSpec]] = []
        self.buffers: dict[str, Tensor] = {}
        self._replicas, self._frozen = state.replicas(), state.frozen()
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
        self.parameters: dict[str, Place] = {}
        for name, parameter in parameters.items():
            stored = names.get(id(parameter))
            place = Place(OPTIMIZER, f"{PARAMETER}/{name}") if stored is None else Place(MODEL, stored)
            self.parameters[name] = place
            if stored is None:
                self.specs.append((place, _spec(place.name, parameter)))
        by_name = Counter(place.name for place in self.parameters.values())
        twice = next((name for name, count in by_name.items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"two parameters would have the name '{twice}' in files: rename one of them")

    def told(self) -> dict[str, Any]:
        """What other ranks learn, as JSON has it."""
        return {
            "specs": [(place.stem, spec.name, spec.dtype, spec.shape) for place, spec in self.specs],
            "aliases": self.aliases,
            "parameters": {name: (place.stem, place.name) for name, place in self.parameters.items()},
            "frozen": sorted(self._frozen),
            "replicas": self._replicas,
        }


class StoredNames:
    """The names that the tensors of all ranks have in files. A replica has the name of what it is a replica of.

    Args:
        own: of this rank.
        by_rank: what each rank of the pipeline has told.

    Attributes:
        specs: of the model's tensors, in the order of the whole model.
        aliases: other names of these tensors, with the name that is stored.
        parameters: those of these tensors that are parameters, by the name in the model.
        renamed: names that parameters have in the model, with those in files, where they differ.
        frozen: the parameters that are not trained.
        buffers: this rank's, with the place of each in files.

    Raises:
        ValueError: two ranks have a tensor of one name, or a replica is one of nothing; names it.
    """

    def __init__(self, own: OwnNames, by_rank: Sequence[dict[str, Any]]) -> None:
        self.parameters = {
            name: Place(*place)
            for told in by_rank
            for name, place in told["parameters"].items()
            if name not in told["replicas"]
        }
        self._owners: dict[Place, Place] = {}  # of replicas
        for told in by_rank:
            for name, owner in told["replicas"].items():
                replica = Place(*told["parameters"].get(name, (MODEL, name)))
                self._owners[replica] = self.parameters.get(owner, Place(MODEL, owner))
        self.specs = _in_layer_order(by_rank, self._owners)
        self.aliases = {place.name: owner.name for place, owner in self._owners.items() if owner.stem == MODEL}
        for told in by_rank:
            for name, first in told["aliases"].items():
                place = self._owners.get(Place(MODEL, first), Place(MODEL, first))
                if place.stem == MODEL:
                    self.aliases[name] = place.name
        self.renamed = {name: place.name for name, place in self.parameters.items() if place.name != name}
        frozen = {name for told in by_rank for name in told["frozen"]}
        self.frozen = {place for name, place in self.parameters.items() if name in frozen}
        self.buffers = {name: (self._stored(Place(MODEL, name)), value) for name, value in own.buffers.items()}
        self._own = own.parameters

    def of_parameter(self, name: str) -> Place:
        """Where a parameter of this rank, which has this name in the model, is."""
        return self._stored(self._own[name])

    def is_replica(self, name: str) -> bool:
        """Whether another part keeps and writes this parameter of this rank."""
        return self._own[name] in self._owners

    def _stored(self, place: Place) -> Place:
        return self._owners.get(place, place)


def _in_layer_order(by_rank: Sequence[dict[str, Any]], owners: Mapping[Place, Place]) -> dict[Place, TensorSpec]:
    """The tensors of all ranks as the whole model has them: the number of a layer begins a name."""
    found: dict[Place, TensorSpec] = {}
    for told in by_rank:
        for stem, name, dtype, shape in told["specs"]:
            place = Place(stem, name)
            if place in owners:
                continue
            if place in found:
                raise ValueError(f"two ranks of the pipeline have a tensor '{name}' each: give them different names")
            found[place] = TensorSpec(name, dtype, tuple(shape))
    for replica, owner in owners.items():
        if owner not in found:
            raise ValueError(f"'{replica.name}' is a replica of '{owner.name}', which no rank of the pipeline has")
    if len(by_rank) == 1:
        return found
    return dict(sorted(found.items(), key=lambda item: layer_of(item[1].name)))


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
