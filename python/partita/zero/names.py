"""The names of a model's tensors, on all ranks that have some of its layers, and how weights go with them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from partita.comm import Communicator, text_by_rank

NAMED = 5  # differences in one message

Shapes = Mapping[str, tuple[int, ...]]


class ModelNames:
    """The tensors of a model by name. A tensor may have several names, and a rank of a pipeline may have a replica.

    Args:
        told: (name, shape, name of what is the same tensor) of each, of all ranks, in the order of the model.

    Attributes:
        shapes: by name.
    """

    def __init__(self, told: Iterable[Sequence[Any]]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._same: dict[str, list[str]] = {}
        for name, shape, first in told:
            self.shapes[name] = tuple(shape)
            self._same.setdefault(first, []).append(name)

    def sources(self, there: Collection[str]) -> dict[str, str]:
        """For each name that gets values, the one of these names from which it gets them: the last of a tensor's."""
        found: dict[str, str] = {}
        for names in self._same.values():
            having = [name for name in names if name in there]
            if having:
                found.update((name, having[-1]) for name in names)
        return found

    def misfit(self, shapes: Shapes, strict: bool) -> ValueError | None:
        """Says what keeps weights of these shapes from being loaded; None: nothing."""
        problems = []
        if strict:
            sources = self.sources(shapes.keys())
            problems += [f"'{name}' is missing" for name in self.shapes if name not in sources]
            problems += [f"'{name}' is not in the model" for name in shapes if name not in self.shapes]
        problems += [
            f"'{name}' has shape {shapes[name]}, in the model {own}"
            for name, own in self.shapes.items()
            if name in shapes and shapes[name] != own
        ]
        if problems:
            more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
            return ValueError(f"the weights do not fit the model: {'; '.join(problems[:NAMED])}{more}")
        return None


def names_of_all(pipe: Communicator, tensors: Mapping[str, Tensor], replicas: Mapping[str, str]) -> ModelNames:
    """The tensors of all ranks. A collective.

    Args:
        pipe: ranks that have the whole model together.
        tensors: of this rank.
        replicas: tensors of this rank that belong to another part of the model: name here -> name there.
    """
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    own = [(name, tuple(t.shape), replicas.get(first[id(t)], first[id(t)])) for name, t in tensors.items()]
    if pipe.world_size == 1:
        return ModelNames(own)
    from partita.checkpoint.places import layer_of  # with pydantic, which `import partita` leaves out

    told = [entry for text in text_by_rank(pipe, json.dumps(own)) for entry in json.loads(text)]
    return ModelNames(sorted(told, key=lambda entry: layer_of(entry[0])))
