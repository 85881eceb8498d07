"""Parameters that several layers have: which stages have a copy of them."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from partita.pipeline.division import Division
from partita.pipeline.layers import Layer, TiedLayerSpec, parameter_shapes

LOSS = "loss_fn"  # the name of a loss that is a module, beside the layers of the last stage


@dataclass(frozen=True)
class Tie:
    """Parameters that some stages have, each a copy of its own. Frozen ones are among them.

    Attributes:
        stages: ascending. The first one's copies are the values at the beginning, and the ones that are saved.
        names: by stage the names of the parameters, in one order.
    """

    stages: tuple[int, ...]
    names: Mapping[int, Sequence[str]]


def find_ties(division: Division, layers: Sequence[Layer], loss_fn: object) -> list[Tie]:
    """Of all parameters that several stages have. The same on every rank."""
    where: dict[Hashable, dict[int, str]] = {}  # by parameter: its first name in each stage
    keys: dict[str, list[str]] = {}
    for stage, bounds in enumerate(division.bounds):
        for i in bounds:
            for identity, name in _parameters(layers[i], keys):
                where.setdefault(identity, {}).setdefault(stage, f"{i}.{name}")
    for identity, name in _parameters(loss_fn, keys):
        where.setdefault(identity, {}).setdefault(len(division.bounds) - 1, f"{LOSS}.{name}")
    grouped: dict[tuple[int, ...], dict[int, list[str]]] = {}
    for names in where.values():
        if len(names) > 1:
            of_stages = grouped.setdefault(tuple(sorted(names)), {stage: [] for stage in sorted(names)})
            for stage, name in names.items():
                of_stages[stage].append(name)
    return [Tie(stages, names) for stages, names in grouped.items()]


def _parameters(layer: object, keys: dict[str, list[str]]) -> Iterable[tuple[Hashable, str]]:
    """What a parameter is the same as, and its name in the layer. A plain spec's parameters are its own."""
    if isinstance(layer, nn.Module):
        return [(id(parameter), name) for name, parameter in layer.named_parameters()]
    if isinstance(layer, TiedLayerSpec):
        if layer.key not in keys:
            keys[layer.key] = [shape.name for shape in parameter_shapes(layer)]
        return [((layer.key, name), name) for name in keys[layer.key]]
    return ()


def find_replicas(ties: Iterable[Tie], stages: Iterable[int]) -> dict[str, str]:
    """For these stages, the names of copies that are not the first, with the names in the stage whose copy is."""
    here = set(stages)
    return {
        name: first
        for tie in ties
        for stage in tie.stages[1:]
        if stage in here
        for name, first in zip(tie.names[stage], tie.names[tie.stages[0]], strict=True)
    }


def own_copies(modules: Mapping[str, nn.Module], taken: set[int]) -> dict[str, nn.Module]:
    """Modules of a stage in which no parameter is one of another stage.

    Args:
        modules: by name.
        taken: ids of the parameters that other stages of this process have. Modules that have some of them are copied;
            what they share with each other, the copies share. Parameters of one stage only are not copied.
    """
    shared = {name: m for name, m in modules.items() if any(id(p) in taken for p in m.parameters())}
    memo = {id(p): p for module in shared.values() for p in module.parameters() if id(p) not in taken}
    return {**modules, **copy.deepcopy(shared, memo)}
