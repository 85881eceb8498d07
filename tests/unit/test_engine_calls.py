"""The engine in one process: the order of its calls, what backward takes, recovery, and its three front doors."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import partita
import pytest
import torch
from partita import Engine, LifecycleError
from small_models import Regression, assert_same_weights, config, inputs, seeded, weights
from torch import Tensor, nn


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(seeded(), config=config())
    yield made
    made.destroy()


# -- order


def after_forward(engine: Engine) -> Tensor:
    return engine(inputs())


def after_backward(engine: Engine) -> Tensor:
    return engine.backward(engine(inputs()))


def after_step(engine: Engine) -> None:
    after_backward(engine)
    engine.step()


def after_destroy(engine: Engine) -> None:
    engine.destroy()


LOSS = torch.ones((), requires_grad=True)
WRONG_ORDERS: dict[str, tuple[Callable[[Engine], Any], Callable[[Engine], Any], str, str, str]] = {
    # case: (before, call, name in the message, phase it is in, phase it needs)
    "step first": (lambda e: None, lambda e: e.step(), "step", "READY", "BACKWARD"),
    "step after forward": (after_forward, lambda e: e.step(), "step", "FORWARD", "BACKWARD"),
    "step twice": (after_step, lambda e: e.step(), "step", "READY", "BACKWARD"),
    "forward after destroy": (after_destroy, lambda e: e(inputs()), "__call__", "DESTROYED", "READY"),
    "backward after destroy": (after_destroy, lambda e: e.backward(LOSS), "backward", "DESTROYED", "FORWARD"),
    "step after destroy": (after_destroy, lambda e: e.step(), "step", "DESTROYED", "BACKWARD"),
    "train_batch after destroy": (after_destroy, lambda e: e.train_batch(inputs()), "__call__", "DESTROYED", "READY"),
    "eval_batch after destroy": (after_destroy, lambda e: e.eval_batch(inputs()), "__call__", "DESTROYED", "READY"),
}


@pytest.mark.parametrize("case", WRONG_ORDERS)
def test_a_call_in_the_wrong_phase_names_the_call_and_both_phases(engine, case):
    """Habit 4, promise 7."""
    before, call, name, phase, needed = WRONG_ORDERS[case]
    before(engine)
    with pytest.raises(LifecycleError, match=rf"engine\.{name}\(\).*in phase {phase} .*needs phase .*{needed}"):
        call(engine)


def test_a_wrong_call_leaves_the_engine_as_it_was(engine):
    """A caught error costs nothing: the step that follows is the one that would have been."""
    other = Engine(seeded(), config=config())
    loss = engine(inputs())
    with pytest.raises(LifecycleError):
        engine.step()
    engine.backward(loss)
    engine.step()
    other.train_batch(inputs())
    assert_same_weights(weights(engine.module), weights(other.module))


def test_destroy_twice_is_harmless_and_the_model_goes_on_without_the_engine(engine):
    model = engine.module
    engine.destroy()
    engine.destroy()
    model(inputs()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (3.0, "float"),
        (None, "NoneType"),
        ((torch.ones(()),), "tuple"),
        (torch.ones(2, 3, requires_grad=True), r"shape \(2, 3\)"),
        (torch.ones(0, requires_grad=True), r"shape \(0,\)"),
    ],
)
def test_backward_takes_a_scalar_and_names_anything_else(engine, loss, what):
    """Promise 7."""
    engine(inputs())
    with pytest.raises(ValueError, match=what):
        engine.backward(loss)


def test_backward_returns_the_loss_that_it_was_given(engine):
    loss = engine(inputs())
    assert engine.backward(loss) is loss


def test_forwards_without_gradients_begin_no_micro_batch(engine):
    with torch.no_grad():
        engine(inputs())
    engine.eval_batch(inputs())
    with pytest.raises(LifecycleError, match="READY"):
        engine.step()


LOSSES: dict[str, Callable[[Engine], Tensor]] = {
    "evaluation mode": lambda e: e.eval()(inputs()),
    "the model itself": lambda e: e.module(inputs()),
    "another method": lambda e: e.module.predict(inputs()).float().pow(2).mean(),
    "a part": lambda e: e.module.second(torch.tanh(e.module.first(inputs()))).pow(2).mean(),
}


@pytest.mark.parametrize("plain", [False, True], ids=["engine.backward", "loss.backward"])
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("kind", LOSSES)
def test_a_backward_needs_gradients_and_no_more(kind, stage, plain):
    """F50. Neither training mode nor a forward of the engine."""
    engine, other = (Engine(seeded(), config=config(zero_optimization={"stage": stage})) for _ in range(2))
    for _ in range(2):
        loss = LOSSES[kind](engine)
        loss.backward() if plain else engine.backward(loss)
        engine.step()
        other.train_batch(inputs())
    assert_same_weights(weights(engine.module), weights(other.module))
    assert engine.global_steps == 2


def no_grad_loss(engine: Engine) -> Tensor:
    with torch.no_grad():
        return engine(inputs())


MISTAKES: dict[str, tuple[Callable[[Engine], Any], list[str]]] = {
    # what a new user writes: (the calls, what the message must say)
    "no_grad": (lambda e: e.backward(no_grad_loss(e)), ["no_grad()", "loss = engine(batch)"]),
    "inference_mode": (
        lambda e: e.backward(torch.inference_mode()(e)(inputs())),
        ["inference_mode()", "loss = engine(batch)"],
    ),
    "detached": (lambda e: e.backward(e(inputs()).detach()), ["detached", "engine.backward()"]),
    "item": (lambda e: e.backward(e(inputs()).item()), ["not a float", "engine.backward(loss)", "loss.item()"]),
    "step alone": (lambda e: e.step(), ["no gradients", "engine.backward(loss)"]),
    "no backward": (lambda e: (e(inputs()), e.step()), ["no backward", "engine.backward(loss)"]),
    "destroyed": (lambda e: (e.destroy(), e(inputs())), ["destroy()", "initialize()"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_a_new_user_forgets_is_named_with_the_way_out(engine, mistake):
    """Promise 7; the step that follows is as if nothing had been."""
    calls, says = MISTAKES[mistake]
    with pytest.raises((LifecycleError, ValueError)) as raised:
        calls(engine)
    assert [words for words in says if words not in str(raised.value)] == [], raised.value
    if mistake != "destroyed":
        engine.train()
        engine.zero_grad()
        other = Engine(seeded(), config=config())
        engine.train_batch(inputs())
        other.train_batch(inputs())
        assert_same_weights(weights(engine.module), weights(other.module))


def test_a_lifecycle_error_pickles(engine):
    """F24: a parent process that gets it from a pool would hang."""
    with pytest.raises(LifecycleError) as raised:
        engine.step()
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


# -- exceptions and what comes after them


class Fragile(nn.Module):
    """Identity whose backward raises while `broken`."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = False

    def forward(self, x: Tensor) -> Tensor:
        if self.broken:
            x.register_hook(_raise)
        return x * 1.0


