"""A stage of a pipeline: a run of layers, on one rank."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from partita.pipeline.shared import LOSS


@dataclass(frozen=True)
class Checkpoints:
    """Which activations are computed again in backward.

    Attributes:
        interval: of so many layers, only what goes into the first one is kept; 0: everything is kept.
        classes: names of classes; runs in which a layer is of another class are not checkpointed. None: of any class.
    """

    interval: int = 0
    classes: frozenset[str] | None = None


class Stage(nn.Sequential):
    """A run of layers, called one after the other. The children are named by the places of layers in the whole model.

    Repeated layers are found in a stage as they are in any `nn.Sequential`.

    Args:
        number: of the stage in the pipeline.
        layers: modules and functions by their places, in order.
        functions: what is called in place of a module, with the module and the layer's inputs.
        skips: for a layer the earlier layers whose outputs it takes beside that of the one before it.
        kept: own layers whose outputs other stages take beside the chain.
        loss_fn: computes the loss from the output and the labels; None but in the last stage.
    """

    def __init__(
        self,
        number: int,
        layers: Mapping[int, nn.Module | Callable[..., Any]],
        functions: Mapping[int, Callable[..., Any]],
        skips: Mapping[int, Sequence[int]],
        kept: Collection[int],
        loss_fn: Callable[..., Any] | None,
        checkpoints: Checkpoints,
    ) -> None:
        super().__init__()
        self.number = number
        self.checkpoints = checkpoints
        self._layers = list(layers)
        plain = {i: layer for i, layer in layers.items() if not isinstance(layer, nn.Module)}
        self._functions = {**plain, **functions}
        self._skips = {i: tuple(skips[i]) for i in layers if i in skips}
        self._kept = sorted(kept)
        self._sources = {source for sources in self._skips.values() for source in sources} | set(kept)
        modules = {i: layer for i, layer in layers.items() if isinstance(layer, nn.Module)}
        self._in_place = {i for i, layer in modules.items() if any(_is_in_place(part) for part in layer.modules())}
        for i, module in modules.items():
            self.add_module(str(i), module)
        if isinstance(loss_fn, nn.Module):
            self.add_module(LOSS, loss_fn)
        else:
            self.loss_fn = loss_fn

    def forward(  # type: ignore[override]
        self, x: Any, skipped: Mapping[int, Any], labels: Any = None, *, with_loss: bool = True
    ) -> tuple[Any, dict[int, Any]]:
        """The output of the stage, and the outputs of own layers that other stages take.

        Args:
            x: the inputs of the model in the first stage, else the output of the stage before.
            skipped: outputs of layers of earlier stages that layers of this one take, by layer.
            labels: what the loss is computed with.
            with_loss: the last stage's output is `loss_fn(output, labels)`, where there is a `loss_fn`.
        """
        values = {self._layers[0] - 1: x, **skipped}
        for run in self._runs():
            needed = {source: values[source] for i in run for source in self._skips.get(i, ()) if source not in run}
            if self._is_checkpointed(run):
                x, new = checkpoint(self._compute, run, x, needed, use_reentrant=False)
            else:
                x, new = self._compute(run, x, needed)
            values.update(new)
        if with_loss and self.loss_fn is not None:
            x = self.loss_fn(x, labels)
        return x, {i: values[i] for i in self._kept}

    def _runs(self) -> list[list[int]]:
        """Layers that are computed together: all of them, or as many as a checkpoint has."""
        length = self.checkpoints.interval or len(self._layers)
        return [self._layers[begin : begin + length] for begin in range(0, len(self._layers), length)]

    def _is_checkpointed(self, run: Sequence[int]) -> bool:
        classes = self.checkpoints.classes
        return (
            self.checkpoints.interval > 0
            and self.training
            and torch.is_grad_enabled()
            and (classes is None or all(type(self._modules.get(str(i))).__name__ in classes for i in run))
        )

    def _compute(self, run: Sequence[int], x: Any, needed: Mapping[int, Any]) -> tuple[Any, dict[int, Any]]:
        """The output of the last one of these layers, and the outputs that other layers than the next one take.

        What comes in, and what others take, is copied where a layer may change it in place: it belongs to another
        stage, is a leaf of the graph, or is needed again when activations are recomputed.
        """
        new: dict[int, Any] = {}
        changes = not self._in_place.isdisjoint(run)
        x = _copied(x) if changes else x
        for i in run:
            skipped = [new[source] if source in new else needed[source] for source in self._skips.get(i, ())]
            module, function = self._modules.get(str(i)), self._functions.get(i)
            if module is None:
                assert function is not None
                x = function(x, *skipped)
            else:
                x = module(x, *skipped) if function is None else function(module, x, *skipped)
            if i in self._sources:
                new[i] = _copied(x) if changes else x
        return x, new


def _is_in_place(module: nn.Module) -> bool:
    """Whether a module writes into its input, under the name that torch's modules have for it."""
    return getattr(module, "inplace", False) is True


def _copied(value: Any) -> Any:
    return tree_map(lambda item: item.clone() if isinstance(item, Tensor) else item, value)
