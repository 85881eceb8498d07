"""How long each layer of a pipeline takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from partita.pipeline.division import check_skips
from partita.pipeline.layers import Layer, LayerSpec, TiedLayerSpec, kept_random_state, take_layers


@dataclass(frozen=True)
class LayerTimes:
    """Times of layers, in milliseconds. The loss belongs to the last one.

    Attributes:
        forward_ms, backward_ms: of one micro-batch, by layer.
    """

    forward_ms: tuple[float, ...]
    backward_ms: tuple[float, ...]

    @property
    def costs(self) -> list[float]:
        """Both together, as `PipelineModule(layer_costs=...)` takes them."""
        return [forward + backward for forward, backward in zip(self.forward_ms, self.backward_ms, strict=True)]


def measure_layers(
    layers: Iterable[Layer],
    inputs: Any,
    labels: Any = None,
    *,
    loss_fn: Callable[..., Any] | None = None,
    skips: Mapping[int, Sequence[int]] | None = None,
    repeats: int = 5,
) -> LayerTimes:
    """Runs the layers of a model in this process, one after the other; medians of their times.

    Specs are built when their turn comes, on the device of the inputs, and dropped. Modules keep their gradients and
    buffers, and the program its random numbers. Times differ from process to process, and all ranks of a pipeline must
    be given the same costs: measure on one rank, and send what was found to the others.

    Args:
        layers, loss_fn, skips: as for `PipelineModule`.
        inputs, labels: a micro-batch.
        repeats: measurements of each layer, after one that is not counted.

    Raises:
        TypeError, ValueError: as from `PipelineModule`; `repeats` is no positive number.
    """
    if repeats < 1:
        raise ValueError(f"measure_layers: repeats is {repeats}: give 1 or more")
    taken = take_layers(layers)
    sources = check_skips(skips or {}, len(taken))
    needed = {source for given in sources.values() for source in given}
    device = next((tensor.device for tensor in _tensors(inputs)), torch.device("cpu"))
    outputs: dict[int, Any] = {}
    times: list[tuple[float, float]] = []
    x = inputs
    with kept_random_state(), torch.enable_grad():
        for i, layer in enumerate(taken):
            call, modules = _ready(layer, device)
            loss = None if loss_fn is None or i < len(taken) - 1 else partial(_swapped, loss_fn, labels)
            modules += [loss_fn] if loss is not None and isinstance(loss_fn, nn.Module) else []
            arguments = [x, *(outputs[source] for source in sources.get(i, ()))]
            with _kept_buffers(modules):
                found = [_once(call, loss, modules, arguments, is_first=i == 0) for _ in range(repeats + 1)]
            x = found[-1][2]
            times.append((median(f for f, _, _ in found[1:]), median(b for _, b, _ in found[1:])))
            if i in needed:
                outputs[i] = x
    return LayerTimes(tuple(f for f, _ in times), tuple(b for _, b in times))


def _ready(layer: Layer, device: torch.device) -> tuple[Callable[..., Any], list[nn.Module]]:
    """What to call, and the module behind it."""
    if isinstance(layer, LayerSpec):
        module = layer.build().to(device)
        own = layer.forward_fn if isinstance(layer, TiedLayerSpec) else None
        return (module if own is None else partial(own, module)), [module]
    return layer, [layer] if isinstance(layer, nn.Module) else []


def _swapped(loss_fn: Callable[..., Any], labels: Any, output: Any) -> Any:
    return loss_fn(output, labels)


def _once(
    call: Callable[..., Any],
    loss: Callable[..., Any] | None,
    modules: Sequence[nn.Module],
    arguments: Sequence[Any],
    *,
    is_first: bool,
) -> tuple[float, float, Any]:
    """One forward and backward: their times in milliseconds, and the output of the layer without its graph.

    Gradients go to parameters and to the layer's inputs, except for those of the first layer, which are data.
    """
    wanted: list[Tensor] = [p for module in modules for p in module.parameters() if p.requires_grad]
    given = [_map(argument, partial(_leaf, None if is_first else wanted)) for argument in arguments]
    begin = _now(arguments)
    output = call(*given)
    detached = _map(output, Tensor.detach)
    if loss is not None:
        output = loss(output)
    middle = _now(arguments)
    roots = [tensor for tensor in _tensors(output) if tensor.requires_grad]
    if roots and wanted:
        torch.autograd.grad(roots, wanted, [torch.ones_like(root) for root in roots], allow_unused=True)
    return 1e3 * (middle - begin), 1e3 * (_now(arguments) - middle), detached


def _leaf(wanted: list[Tensor] | None, tensor: Tensor) -> Tensor:
    """A copy, which a layer may change in place; of floating-point numbers, the end of a graph."""
    if wanted is None or not tensor.is_floating_point():
        return tensor.detach().clone()
    leaf = tensor.detach().requires_grad_()
    wanted.append(leaf)
    return leaf.clone()


def _now(arguments: Sequence[Any]) -> float:
    """Seconds, once the device of these tensors has done what it was given."""
    for device in {tensor.device for tensor in _tensors(arguments) if tensor.is_cuda}:
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def _kept_buffers(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Statistics of these modules are after the block what they were before."""
    before = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values in before:
                buffer.copy_(values)


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(value, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The value with other tensors, in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _map(item, function) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, function) for item in value))
    return type(value)(_map(item, function) for item in value) if isinstance(value, list | tuple) else value
