"""What FusedAdam keeps between steps, while others write, move and replace what it works on."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from odd_adam import DTYPES, OPTIONS, odd_parameters, rounded, set_grads, trained
from partita.optim import FusedAdam
from torch import Tensor, nn


def _step_as_new(dtype: torch.dtype, change: Any, steps: int = 3) -> None:
    """`change(parameters, optimizer)` between steps; each step is that of an optimizer which knows nothing of former
    ones: the same state, read from a state dict."""
    parameters, optimizer = trained(dtype, steps=2)
    for step in range(2, 2 + steps):
        change(parameters, optimizer)
        copies = [nn.Parameter(p.detach().clone()) for p in parameters]
        fresh = FusedAdam(copies, **OPTIONS)
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for each, theirs in ((optimizer, parameters), (fresh, copies)):
            set_grads(theirs, step)
            each.step()
        for a, b in zip(parameters, copies, strict=True):
            assert torch.equal(a, b)
            assert optimizer.state[a].keys() == fresh.state[b].keys()
            for name, value in optimizer.state[a].items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(fresh.state[b][name])), name


def _moved(parameters: list[nn.Parameter], optimizer: FusedAdam) -> None:
    for parameter in parameters[1:4]:
        parameter.data = parameter.data.clone()


def _written_and_moved(parameters: list[nn.Parameter], optimizer: FusedAdam) -> None:
    for parameter in parameters[:3]:
        parameter.data = parameter.data * 2


def _states_replaced(parameters: list[nn.Parameter], optimizer: FusedAdam) -> None:
    for parameter in parameters[:5]:
        state = optimizer.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name] * 2


def _state_dicts_replaced(parameters: list[nn.Parameter], optimizer: FusedAdam) -> None:
    for parameter in parameters[2:]:
        optimizer.state[parameter] = {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in optimizer.state[parameter].items()
        }


def _states_moved(parameters: list[nn.Parameter], optimizer: FusedAdam) -> None:
    for parameter in parameters:
        for value in optimizer.state[parameter].values():
            if isinstance(value, Tensor):
                value.data = value.data * 0.5


def _counted_otherwise(parameters: list[nn.Parameter], optimizer: FusedAdam) -> None:
    optimizer.state[parameters[3]]["step"] += 4
    optimizer.state[parameters[4]]["step"] = torch.tensor(7.0)


def _loaded(parameters: list[nn.Parameter], optimizer: FusedAdam) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(
    "change", [_moved, _written_and_moved, _states_replaced, _state_dicts_replaced, _states_moved, _counted_otherwise,
               _loaded]
)  # fmt: skip
def test_what_others_do_between_steps_counts(dtype, change):
    """Memory that moved, states that were replaced or counted otherwise: as an optimizer that is made for this step."""
    _step_as_new(dtype, change)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_memory_of_gradients_may_move_in_each_step(dtype):
    """Under zero_grad(set_to_none=True) they do, and their memory may be that of others then."""
    parameters, optimizer = trained(dtype, steps=1)
    expected, other = trained(dtype, steps=1)
    kept: list[Tensor] = []
    for step in range(1, 5):
        optimizer.zero_grad(set_to_none=True)
        set_grads(parameters, step)
        kept += [grad.clone() for p in parameters if (grad := p.grad) is not None]
        for p in parameters:
            p.grad = None if p.grad is None else p.grad.clone()
        set_grads(expected, step)
        optimizer.step()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True))


def test_a_group_that_is_added_and_a_dtype_that_changes():
    """The plan of the steps before has neither."""
    parameters, optimizer = trained(torch.float32, steps=2)
    added = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [added], "lr": 0.5})
    for step in (2, 3):
        set_grads([*parameters, added], step)
        optimizer.step()
    assert optimizer.state[added]["step"] == 2
    assert optimizer.state[parameters[0]]["step"] == 4
    half = parameters[3]
    half.grad = None
    half.data = half.data.bfloat16()
    weight = half.detach().float()
    half.grad = torch.ones_like(half)
    optimizer.step()
    assert torch.equal(half, rounded(optimizer.state[half]["master"], torch.bfloat16))
    assert bool((optimizer.state[half]["master"] != weight).any())


def test_what_is_kept_holds_no_gradient():
    """Their memory is the program's as soon as it drops them."""
    parameters, optimizer = trained(torch.float32, steps=2)
    grads = [weakref.ref(p.grad) for p in parameters if p.grad is not None]
    optimizer.zero_grad(set_to_none=True)
    assert grads and not any(ref() is not None for ref in grads)


def test_a_step_that_cannot_be_taken_counts_nothing():
    """Promise 7: and the next one is as if it had not been tried."""
    parameters, optimizer = trained(torch.float32, steps=2)
    wrong = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [wrong]})
    set_grads(parameters, 2)
    wrong.grad = torch.zeros_like(wrong)
    with pytest.raises(TypeError, match="float64"):
        optimizer.step()
    wrong.grad = None
    optimizer.step()
    expected, _ = trained(torch.float32, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True))
    assert optimizer.state[parameters[0]]["step"] == 3


def test_a_parameter_that_changes_its_group_has_the_options_of_the_new_one():
    """Also where the order of all parameters stays."""
    ours, theirs = odd_parameters(torch.float32), odd_parameters(torch.float32)
    for parameters, make in ((ours, FusedAdam), (theirs, torch.optim.AdamW)):
        groups = [{"params": parameters[:4], "lr": 0.5}, {"params": parameters[4:], "lr": 0.01}]
        optimizer = make(groups, weight_decay=0.1)
        for step in range(4):
            if step == 2:
                moved = optimizer.param_groups[0]["params"].pop()
                optimizer.param_groups[1]["params"].insert(0, moved)
            set_grads(parameters, step)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_gradients_whose_dtype_changes_are_read_as_what_they_are():
    """A parameter's `grad_dtype` lets it have others than its own."""
    results = []
    for dtypes in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        parameter = nn.Parameter(torch.arange(40.0).bfloat16())
        parameter.grad_dtype = None
        optimizer = FusedAdam([parameter], lr=0.1)
        for step, dtype in enumerate(dtypes):
            parameter.grad = torch.linspace(-1, 1, 40).bfloat16().to(dtype) * (step + 1)
            optimizer.step()
        results.append(parameter.detach().clone())
    assert torch.equal(*results)
