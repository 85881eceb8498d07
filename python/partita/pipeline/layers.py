"""Layers of a pipeline: given as modules, as functions, or as specs that are built where they live."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from partita.model import RandomState
from partita.units import holder_of

PLAIN = (bool, int, float, str, type(None), type, torch.dtype)  # what can be compared without a surprise


class LayerSpec:
    """A layer that is built later, and only on the rank that has it.

    Args:
        typename: the class of the module.
        module_args, module_kwargs: what the class is called with.

    Raises:
        TypeError: `typename` is no class of modules.
    """

    def __init__(self, typename: type[nn.Module], *module_args: Any, **module_kwargs: Any) -> None:
        if not (isinstance(typename, type) and issubclass(typename, nn.Module)):
            raise TypeError(
                f"{type(self).__name__}: {typename!r} is no class of torch.nn.Module; modules and functions are layers "
                "as they are, without a spec"
            )
        self.typename = typename
        self.module_args = module_args
        self.module_kwargs = module_kwargs

    def build(self) -> nn.Module:
        """A new module."""
        return self.typename(*self.module_args, **self.module_kwargs)

    def __repr__(self) -> str:
        given = [repr(value) for value in self.module_args]
        given += [f"{name}={value!r}" for name, value in self.module_kwargs.items()]
        return f"{type(self).__name__}({', '.join([self.typename.__name__, *given])})"


class TiedLayerSpec(LayerSpec):
    """A layer whose parameters are those of all other layers with the same key.

    Layers of one stage are one module. Stages have a copy each; the copies have the same values always.

    Args:
        key: names the parameters.
        typename, module_args, module_kwargs: as those of `LayerSpec`, the same for all layers of a key.
        forward_fn: called with the module and the layer's input, in place of the module.
        tied_weight_attr: name of an attribute of the module, or several; "embedding.weight" is one of a child. All
            parameters of the module are tied, whichever are named.
    """

    def __init__(
        self,
        key: str,
        typename: type[nn.Module],
        *module_args: Any,
        forward_fn: Callable[..., Any] | None = None,
        tied_weight_attr: str | Iterable[str] = "weight",
        **module_kwargs: Any,
    ) -> None:
        super().__init__(typename, *module_args, **module_kwargs)
        self.key = key
        self.forward_fn = forward_fn
        self.tied_weight_attr = [tied_weight_attr] if isinstance(tied_weight_attr, str) else list(tied_weight_attr)

    def build(self) -> nn.Module:
        """A new module.

        Raises:
            ValueError: it lacks an attribute that `tied_weight_attr` names.
        """
        module = super().build()
        for name in self.tied_weight_attr:
            found: Any = module
            for part in name.split("."):
                found = getattr(found, part, None)
            if found is None:
                names = ", ".join(n for n, _ in module.named_parameters()) or "no parameters"
                raise ValueError(
                    f"TiedLayerSpec '{self.key}': {self.typename.__name__} has no attribute '{name}': set "
                    f"tied_weight_attr to one of its weights ({names})"
                )
        return module


Layer: TypeAlias = "LayerSpec | nn.Module | Callable[..., Any]"


@dataclass(frozen=True)
class ParameterShape:
    """What is known of a parameter before there is one."""

    name: str
    numel: int
    requires_grad: bool


def take_layers(layers: Iterable[Layer]) -> list[Layer]:
    """The layers that a program gives, one after the other: the children of an `nn.Sequential`, or the items.

    Raises:
        TypeError, ValueError: what is given is no list of layers; names the layer.
    """
    if isinstance(layers, nn.Sequential) and type(layers).forward is not nn.Sequential.forward:
        raise ValueError(
            f"PipelineModule: {type(layers).__name__} has a forward of its own, so its children are not its layers: "
            "give a list of layers"
        )
    if isinstance(layers, nn.Module) and not isinstance(layers, nn.Sequential | nn.ModuleList):
        raise TypeError(
            f"PipelineModule: layers is a {type(layers).__name__}: give a list of layers, or an nn.Sequential"
        )
    taken = list(layers)
    if not taken:
        raise ValueError("PipelineModule: layers is empty: a pipeline has at least one layer")
    firsts: dict[str, TiedLayerSpec] = {}
    for i, layer in enumerate(taken):
        _check_layer(i, layer)
        if isinstance(layer, TiedLayerSpec):
            _check_alike(firsts.setdefault(layer.key, layer), layer)
    return taken


def _check_layer(i: int, layer: Any) -> None:
    if isinstance(layer, type):
        raise TypeError(
            f"PipelineModule: layer {i} is the class {layer.__name__}: give LayerSpec({layer.__name__}, ...)"
        )
    if not isinstance(layer, LayerSpec) and not callable(layer):
        raise TypeError(
            f"PipelineModule: layer {i} is a {type(layer).__name__}: layers are LayerSpec, TiedLayerSpec, "
            "torch.nn.Module or functions"
        )
    if isinstance(layer, nn.Module) and any(holder_of(parameter) is not None for parameter in layer.parameters()):
        raise ValueError(
            f"PipelineModule: layer {i} ({type(layer).__name__}) has parameters that are partitioned over all ranks: "
            "give a LayerSpec, or build the layer outside of partita.zero.Init()"
        )
    owner = getattr(layer, "__self__", None)
    if isinstance(owner, nn.Module) and any(True for _ in owner.parameters()):
        raise ValueError(
            f"PipelineModule: layer {i} is a method of a {type(owner).__name__}, whose parameters would not be seen: "
            "give the module, or a TiedLayerSpec with a forward_fn"
        )


def _check_alike(first: TiedLayerSpec, other: TiedLayerSpec) -> None:
    """One module is built for all layers of a key, so they must ask for the same."""

    def asked(spec: TiedLayerSpec) -> dict[Any, Any]:
        return {"class": spec.typename, **dict(enumerate(spec.module_args)), **spec.module_kwargs}

    a, b = asked(first), asked(other)
    missing = object()
    for name in a.keys() | b.keys():
        x, y = a.get(name, missing), b.get(name, missing)
        if x is missing or y is missing or (isinstance(x, PLAIN) and isinstance(y, PLAIN) and x != y):
            raise ValueError(
                f"TiedLayerSpec '{first.key}': {first!r} and {other!r} are to be one module: give all layers of a key "
                "the same class and arguments"
            )


def layer_name(layer: Layer) -> str:
    """The name of a layer's class, or of the function that it is."""
    if isinstance(layer, LayerSpec):
        return layer.typename.__name__
    of_function = None if isinstance(layer, nn.Module) else getattr(layer, "__name__", None)
    return of_function or type(layer).__name__


