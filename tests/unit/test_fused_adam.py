"""FusedAdam by itself, as any torch optimizer: against torch.optim.Adam and AdamW, its state, what it refuses."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from odd_adam import DTYPES, OPTIONS, odd_parameters, rounded, set_grads, trained
from partita.optim import FusedAdam
from torch import Tensor, nn


def _reference(dtype: torch.dtype, decoupled: bool) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """torch's optimizer over fp32 copies of the (rounded) parameters."""
    parameters = [nn.Parameter(p.detach().float()) for p in odd_parameters(dtype)]
    return parameters, (torch.optim.AdamW if decoupled else torch.optim.Adam)(parameters, **OPTIONS)


def _weights(optimizer: FusedAdam, parameters: list[nn.Parameter]) -> list[Tensor]:
    return [optimizer.state[p].get("master", p).detach() for p in parameters]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decoupled", [False, True], ids=["Adam", "AdamW"])
def test_equals_torch(dtype, decoupled):
    """O4: fp32 weights (masters of 16-bit parameters) after each of 10 steps, moments after the last."""
    parameters = odd_parameters(dtype)
    optimizer = FusedAdam(parameters, **OPTIONS, decoupled_weight_decay=decoupled)
    expected, reference = _reference(dtype, decoupled)
    for step in range(10):
        set_grads(parameters, step)
        set_grads(expected, step)
        optimizer.step()
        reference.step()
        torch.testing.assert_close(
            _weights(optimizer, parameters), [p.detach() for p in expected], rtol=1e-6, atol=1e-6
        )
        for parameter, weight in zip(parameters, _weights(optimizer, parameters), strict=True):
            assert torch.equal(parameter, rounded(weight, dtype))
    for parameter, other in zip(parameters, expected, strict=True):
        state = optimizer.state[parameter]
        assert state["step"] == 10
        for moment in ("exp_avg", "exp_avg_sq"):
            assert state[moment].dtype == torch.float32
            torch.testing.assert_close(state[moment], reference.state[other][moment], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_ties_are_rounded_as_documented(dtype):
    """A weight in the middle between two bf16 numbers becomes the larger in magnitude, in float16 the even one."""
    between = 2**-8 if dtype == torch.bfloat16 else 2**-11
    parameter = nn.Parameter(torch.zeros(4, dtype=dtype))
    optimizer = FusedAdam([parameter], lr=0.0)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    master = torch.tensor([1 + between, 1 + 3 * between, -1 - between, -1 - 3 * between])
    optimizer.state[parameter]["master"].copy_(master)
    optimizer.step()
    above = [1 + 2 * between, 1 + 4 * between]
    first = above[0] if dtype == torch.bfloat16 else 1.0
    assert parameter.tolist() == [first, above[1], -first, -above[1]]


def test_groups_and_missing_gradients():
    """O2: as torch, a parameter without a gradient is left alone and has a step count of its own."""

    def build(make: Any, parameters: list[nn.Parameter]) -> Any:
        groups = [{"params": parameters[:4], "lr": 0.5}, {"params": parameters[4:], "betas": (0.1, 0.2), "eps": 1e-2}]
        return make(groups, lr=0.01, weight_decay=0.3)

    ours, theirs = odd_parameters(torch.float32), odd_parameters(torch.float32)
    optimizer, reference = build(FusedAdam, ours), build(torch.optim.AdamW, theirs)
    for step in range(6):
        for parameters, each in ((ours, optimizer), (theirs, reference)):
            set_grads(parameters, step)
            if step % 2:
                parameters[1].grad = parameters[5].grad = None
            each.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_learning_rate_changed_between_steps_counts():
    """O5: torch's schedulers drive it, without a warning."""
    ours, theirs = odd_parameters(torch.float32), odd_parameters(torch.float32)
    for parameters, make in ((ours, FusedAdam), (theirs, torch.optim.AdamW)):
        optimizer = make(parameters, lr=0.1, weight_decay=0.01)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(4):
            set_grads(parameters, step)
            optimizer.step()
            scheduler.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_closure():
    """Runs with gradients enabled, before the update; its value is returned."""
    parameter = nn.Parameter(torch.tensor([3.0]))
    optimizer = FusedAdam([parameter], lr=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    assert parameter.item() == pytest.approx(2.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_may_be_transposed_or_expanded(dtype):
    """G15: it is read as its values, not as its memory."""
    parameter = nn.Parameter(torch.zeros(3, 4, dtype=dtype))
    optimizer = FusedAdam([parameter], lr=0.1)
    values = torch.tensor([[1.0, -1.0, 1.0], [1.0, 1.0, 1.0], [-1.0, 1.0, 1.0], [1.0, 1.0, -1.0]], dtype=dtype)
    parameter.grad = values.t()
    optimizer.step()
    assert torch.equal(parameter.detach().sign(), -values.t())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["deepcopy", "file", "live"])
def test_a_state_dict_continues_with_the_same_bits(dtype, way):
    """The states stay float32, and the two optimizers share no memory."""
    parameters, optimizer = trained(dtype, steps=3)
    state = optimizer.state_dict()
    if way == "deepcopy":
        state = copy.deepcopy(state)
    elif way == "file":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    other = FusedAdam(copies, lr=9.0)
    other.load_state_dict(state)
    for each, theirs in ((optimizer, parameters), (other, copies)):
        for step in range(3, 6):
            set_grads(theirs, step)
            each.step()
    expected, _ = trained(dtype, steps=6)
    for a, b, c in zip(parameters, copies, expected, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, c)
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b[key])), key
            assert not isinstance(value, Tensor) or b[key].dtype == value.dtype == torch.float32
            assert not isinstance(value, Tensor) or not value.numel() or b[key].data_ptr() != value.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_copied_optimizer_continues(dtype):
    """copy.deepcopy of parameters and optimizer together, as pickling does."""
    parameters, optimizer = trained(dtype, steps=3)
    copies, other = copy.deepcopy((parameters, optimizer))
    set_grads(copies, 3)
    other.step()
    expected, _ = trained(dtype, steps=4)
    assert all(torch.equal(a, b) for a, b in zip(copies, expected, strict=True))