def _raise(_grad: Tensor) -> None:
    raise ZeroDivisionError("in backward")


class WithFragile(Regression):
    """Half of the parameters have their gradient when backward breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.fragile = Fragile()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fragile(torch.tanh(self.first(x.to(self.first.weight.dtype))))
        return self.second(hidden).float().pow(2).mean()


@pytest.mark.parametrize("precision", [{}, {"fp16": {"enabled": True, "initial_scale_power": 8}}], ids=["fp32", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("plain", [False, True], ids=["engine.backward", "loss.backward"])
@pytest.mark.parametrize("broken_micro_batch", [0, 1])
def test_after_an_exception_in_backward_zero_grad_begins_the_step_anew(stage, precision, plain, broken_micro_batch):
    """S2, F4: the result is that of a run in which the broken step was never tried."""
    settings = config(
        gradient_accumulation_steps=2,
        zero_optimization={"stage": stage, "reduce_bucket_size": 10},
        optimizer={"type": "SGD", "params": {"lr": 0.1}},
        **precision,
    )
    broken, whole = (Engine(seeded(WithFragile), config=copy.deepcopy(settings)) for _ in range(2))
    for step in range(4):
        if step == 2:  # overlap has begun
            for micro_batch in range(broken_micro_batch + 1):
                broken.module.fragile.broken = micro_batch == broken_micro_batch
                loss = broken(inputs(77))
                if broken.module.fragile.broken:
                    with pytest.raises(ZeroDivisionError):
                        loss.backward() if plain else broken.backward(loss)
                else:
                    broken.backward(loss)
                    broken.step()
            broken.module.fragile.broken = False
            broken.zero_grad()
        for engine in (broken, whole):
            for part in inputs(step).chunk(2):
                loss = engine(part)
                loss.backward() if plain else engine.backward(loss)
                engine.step()
    assert broken.global_steps == whole.global_steps == 4
    assert_same_weights(weights(broken.module), weights(whole.module))
    assert broken.loss_scale == whole.loss_scale


def test_an_exception_in_forward_leaves_the_engine_ready(engine):
    with pytest.raises(RuntimeError):
        engine(torch.ones(2, 3))
    engine.train_batch(inputs())
    assert engine.global_steps == 1


# -- evaluation


class PartlyEval(Regression):
    """A part of the model stays in evaluation mode, as frozen normalisation does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("raises", [False, True])
