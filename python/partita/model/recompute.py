"""Layers whose activations are computed again in backward, not kept (Chen et al. 2016, arXiv:1604.06174)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from partita.device import HOST
from partita.units import find_blocks


class ActivationCheckpoints:
    """Replaces the forward of a model's layers by one that keeps its inputs only.

    The hooks of a layer run outside of that: in stage 3 its parameters arrive once for the recomputation and the
    backward after it.

    Args:
        classes: names of the layers' classes; None: the repeated layers of the model.
        on_host: keep the inputs in host memory.

    Raises:
        ValueError: the model has no such layers.
    """

    def __init__(self, model: nn.Module, classes: Sequence[str] | None, *, on_host: bool) -> None:
        self._layers = find_blocks(model, classes, key="activation_checkpointing.classes", with_leaves=False)
        if not self._layers:
            raise ValueError(
                "activation_checkpointing is enabled, and the model has no repeated layers: name the classes of the "
                "modules to checkpoint in activation_checkpointing.classes"
            )
        self._own = [vars(layer).get("forward") for layer in self._layers]  # one that a program gave the layer
        for layer in self._layers:
            layer.forward = _Checkpointed(layer, layer.forward, on_host)

    def close(self) -> None:
        """The layers are as they were."""
        for layer, own in zip(self._layers, self._own, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own
        self._layers, self._own = [], []


class _Checkpointed:
    """The forward of a layer, which keeps the inputs only."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Any], on_host: bool) -> None:
        self._layer = layer
        self._forward = forward
        self._on_host = on_host

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self._layer.training and torch.is_grad_enabled()):
            return self._forward(*args, **kwargs)
        inputs: AbstractContextManager[Any] = nullcontext()
        if self._on_host:
            inputs = torch.autograd.graph.saved_tensors_hooks(_to_host, _from_host)
        with inputs:
            return checkpoint(self._forward, *args, use_reentrant=False, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """A copy of the layer computes as the layer did before: it belongs to no engine."""
        forward: Callable[..., Any] = copy.deepcopy(self._forward, memo)
        return forward


# torch.autograd.graph.save_on_cpu() makes its copies on the program's default device.


def _to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    """Where a tensor is, and its values in host memory, for what is queued later on its stream."""
    if not tensor.is_cuda:
        return tensor.device, tensor
    if tensor.layout is not torch.strided:
        return tensor.device, tensor.to(HOST)
    copied = torch.empty(tensor.shape, dtype=tensor.dtype, device=HOST, pin_memory=True)
    return tensor.device, copied.copy_(tensor, non_blocking=True)


def _from_host(kept: tuple[torch.device, Tensor]) -> Tensor:
    device, tensor = kept
    return tensor.to(device, non_blocking=True)
