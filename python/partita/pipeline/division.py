"""Which layers are in which stage, and what stages take from each other: pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from partita.pipeline.layers import Layer, layer_name, parameter_shapes
from partita.pipeline.partition import balanced

METHODS = '"parameters", "uniform", "type:regex" and "cost"'


@dataclass(frozen=True)
class Division:
    """A division of layers into stages, and of stages over ranks.

    Attributes:
        stage_ranks: the pipe rank of each stage.
        bounds: the layers of each stage.
        skips: for a layer the earlier layers whose outputs it takes beside that of the one before it.
    """

    stage_ranks: tuple[int, ...]
    bounds: tuple[range, ...]
    skips: Mapping[int, tuple[int, ...]]

    @property
    def skip_edges(self) -> set[tuple[int, int]]:
        """Pairs of stages, the second of which takes something from the first beside the chain."""
        stages = range(len(self.bounds))
        return {(a, b) for b in stages for a in range(b) if self.carried(a, b)}

    def carried(self, a: int, b: int) -> list[int]:
        """Layers of stage `a` whose outputs stage `b` takes beside the chain.

        The last layer of the stage before is not among them: its output is what comes by the chain.
        """
        by_chain = self.bounds[b].start - 1
        taken = {source for layer in self.bounds[b] for source in self.skips.get(layer, ())}
        return sorted(source for source in taken if source in self.bounds[a] and source != by_chain and a != b)

    def kept(self, stage: int) -> list[int]:
        """Layers of a stage whose outputs other stages take beside the chain."""
        later = range(stage + 1, len(self.bounds))
        return sorted({layer for b in later for layer in self.carried(stage, b)})


def divide(
    weights: Sequence[float], stage_ranks: Sequence[int], num_stages: int, skips: Mapping[int, tuple[int, ...]]
) -> Division:
    """Layers in stages of about the same weight.

    Raises:
        ValueError: there are more stages than layers, or stages that do not go around the ranks; says what there is.
    """
    ranks = tuple(stage_ranks)
    if set(ranks) != set(range(num_stages)):
        raise ValueError(
            f"PipelineModule: stage_ranks is {list(ranks)}: with num_stages = {num_stages} it has every rank from 0 to "
            f"{num_stages - 1}, and no other"
        )
    if len(ranks) > len(weights):
        raise ValueError(
            f"PipelineModule: {len(weights)} layers do not make {len(ranks)} stages (num_stages = {num_stages}, "
            f"{len(ranks) // num_stages} on each rank): each stage has at least one layer"
        )
    return Division(ranks, tuple(balanced(weights, len(ranks))), skips)


def layer_weights(layers: Sequence[Layer], method: str, layer_costs: Sequence[float] | None) -> list[float]:
    """What each layer counts when layers are divided into stages.

    Args:
        method: "parameters": the parameters of a layer that are trained; "uniform": all alike; "type:regex": layers
            whose class has a name in which the expression is found, whatever the case; "cost": `layer_costs`.

    Raises:
        ValueError: names the method, and what is wrong with it.
    """
    kind, _, expression = str(method).partition(":")
    kind = kind.lower()
    if layer_costs is not None and kind != "cost":
        raise ValueError(f'PipelineModule: layer_costs is for partition_method="cost", and it is "{method}"')
    if kind == "uniform":
        return [1.0] * len(layers)
    if kind == "parameters":
        return [float(sum(p.numel for p in parameter_shapes(layer) if p.requires_grad)) for layer in layers]
    if kind == "type":
        return _of_type(layers, expression)
    if kind == "cost":
        return _costs(layers, layer_costs)
    raise ValueError(f'PipelineModule: partition_method is "{method}": there are {METHODS}')


def _of_type(layers: Sequence[Layer], expression: str) -> list[float]:
    try:
        pattern = re.compile(expression, re.IGNORECASE)
    except re.error as error:
        raise ValueError(
            f'PipelineModule: partition_method is "type:{expression}", whose expression is none: {error}'
        ) from None
    weights = [1.0 if pattern.search(layer_name(layer)) else 0.0 for layer in layers]
    if not any(weights):
        names = ", ".join(sorted({layer_name(layer) for layer in layers}))
        raise ValueError(f'PipelineModule: partition_method is "type:{expression}": no layer of {names} matches')
    return weights


def _costs(layers: Sequence[Layer], layer_costs: Sequence[float] | None) -> list[float]:
    if layer_costs is None:
        raise ValueError(
            'PipelineModule: partition_method is "cost", and layer_costs is missing: give the time of each layer, as '
            "partita.pipeline.measure_layers() finds it"
        )
    if len(layer_costs) != len(layers) or any(not 0 <= cost < float("inf") for cost in layer_costs):
        raise ValueError(
            f"PipelineModule: layer_costs has {len(layer_costs)} numbers for {len(layers)} layers: give one for each "
            "layer, from 0 on, in any unit"
        )
    return [float(cost) for cost in layer_costs]


def check_skips(skips: Mapping[int, Sequence[int]], num_layers: int) -> dict[int, tuple[int, ...]]:
    """Skip connections, each from a layer to a later one.

    Raises:
        ValueError: names the layer, and what it cannot take.
    """
    checked = {}
    for layer, sources in skips.items():
        if isinstance(sources, int):
            raise ValueError(
                f"PipelineModule: skips has {layer}: {sources}: give a list of layers, {layer}: [{sources}]"
            )
        given = tuple(sources)
        for source in given:
            if not (0 <= source < layer - 1 and layer < num_layers):
                raise ValueError(
                    f"PipelineModule: skips has {layer}: {list(given)}: of {num_layers} layers, a layer takes outputs "
                    "of layers before the previous one, whose output it gets anyway"
                )
        if len(set(given)) < len(given):
            raise ValueError(f"PipelineModule: skips has {layer}: {list(given)}: name each layer once")
        checked[layer] = given
    return checked
