"""FusedAdam by itself, as any torch optimizer: against torch.optim.Adam and AdamW, its state, what it refuses."""

from __future__ import annotations

import copy
import io
import weakref
from typing import Any

import pytest
import torch
from partita.optim import FusedAdam
from torch import Tensor, nn

SHAPES = [(1,), (7, 3), (0,), (16,), (17,), (5, 1, 9), (1000,), (), (2, 31)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def _parameters(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def _rounded(master: Tensor, dtype: torch.dtype) -> Tensor:
    """To nearest; of two equally near, bf16 takes the larger magnitude, others the even one."""
    if dtype != torch.bfloat16:
        return master.to(dtype)
    return ((master.view(torch.int32) + 0x8000) & ~0xFFFF).view(torch.float32).to(dtype)


def _set_grads(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        grad = torch.randn(parameter.shape, generator=generator).bfloat16().half()  # exact in every dtype
        parameter.grad = grad.to(parameter.dtype)


def _reference(dtype: torch.dtype, decoupled: bool) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """torch's optimizer over fp32 copies of the (rounded) parameters."""
    parameters = [nn.Parameter(p.detach().float()) for p in _parameters(dtype)]
    return parameters, (torch.optim.AdamW if decoupled else torch.optim.Adam)(parameters, **OPTIONS)


def _weights(optimizer: FusedAdam, parameters: list[nn.Parameter]) -> list[Tensor]:
    return [optimizer.state[p].get("master", p).detach() for p in parameters]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decoupled", [False, True], ids=["Adam", "AdamW"])
def test_equals_torch(dtype, decoupled):
    """O4: fp32 weights (masters of 16-bit parameters) after each of 10 steps, moments after the last."""
    parameters = _parameters(dtype)
    optimizer = FusedAdam(parameters, **OPTIONS, decoupled_weight_decay=decoupled)
    expected, reference = _reference(dtype, decoupled)
    for step in range(10):
        _set_grads(parameters, step)
        _set_grads(expected, step)
        optimizer.step()
        reference.step()
        torch.testing.assert_close(
            _weights(optimizer, parameters), [p.detach() for p in expected], rtol=1e-6, atol=1e-6
        )
        for parameter, weight in zip(parameters, _weights(optimizer, parameters), strict=True):
            assert torch.equal(parameter, _rounded(weight, dtype))
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

    ours, theirs = _parameters(torch.float32), _parameters(torch.float32)
    optimizer, reference = build(FusedAdam, ours), build(torch.optim.AdamW, theirs)
    for step in range(6):
        for parameters, each in ((ours, optimizer), (theirs, reference)):
            _set_grads(parameters, step)
            if step % 2:
                parameters[1].grad = parameters[5].grad = None
            each.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_learning_rate_changed_between_steps_counts():
    """O5: torch's schedulers drive it, without a warning."""
    ours, theirs = _parameters(torch.float32), _parameters(torch.float32)
    for parameters, make in ((ours, FusedAdam), (theirs, torch.optim.AdamW)):
        optimizer = make(parameters, lr=0.1, weight_decay=0.01)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(4):
            _set_grads(parameters, step)
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


def _trained(dtype: torch.dtype, steps: int) -> tuple[list[nn.Parameter], FusedAdam]:
    parameters = _parameters(dtype)
    optimizer = FusedAdam(parameters, **OPTIONS)
    for step in range(steps):
        _set_grads(parameters, step)
        optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["deepcopy", "file", "live"])
def test_a_state_dict_continues_with_the_same_bits(dtype, way):
    """The states stay float32, and the two optimizers share no memory."""
    parameters, optimizer = _trained(dtype, steps=3)
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
            _set_grads(theirs, step)
            each.step()
    expected, _ = _trained(dtype, steps=6)
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
    parameters, optimizer = _trained(dtype, steps=3)
    copies, other = copy.deepcopy((parameters, optimizer))
    _set_grads(copies, 3)
    other.step()
    expected, _ = _trained(dtype, steps=4)
    assert all(torch.equal(a, b) for a, b in zip(copies, expected, strict=True))


def test_the_state_of_torchs_adam_w_loads():
    """A run that moves from torch.optim.AdamW goes on where it was."""
    parameters, reference = _reference(torch.float32, decoupled=True)
    for step in range(3):
        _set_grads(parameters, step)
        reference.step()
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    optimizer = FusedAdam(copies)
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    for each, theirs in ((reference, parameters), (optimizer, copies)):
        _set_grads(theirs, 3)
        each.step()
    torch.testing.assert_close(copies, parameters, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_loaded_between_steps_are_kept(dtype):
    """O3: the master of a 16-bit parameter follows what is written into it, and keeps its precision elsewhere."""
    parameters, optimizer = _trained(dtype, steps=2)
    masters = [w.clone() for w in _weights(optimizer, parameters)]
    with torch.no_grad():
        parameters[6][10] = 3.0
        parameters[1].copy_(parameters[1].clone())
    masters[6][10] = 3.0
    optimizer.param_groups[0]["lr"] = 0.0
    _set_grads(parameters, 2)
    optimizer.step()
    for weight, master, parameter in zip(_weights(optimizer, parameters), masters, parameters, strict=True):
        assert torch.equal(weight, master)
        assert torch.equal(parameter, _rounded(master, dtype))


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
    parameters = _parameters(torch.float32)
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


# -- what is kept between steps


def _step_as_new(dtype: torch.dtype, change: Any, steps: int = 3) -> None:
    """`change(parameters, optimizer)` between steps; each step is that of an optimizer which knows nothing of former
    ones: the same state, read from a state dict."""
    parameters, optimizer = _trained(dtype, steps=2)
    for step in range(2, 2 + steps):
        change(parameters, optimizer)
        copies = [nn.Parameter(p.detach().clone()) for p in parameters]
        fresh = FusedAdam(copies, **OPTIONS)
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for each, theirs in ((optimizer, parameters), (fresh, copies)):
            _set_grads(theirs, step)
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
    parameters, optimizer = _trained(dtype, steps=1)
    expected, other = _trained(dtype, steps=1)
    kept: list[Tensor] = []
    for step in range(1, 5):
        optimizer.zero_grad(set_to_none=True)
        _set_grads(parameters, step)
        kept += [grad.clone() for p in parameters if (grad := p.grad) is not None]
        for p in parameters:
            p.grad = None if p.grad is None else p.grad.clone()
        _set_grads(expected, step)
        optimizer.step()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True))


def test_a_group_that_is_added_and_a_dtype_that_changes():
    """The plan of the steps before has neither."""
    parameters, optimizer = _trained(torch.float32, steps=2)
    added = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [added], "lr": 0.5})
    for step in (2, 3):
        _set_grads([*parameters, added], step)
        optimizer.step()
    assert optimizer.state[added]["step"] == 2
    assert optimizer.state[parameters[0]]["step"] == 4
    half = parameters[3]
    half.grad = None
    half.data = half.data.bfloat16()
    weight = half.detach().float()
    half.grad = torch.ones_like(half)
    optimizer.step()
    assert torch.equal(half, _rounded(optimizer.state[half]["master"], torch.bfloat16))
    assert bool((optimizer.state[half]["master"] != weight).any())