def test_the_state_of_torchs_adam_w_loads():
    """A run that moves from torch.optim.AdamW goes on where it was."""
    parameters, reference = _reference(torch.float32, decoupled=True)
    for step in range(3):
        set_grads(parameters, step)
        reference.step()
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    optimizer = FusedAdam(copies)
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    for each, theirs in ((reference, parameters), (optimizer, copies)):
        set_grads(theirs, 3)
        each.step()
    torch.testing.assert_close(copies, parameters, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_loaded_between_steps_are_kept(dtype):
    """O3: the master of a 16-bit parameter follows what is written into it, and keeps its precision elsewhere."""
    parameters, optimizer = trained(dtype, steps=2)
    masters = [w.clone() for w in _weights(optimizer, parameters)]
    with torch.no_grad():
        parameters[6][10] = 3.0
        parameters[1].copy_(parameters[1].clone())
    masters[6][10] = 3.0
    optimizer.param_groups[0]["lr"] = 0.0
    set_grads(parameters, 2)
    optimizer.step()
    for weight, master, parameter in zip(_weights(optimizer, parameters), masters, parameters, strict=True):
        assert torch.equal(weight, master)
        assert torch.equal(parameter, rounded(master, dtype))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr is -0.1"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": float("inf")}, "lr is inf"),
        ({"lr": "fast"}, "lr is 'fast'"),
        ({"eps": -1e-9}, "eps is -1e-09"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"betas": (0.9, 1.0)}, "betas are"),
        ({"betas": (-0.1, 0.9)}, "betas are"),
        ({"betas": (0.9,)}, "betas are"),
        ({"betas": 0.9}, "betas are 0.9"),
    ],
)
@pytest.mark.parametrize("place", ["argument", "group", "added group"])
def test_bad_values_are_refused_by_name(options, message, place):
    """F1: as arguments, in a param group, and in a group that is added later."""
    parameters = odd_parameters(torch.float32)
    with pytest.raises(ValueError, match=message):
        if place == "argument":
            FusedAdam(parameters, **options)
        elif place == "group":
            FusedAdam([{"params": parameters, **options}])
        else:
            optimizer = FusedAdam(parameters[:3])
            try:
                optimizer.add_param_group({"params": parameters[3:], **options})
            finally:
                assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("parameter", "error", "message"),
    [
        (nn.Parameter(torch.zeros(3, dtype=torch.float64)), TypeError, "float64"),
        (nn.Parameter(torch.zeros(4, 3).t()), ValueError, "not contiguous"),
    ],
)
def test_parameters_that_it_cannot_update_are_refused(parameter, error, message):
    """The core computes on contiguous float32, float16 and bfloat16."""
    parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(error, match=message):
        FusedAdam([parameter]).step()