def parameter_shapes(layer: Layer) -> tuple[ParameterShape, ...]:
    """The parameters of a layer, in the order of its module.

    A spec is built without memory, on the meta device. Where its class does not allow that, it is built and dropped.
    """
    module = layer
    if isinstance(layer, LayerSpec):
        with kept_random_state():
            try:
                with torch.device("meta"), _Unfilled():
                    module = layer.build()
            except Exception:  # of whatever kind: what is wrong with the spec itself is raised by the next line
                module = layer.build()
    if not isinstance(module, nn.Module):
        return ()
    return tuple(ParameterShape(name, p.numel(), p.requires_grad) for name, p in module.named_parameters())


class _Unfilled(TorchFunctionMode):
    """Tensors without memory are not initialised: for some of the functions that do it, torch imports sympy first."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is torch.Tensor.normal_ or getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else given["tensor"]
        return func(*args, **given)


@contextmanager
def kept_random_state() -> Iterator[None]:
    """The generators of Python, numpy and torch are after the block where they were before it."""
    was_used = _cuda_is_used()
    state = RandomState(torch.device("cuda", torch.cuda.current_device()) if was_used else torch.device("cpu"))
    before = state.state_dict()
    try:
        yield
    finally:
        state.load_state_dict(before)
        if torch.cuda.is_available() and not was_used:
            torch.cuda.manual_seed(torch.initial_seed())  # where the device's generator begins, then or now


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """In the block, random numbers follow from the seed alone, whatever was drawn before."""
    with kept_random_state():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        torch.cuda.manual_seed(seed)  # holds once the device is used, if it is
        yield


def _cuda_is_used() -> bool:
    """Only then its generators exist: to ask for one would begin to use the device."""
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
