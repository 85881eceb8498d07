"""Number formats in one process: autocast against torch's own, losses in float16, buffers, copies of weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from partita import Engine
from small_models import Regression, assert_same_weights, config, inputs, seeded, weights
from torch import Tensor, nn

FP16 = {"fp16": {"enabled": True, "initial_scale_power": 6}}


# -- torch_autocast


class Typed(Regression):
    """Notes in which type its layers compute."""

    computed: torch.dtype | None = None

    def predict(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        self.computed = hidden.dtype
        return self.second(torch.tanh(hidden))


@pytest.mark.parametrize("stage", [0, 2])
def test_bf16_autocast_equals_torchs(stage):
    """torch_autocast: the forward under torch.autocast, everything else in fp32."""
    settings = config(torch_autocast={"enabled": True}, zero_optimization={"stage": stage})
    engine = Engine(seeded(Typed), config=settings)
    model = seeded(Typed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(inputs(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(engine.train_batch(inputs(step)), loss.detach(), rtol=1e-5, atol=1e-6)
    assert engine.module.computed == torch.bfloat16
    assert engine.loss_scale == 1.0
    assert {p.dtype for p in engine.module.parameters()} == {torch.float32}
    assert_same_weights(weights(engine.module), weights(model), 1e-5)


def test_fp16_autocast_equals_torchs_with_its_grad_scaler():
    """The loss is scaled, and the scale does not show in the result; GradScaler starts at 2^16 as the config does."""
    engine = Engine(seeded(Typed), config=config(torch_autocast={"enabled": True, "dtype": "float16"}))
    model = seeded(Typed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for step in range(5):
        with torch.autocast("cpu", torch.float16):
            loss = model(inputs(step))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        torch.testing.assert_close(engine.train_batch(inputs(step)), loss.detach(), rtol=1e-4, atol=1e-5)
    assert engine.module.computed == torch.float16
    assert engine.loss_scale == scaler.get_scale() == 2.0**16
    assert_same_weights(weights(engine.module), weights(model), 1e-4)


def test_autocast_ends_with_the_forward():
    """Code between forward and backward runs as the program says."""
    engine = Engine(seeded(), config=config(torch_autocast={"enabled": True}))
    loss = engine(inputs())
    assert not torch.is_autocast_enabled("cpu")
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    engine.backward(loss)


# -- the loss scale and backward() without the engine


class Predicts(Regression):
    def forward(self, x: Tensor) -> Any:
        return self.predict(x)


class PredictsTwo(Regression):
    def forward(self, x: Tensor) -> Any:
        hidden = self.predict(x)
        return hidden, hidden * 2


def grad_norm_of(model: nn.Module, losses: Any) -> float:
    """Of the sum of several backwards, in plain fp16."""
    for loss in losses(model):
        loss.backward()
    return float(torch.stack([p.grad.float().square().sum() for p in model.parameters()]).sum().sqrt())


def squares(output: Tensor) -> Tensor:
    return output.float().pow(2).mean()


def test_plain_backward_in_fp16_is_scaled_once():
    """N4: a single output's gradient takes the scale; the reported norm is the unscaled one."""
    engine = Engine(seeded(Predicts), config=config(**FP16))
    squares(engine(inputs())).backward()
    engine.step()
    expected = grad_norm_of(seeded(Predicts).half(), lambda m: [squares(m(inputs()))])
    assert engine.get_global_grad_norm() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("first", ["plain", "engine", "scale"])
@pytest.mark.parametrize("second", ["plain", "engine", "scale"])
def test_every_backward_before_a_step_is_scaled_once(first, second):
    """G5, N4: also when they are started in different ways."""
    engine = Engine(seeded(Predicts), config=config(**FP16))
    for how, factor in ((first, 1.0), (second, 3.0)):
        loss = squares(engine(inputs() * factor))
        if how == "engine":
            engine.backward(loss)
        else:
            (engine.scale(loss) if how == "scale" else loss).backward()
    engine.step()
    expected = grad_norm_of(seeded(Predicts).half(), lambda m: [squares(m(inputs())), squares(m(inputs() * 3.0))])
    assert engine.get_global_grad_norm() == pytest.approx(expected, rel=0.02)


def test_losses_scaled_early_are_scaled_once():
    """Both are scaled before the first backward runs."""
    engine = Engine(seeded(Predicts), config=config(**FP16))
    scaled = [engine.scale(squares(engine(inputs() * factor))) for factor in (1.0, 3.0)]
    for loss in scaled:
        loss.backward()
    engine.step()
    expected = grad_norm_of(seeded(Predicts).half(), lambda m: [squares(m(inputs())), squares(m(inputs() * 3.0))])
    assert engine.get_global_grad_norm() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("outputs", ["of one forward", "of two forwards"])
def test_plain_backward_in_fp16_through_several_outputs_is_scaled_once(outputs):
    """N4: although one of them is computed from the other."""
    model = PredictsTwo if outputs == "of one forward" else Predicts
    engine = Engine(seeded(model), config=config(**FP16))

    def loss(module: Any) -> Tensor:
        both = module(inputs()) if outputs == "of one forward" else (module(inputs()), module(inputs(1)))
        return squares(both[0]) + squares(both[1])

    loss(engine).backward()
    engine.step()
    expected = grad_norm_of(seeded(model).half(), lambda m: [loss(m)])
    assert engine.get_global_grad_norm() == pytest.approx(expected, rel=0.02)