def test_eval_batch_restores_the_mode_of_every_module(training, raises):
    """S2: also of one that was in another mode than the model, and after an exception."""
    model = seeded(PartlyEval).train(training)
    model.norm.train(not training)
    modes = {name: m.training for name, m in model.named_modules()}
    engine = Engine(model, config=config())
    if raises:
        with pytest.raises(RuntimeError):
            engine.eval_batch(torch.ones(2, 3))
    else:
        output = engine.eval_batch(inputs())
        assert not output.requires_grad
    assert {name: m.training for name, m in model.named_modules()} == modes


def test_eval_batch_between_forward_and_backward_changes_nothing(engine):
    """S2."""
    other = Engine(seeded(), config=config())
    loss = engine(inputs())
    engine.eval_batch(inputs(5))
    engine.backward(loss)
    engine.eval_batch(inputs(6))
    engine.step()
    other.train_batch(inputs())
    assert_same_weights(weights(engine.module), weights(other.module))


# -- the front doors


def test_engine_and_both_initialize_are_the_same_thing(tmp_path):
    """One set of arguments, three spellings; the config as dict, path and object."""
    path = tmp_path / "config.json"
    direct = Engine(seeded(), config=config())
    direct.save_config(path)
    loaded = partita.Engine.initialize(model=seeded(), config=path)
    called = partita.initialize(seeded(), config=direct.config)
    losses = []
    for engine in (direct, loaded[0], called[0]):
        losses.append([engine.train_batch(inputs(step)).item() for step in range(3)])
    assert losses[0] == losses[1] == losses[2]
    assert_same_weights(weights(direct.module), weights(loaded[0].module))
    assert_same_weights(weights(direct.module), weights(called[0].module))
    for made in (loaded, called):
        assert (made[0].optimizer, made[0].dataloader, made[0].lr_scheduler) == made[1:]
        assert made[2] is None
        assert made[3] is None


def test_initialize_gives_a_loader_and_a_schedule_when_asked():
    samples = [(inputs(i, 1)[0],) for i in range(8)]
    schedule = {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}
    engine, optimizer, loader, scheduler = partita.initialize(
        seeded(), training_data=samples, config=config(scheduler=schedule)
    )
    assert len(loader) == 4
    assert next(iter(loader))[0].shape == (2, 4)
    assert scheduler.optimizer is optimizer
    engine.train_batch()
    assert engine.global_steps == 1


def test_a_saved_config_is_the_config_with_batch_sizes_filled_in(tmp_path, engine):
    """save_config round trip."""
    engine.save_config(tmp_path / "saved.json")
    saved = Engine(seeded(), config=str(tmp_path / "saved.json"))
    assert saved.config == engine.config
    assert (saved.config.train_batch_size, saved.config.gradient_accumulation_steps) == (2, 1)
    saved.save_config(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "saved.json").read_bytes()


def test_a_config_is_saved_without_a_path_too(tmp_path, engine, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = engine.save_config()
    assert Engine(seeded(), config=path).config == engine.config
    assert [path.name] == [found.name for found in tmp_path.iterdir()] == ["partita_config.json"]


def test_a_config_without_a_path_is_beside_the_last_checkpoint(tmp_path, engine, caplog):
    engine.save_checkpoint(tmp_path / "runs")
    with caplog.at_level("INFO", logger="partita"):
        path = engine.save_config()
    assert path == tmp_path / "runs" / "partita_config.json" and str(path) in caplog.text
    assert Engine(seeded(), config=path).config == engine.config
    engine.load_checkpoint(tmp_path / "runs")  # which has another file beside it now


def test_optimizer_step_and_state_dict_point_to_the_engine(engine):
    """Promise 7: the calls of a plain loop that would silently do the wrong thing."""
    after_backward(engine)
    with pytest.raises(RuntimeError, match=re.escape("engine.step()")):
        engine.optimizer.step()
    engine.step()
    assert engine.get_global_grad_norm() > 0


def test_a_step_after_a_backward_that_failed_is_refused():
    """The gradients of those before it are not those of the micro-batch."""
    engine = partita.Engine(seeded(), config=config())
    loss = engine.backward(engine(inputs()))
    with pytest.raises(RuntimeError, match="second time"):
        engine.backward(loss)
    with pytest.raises(LifecycleError, match=r"step\(\) was called in phase FORWARD"):
        engine.step()
    engine.zero_grad()
    engine.train_batch(inputs())
