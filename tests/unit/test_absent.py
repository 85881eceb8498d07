"""units/absent.py: what can be asked of a parameter whose values are elsewhere, and what raises."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from partita.units.absent import (
    AbsentParameterError,
    give_to,
    holder_of,
    make_absent,
    make_present,
    take_back,
)
from torch import Tensor, nn


class Here:
    """A holder of one parameter."""

    def name_of(self, _parameter: nn.Parameter) -> str:
        return "layer.weight"

    def bring(self) -> bool:
        return False


def absent_parameter(*, empty: bool = True) -> nn.Parameter:
    parameter = nn.Parameter(torch.arange(6.0).reshape(2, 3))
    give_to(Here, [parameter])  # type: ignore[arg-type, return-value]
    if empty:
        parameter.untyped_storage().resize_(0)
    make_absent([parameter])
    return parameter


USES: dict[str, Callable[[nn.Parameter], Any]] = {
    "add": lambda p: p + 1,
    "add from the right": lambda p: torch.ones(2, 3) + p,
    "linear": lambda p: F.linear(torch.ones(1, 3), p),
    "embedding": lambda p: F.embedding(torch.tensor([0]), p),
    "in a list": lambda p: torch.cat([torch.ones(1, 3), p]),
    "in a keyword": lambda p: F.linear(torch.ones(1, 3), weight=p),
    "item": lambda p: p[0, 0].item(),
    "numpy": lambda p: p.detach().numpy(),
    "detach": lambda p: p.detach(),
    "data": lambda p: p.data,
    "clone": lambda p: p.clone(),
    "copy_": lambda p: p.copy_(torch.zeros(2, 3)),
    "to": lambda p: p.to(torch.float16),
    "data_ptr": lambda p: p.data_ptr(),
    "norm": lambda p: torch.linalg.vector_norm(p),
    "clip": lambda p: [p.sum(), p.mul_(2)],
    "deepcopy": copy.deepcopy,
    "save": lambda p: torch.save(p, io.BytesIO()),
}


@pytest.mark.parametrize("use", USES)
def test_its_use_raises_and_names_it(use):
    """S1"""
    parameter = absent_parameter()
    with torch.no_grad(), pytest.raises(AbsentParameterError, match=r"'layer\.weight'.*GatheredParameters"):
        USES[use](parameter)


def test_what_describes_it_can_be_asked():
    p = absent_parameter()
    assert isinstance(p, nn.Parameter)
    assert (p.shape, p.size(0), p.dim(), p.ndim, p.numel(), len(p)) == ((2, 3), 2, 2, 2, 6, 2)
    assert (p.dtype, p.device, p.stride(), p.requires_grad) == (torch.float32, torch.device("cpu"), (3, 1), True)
    assert p.is_leaf
    assert p.is_floating_point()
    assert p.grad is None
    assert not p.is_cuda
    assert p.untyped_storage().nbytes() == 0
    assert "AbsentParameter('layer.weight', shape=(2, 3))" in repr(p)
    p.requires_grad_(False)
    p.grad = None
    assert not p.requires_grad


def test_it_is_a_key_and_equals_itself_only():
    p, q = absent_parameter(), absent_parameter()
    assert {p: 1}[p] == 1
    assert p in {p}
    assert p not in {q}


def test_modules_with_absent_parameters_can_be_walked_and_moved_to_other_modules():
    model, other = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    give_to(Here, [model.weight])  # type: ignore[arg-type, return-value]
    make_absent([model.weight])
    assert [name for name, _ in model.named_parameters()] == ["weight"]
    assert sum(p.numel() for p in model.parameters()) == 6
    other.weight = model.weight
    assert other.weight is model.weight
    model.requires_grad_(False)
    model.zero_grad()
    assert "Linear" in repr(model)


def test_it_is_the_same_object_when_it_is_present_again():
    """Its class too, whatever that was; twice is as good as once."""

    class Special(nn.Parameter):
        pass

    parameter = Special(torch.ones(2))
    other = nn.Parameter(torch.ones(2))
    for _ in range(2):
        make_absent([parameter, parameter, other])
        make_present([parameter, parameter, other])
    assert type(parameter) is Special
    assert type(other) is nn.Parameter
    assert (parameter + other).tolist() == [2, 2]


def test_a_holder_is_known_until_the_parameter_is_taken_back():
    parameter = absent_parameter()
    assert isinstance(holder_of(parameter), Here)
    take_back(parameter, torch.ones(2, 3))
    assert holder_of(parameter) is None
    assert parameter.sum().item() == 6
    assert holder_of(nn.Parameter(torch.ones(1))) is None
    assert holder_of(torch.ones(1)) is None


def test_a_holder_is_not_pickled_with_the_parameter():
    """A state dict with keep_vars, torch.save() of a model: nothing of the engine goes along."""
    parameter = nn.Parameter(torch.ones(2))
    give_to(Here, [parameter])  # type: ignore[arg-type, return-value]
    file = io.BytesIO()
    torch.save({"a": parameter}, file)
    file.seek(0)
    loaded: Tensor = torch.load(file, weights_only=True)["a"]
    assert torch.equal(loaded, parameter)
    assert holder_of(loaded) is None
    assert holder_of(copy.deepcopy(parameter)) is None