def test_plain_backward_in_fp16_through_one_of_several_outputs_is_scaled_once():
    """N4: what the loss does not depend on does not matter."""
    engine = Engine(seeded(PredictsTwo), config=config(**FP16))
    squares(engine(inputs())[0]).backward()
    engine.step()
    expected = grad_norm_of(seeded(PredictsTwo).half(), lambda m: [squares(m(inputs())[0])])
    assert engine.get_global_grad_norm() == pytest.approx(expected, rel=0.02)


def test_plain_backward_in_fp16_scales_what_bypasses_the_output_too():
    """N4: a penalty on the weights beside the output."""
    engine = Engine(seeded(Predicts), config=config(**FP16))
    (squares(engine(inputs())) + squares(engine.module.first.weight)).backward()
    engine.step()
    expected = grad_norm_of(seeded(Predicts).half(), lambda m: [squares(m(inputs())) + squares(m.first.weight)])
    assert engine.get_global_grad_norm() == pytest.approx(expected, rel=0.02)


def test_a_scaled_loss_through_a_second_fp16_engine_is_scaled_once():
    """F5: the second engine's output adds no scale of its own."""
    first, second = engines = [Engine(seeded(Predicts, seed), config=config(**FP16)) for seed in range(2)]
    first.backward(squares(second(first(inputs()).expand(-1, 4))))
    first.step()
    plain = [seeded(Predicts, seed).half() for seed in range(len(engines))]
    expected = grad_norm_of(plain[0], lambda m: [squares(plain[1](m(inputs()).expand(-1, 4)))])
    assert first.get_global_grad_norm() == pytest.approx(expected, rel=0.02)


def test_gradients_for_inputs_are_not_scaled_in_fp16():
    """A gradient penalty: torch.autograd.grad() through the output."""
    engine = Engine(seeded(Predicts), config=config(**FP16))
    x = inputs().requires_grad_()
    (through_engine,) = torch.autograd.grad(engine(x).sum(), x)
    (through_module,) = torch.autograd.grad(engine.module(x).sum(), x)
    torch.testing.assert_close(through_engine, through_module)


def test_plain_backward_in_fp16_through_outputs_that_hide_in_an_object_is_scaled_once():
    """N4: no hook can be put on what pytree does not find, so step() is what ends such a backward."""

    class Hidden(Regression):
        def forward(self, x: Tensor) -> Any:
            return iter([self.predict(x)])

    engine = Engine(seeded(Hidden), config=config(**FP16))
    squares(next(engine(inputs()))).backward()
    engine.step()
    expected = grad_norm_of(seeded(Hidden).half(), lambda m: [squares(next(m(inputs())))])
    assert engine.get_global_grad_norm() == pytest.approx(expected, rel=0.02)


def test_in_fp32_plain_backward_may_go_through_anything():
    engine, other = (Engine(seeded(PredictsTwo), config=config()) for _ in range(2))
    for step in range(3):
        first, second = engine(inputs(step))
        (squares(first) + squares(second)).backward()
        engine.step()
        first, second = other(inputs(step))
        other.backward(squares(first) + squares(second))
        other.step()
    assert_same_weights(weights(engine.module), weights(other.module))


# -- buffers (F9)


class WithBuffers(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("in_half", torch.ones(2, dtype=torch.float16))
        self.register_buffer("in_double", torch.full((2,), 1 / 3, dtype=torch.float64))
        self.register_buffer("single", torch.full((2,), 1 / 3), persistent=False)
        self.register_buffer("count", torch.arange(2))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("nothing", None)
        self.first.register_buffer("shared", self.single)


KEPT = {"in_half": torch.float16, "in_double": torch.float64, "single": torch.float32, "first.shared": torch.float32}
WHOLE = {"count": torch.int64, "mask": torch.bool}


@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}, FP16], ids=["fp32", "bf16", "fp16"])
def test_buffers_keep_their_dtype_and_values_unless_asked(precision):
    """F9: a rotary table in bf16 is another table."""
    engine = Engine(seeded(WithBuffers), config=config(**precision))
    assert {name: b.dtype for name, b in engine.module.named_buffers(remove_duplicate=False)} == {**KEPT, **WHOLE}
    assert torch.equal(engine.module.in_double, torch.full((2,), 1 / 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("asked", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_buffer_dtype_casts_floating_point_buffers_only(asked, dtype):
    """F9: and what two modules share stays shared."""
    engine = Engine(seeded(WithBuffers), config=config(data_types={"buffer_dtype": asked}))
    found = {name: b.dtype for name, b in engine.module.named_buffers(remove_duplicate=False)}
    assert found == {**dict.fromkeys(KEPT, dtype), **WHOLE}
    assert engine.module.first.shared is engine.module.single


# -- module_state_dict


class Tied(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.second.weight = nn.Parameter(torch.ones(1, 5))
        self.twin = nn.Linear(5, 1, bias=False)
        self.twin.weight = self.second.weight
        self.empty = nn.Parameter(torch.ones(0, 3))


def test_module_state_dict_has_memory_of_its_own_and_keeps_ties():
    """C5, C7: neither the flat buffers nor the other weights hang on it, and training does not change it."""
    engine = Engine(seeded(Tied), config=config())
    engine.train_batch(inputs())
    state = engine.module_state_dict()
    assert state.keys() == engine.module.state_dict().keys()
    before = copy.deepcopy(state)
    for name, value in state.items():
        assert not value.requires_grad
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), name
    assert state["twin.weight"].data_ptr() == state["second.weight"].data_ptr()
    engine.train_batch(inputs(1))
    assert all(torch.equal(state[name], before[name]) for name in state)
    fresh = seeded(Tied, seed=1)
    fresh.load_state_dict(state, strict=True)
    assert_same_weights(weights(fresh), {name: before[name] for name, _ in fresh.named_parameters()})
