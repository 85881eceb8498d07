"""The stages of a rank: the layers that are there are built, or copied where another stage has them too."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from torch import nn

from partita.pipeline.division import Division
from partita.pipeline.layers import Layer, LayerSpec, TiedLayerSpec, seeded
from partita.pipeline.shared import LOSS, own_copies
from partita.pipeline.stage import Checkpoints, Stage


def build_stages(
    division: Division,
    here: Iterable[int],
    layers: Sequence[Layer],
    loss_fn: Callable[..., Any] | None,
    seed: int,
    checkpoints: Checkpoints,
) -> dict[int, Stage]:
    """Some stages by number.

    Args:
        here: the numbers of the stages.
        seed: layer i is built under `seed + i`, so that its values do not depend on the division. Tied layers are built
            under the seed of the first one of their key.
    """
    stages: dict[int, Stage] = {}
    taken: set[int] = set()  # parameters of the stages before
    last = len(division.bounds) - 1
    for number in sorted(here):
        loss = loss_fn if number == last else None
        built = _build_layers(division.bounds[number], layers, seed)
        given = {str(i): layer for i, layer in built.items() if isinstance(layer, nn.Module)}
        if isinstance(loss, nn.Module):
            given[LOSS] = loss
        modules = own_copies(given, taken)
        taken |= {id(parameter) for module in modules.values() for parameter in module.parameters()}
        stages[number] = Stage(
            number,
            {i: modules.get(str(i), layer) for i, layer in built.items()},
            _functions(built, layers),
            division.skips,
            division.kept(number),
            modules.get(LOSS, loss),
            checkpoints,
        )
    return stages


def _build_layers(bounds: range, layers: Sequence[Layer], seed: int) -> dict[int, nn.Module | Callable[..., Any]]:
    built: dict[int, nn.Module | Callable[..., Any]] = {}
    tied: dict[str, nn.Module] = {}
    for i in bounds:
        layer = layers[i]
        if isinstance(layer, TiedLayerSpec):
            if layer.key not in tied:
                place, first = next((k, spec) for k, spec in _tied(layers) if spec.key == layer.key)
                tied[layer.key] = _build(first, seed + place)
            built[i] = tied[layer.key]
        elif isinstance(layer, LayerSpec):
            built[i] = _build(layer, seed + i)
        else:
            built[i] = layer
    return built


def _tied(layers: Sequence[Layer]) -> Iterable[tuple[int, TiedLayerSpec]]:
    return ((i, layer) for i, layer in enumerate(layers) if isinstance(layer, TiedLayerSpec))


def _functions(here: Collection[int], layers: Sequence[Layer]) -> dict[int, Callable[..., Any]]:
    """What is called in place of modules."""
    return {i: spec.forward_fn for i, spec in _tied(layers) if i in here and spec.forward_fn is not None}


def _build(spec: LayerSpec, seed: int) -> nn.Module:
    with seeded(seed):
        return spec.build()