def test_what_is_kept_holds_no_gradient():
    """Their memory is the program's as soon as it drops them."""
    parameters, optimizer = _trained(torch.float32, steps=2)
    grads = [weakref.ref(p.grad) for p in parameters if p.grad is not None]
    optimizer.zero_grad(set_to_none=True)
    assert grads and not any(ref() is not None for ref in grads)


def test_a_step_that_cannot_be_taken_counts_nothing():
    """Promise 7: and the next one is as if it had not been tried."""
    parameters, optimizer = _trained(torch.float32, steps=2)
    wrong = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [wrong]})
    _set_grads(parameters, 2)
    wrong.grad = torch.zeros_like(wrong)
    with pytest.raises(TypeError, match="float64"):
        optimizer.step()
    wrong.grad = None
    optimizer.step()
    expected, _ = _trained(torch.float32, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True))
    assert optimizer.state[parameters[0]]["step"] == 3


def test_a_parameter_that_changes_its_group_has_the_options_of_the_new_one():
    """Also where the order of all parameters stays."""
    ours, theirs = _parameters(torch.float32), _parameters(torch.float32)
    for parameters, make in ((ours, FusedAdam), (theirs, torch.optim.AdamW)):
        groups = [{"params": parameters[:4], "lr": 0.5}, {"params": parameters[4:], "lr": 0.01}]
        optimizer = make(groups, weight_decay=0.1)
        for step in range(4):
            if step == 2:
                moved = optimizer.param_groups[0]["params"].pop()
                optimizer.param_groups[1]["params"].insert(0, moved)
            _set_grads(parameters, step)
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
