"""The engine as an `nn.Module`: what libraries ask of one, and what it refuses."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from partita import Engine, LifecycleError
from partita.zero import GatheredParameters
from small_models import Regression, assert_same_weights, config, inputs, seeded, weights
from torch import nn


class WithBuffer(Regression):
    """Has what a model has beside parameters: a buffer, an attribute, a method."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.name_or_path = "here"

    def encode(self) -> str:
        return "encoded"

    @property
    def broken(self) -> Any:
        return self.nothing_of_the_kind


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(seeded(WithBuffer), config=config())
    yield made
    made.destroy()


# -- what it shows


def test_an_engine_is_a_module_with_the_model_as_its_child(engine):
    """Names as those of DDP and of DeepSpeed's engine."""
    model = engine.module
    assert isinstance(engine, nn.Module)
    assert [name for name, _ in engine.named_children()] == ["module"]
    assert [name for name, _ in engine.named_parameters()] == [f"module.{n}" for n, _ in model.named_parameters()]
    assert all(a is b for a, b in zip(engine.parameters(), model.parameters(), strict=True))
    assert [name for name, _ in engine.named_buffers()] == ["module.mean"]
    assert list(engine.modules()) == [engine, *model.modules()]
    assert engine.get_parameter("module.first.weight") is model.first.weight
    assert "(first): Linear" in repr(engine)


def test_attributes_of_the_model_are_found_through_the_engine(engine):
    assert engine.name_or_path == "here"
    assert engine.encode() == "encoded"
    assert engine.first is engine.module.first
    assert engine.config.train_batch_size == 2  # the engine's own come first
    assert not hasattr(engine, "nothing")
    with pytest.raises(AttributeError, match=r"neither the engine nor its model has 'nothing'.*WithBuffer"):
        _ = engine.nothing
    with pytest.raises(AttributeError, match=r"neither the engine.*'broken'"):
        _ = engine.broken


def test_an_engine_that_was_never_made_has_no_attributes_and_no_endless_recursion():
    with pytest.raises(AttributeError, match="no attribute 'module'"):
        _ = Engine.__new__(Engine).module


class WithFault(Engine):
    """Has a property that fails."""

    @property
    def odd(self) -> Any:
        raise AttributeError("from the inside")


def test_an_attribute_error_inside_the_engine_is_its_own():
    """A property that fails is not looked up in the model."""
    with pytest.raises(AttributeError, match=r"^from the inside$"):
        _ = WithFault(seeded(), config=config()).odd


def test_modes_are_the_models(engine):
    assert engine.eval() is engine
    assert not any(module.training for module in engine.modules())
    assert engine.train() is engine
    assert all(module.training for module in engine.modules())
    engine.module.eval()
    assert not engine.training
    engine.training = True
    assert engine.module.training
    assert not engine.first.training


def test_forward_hooks_of_the_engine_run_and_forward_is_the_call(engine):
    seen: list[str] = []
    handles = [
        engine.register_forward_pre_hook(lambda module, args: seen.append("before")),
        engine.register_forward_hook(lambda module, args, output: seen.append("after")),
    ]
    loss = engine(inputs())
    assert seen == ["before", "after"]
    for handle in handles:
        handle.remove()
    engine.zero_grad(set_to_none=True)
    again = engine.forward(inputs())
    assert torch.equal(loss, again)
    engine.backward(again)
    engine.step()
    with pytest.raises(LifecycleError):
        engine.step()


def test_apply_reaches_the_weights_and_training_goes_on_from_there(engine):
    def fill(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.5)

    plain = seeded(WithBuffer)
    plain.apply(fill)
    other = Engine(plain, config=config())
    assert engine.apply(fill) is engine
    for each in (engine, other):
        each.train_batch(inputs())
    assert_same_weights(weights(engine.module), weights(other.module))


# -- state dicts


@pytest.mark.parametrize("settings", [{}, {"bf16": {"enabled": True}}, {"zero_optimization": {"stage": 2}}])
def test_a_state_dict_goes_round_with_the_names_of_the_engine(settings):
    engine, other = (Engine(seeded(WithBuffer), config=config(**settings)) for _ in range(2))
    engine.train_batch(inputs())
    state = {name: value.clone() for name, value in engine.state_dict().items()}
    assert list(state) == [f"module.{name}" for name in engine.module.state_dict()]
    missing, unexpected = other.load_state_dict(state)
    assert (missing, unexpected) == ([], [])
    assert_same_weights(weights(engine.module), weights(other.module))
    other.train_batch(inputs(1))  # the masters are those of the loaded weights
    assert not torch.equal(other.first.weight, state["module.first.weight"])


def test_what_does_not_fit_is_named(engine):
    state = engine.state_dict()
    with pytest.raises(ValueError, match=r"'mean' does not begin with 'module.'.*load_module_state_dict"):
        engine.load_state_dict(engine.module.state_dict())
    with pytest.raises(ValueError, match="'extra' is not in the model"):
        engine.load_state_dict({**state, "module.extra": torch.ones(1)})
    with pytest.raises(ValueError, match="assign"):
        engine.load_state_dict(state, assign=True)
    missing, unexpected = engine.load_state_dict(
        {"module.mean": torch.ones(3), "module.extra": torch.ones(1)}, strict=False
    )
    assert missing == [name for name in state if name != "module.mean"]
    assert unexpected == ["module.extra"]
    assert engine.mean.tolist() == [1.0, 1.0, 1.0]


def test_absent_parameters_have_no_state_dict_and_all_else_works():
    """Stage 3 where parameters come and go: the error names what gathers them."""
    offload = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, **offload}
    engine, other = (Engine(seeded(WithBuffer), config=config(zero_optimization=zero)) for _ in range(2))
    engine.train_batch(inputs())
    with pytest.raises(RuntimeError, match=r"'first.weight'.*module_state_dict\(\)"):
        engine.state_dict()
    assert engine.to("cpu") is engine
    assert sum(p.numel() for p in engine.parameters()) == 31
    full = engine.module_state_dict()
    other.load_state_dict({f"module.{name}": value for name, value in full.items()})
    with GatheredParameters(other.parameters()):
        assert all(torch.equal(value, full[name.removeprefix("module.")]) for name, value in other.state_dict().items())


# -- what is refused

CONVERSIONS: dict[str, tuple[Callable[[Engine], Any], str | None]] = {
    # what: (call, what a bf16 model with fp32 buffers would become; None: nothing changes)
    "to(device)": (lambda e: e.to("cpu"), None),
    "to(device, dtype)": (lambda e: e.to("cpu", torch.bfloat16), "'mean' would become bfloat16 on cpu"),
    "cpu": (lambda e: e.cpu(), None),
    "half": (lambda e: e.half(), r"'first.weight' would become float16 on cpu \(it is bfloat16 on cpu\)"),
    "float": (lambda e: e.float(), "'first.weight' would become float32"),
    "double": (lambda e: e.double(), "'first.weight' would become float64"),
    "bfloat16": (lambda e: e.bfloat16(), "'mean' would become bfloat16"),
    "type": (lambda e: e.type(torch.float16), "'first.weight' would become float16"),
    "to(meta)": (lambda e: e.to("meta"), "'first.weight' would become bfloat16 on meta"),
    "to_empty": (lambda e: e.to_empty(device="cpu"), None),
    "share_memory": (lambda e: e.share_memory(), "share_memory"),
    "compile": (lambda e: e.compile(), "compile the model before initialize"),
    "module attribute": (lambda e: setattr(e, "head", nn.Linear(2, 2)), "engine.head would be beside the model"),
    "model": (lambda e: setattr(e, "module", nn.Linear(2, 2)), "engine.module would be beside"),
    "parameter attribute": (lambda e: setattr(e, "head", nn.Parameter(torch.ones(2))), "engine.head would be"),
    "add_module": (lambda e: e.add_module("head", nn.Linear(2, 2)), "engine.head would be"),
    "register_module": (lambda e: e.register_module("head", nn.Linear(2, 2)), "engine.head would be"),
    "register_parameter": (lambda e: e.register_parameter("head", nn.Parameter(torch.ones(2))), "engine.head"),
    "register_buffer": (lambda e: e.register_buffer("head", torch.ones(2)), "engine.head"),
}


@pytest.mark.parametrize("what", CONVERSIONS)
def test_a_change_is_nothing_or_refused_by_name(what):
    """Nothing if it asks for what is so; and a refusal leaves everything as it was."""
    engine = Engine(seeded(WithBuffer), config=config(bf16={"enabled": True}))
    before = {name: value.clone() for name, value in engine.state_dict().items()}
    call, problem = CONVERSIONS[what]
    if problem is None:
        assert call(engine) is engine
    else:
        with pytest.raises(RuntimeError, match=problem):
            call(engine)
    after = engine.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    engine.train_batch(inputs())


def test_another_memory_format_is_refused():
    model = nn.Sequential(nn.Conv2d(2, 2, 2), nn.Flatten(), nn.Linear(2, 1))
    engine = Engine(model, config=config())
    with pytest.raises(RuntimeError, match=r"'0.weight' would become a tensor of another memory format"):
        engine.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "copies", [copy.deepcopy, copy.copy, pickle.dumps, lambda e: torch.save(e, io.BytesIO())], ids=repr
)
def test_an_engine_is_neither_copied_nor_pickled(engine, copies):
    """Also where the model has a __deepcopy__ of its own."""
    engine.module.__deepcopy__ = lambda memo: None
    with pytest.raises(TypeError, match=r"cannot be copied or pickled.*module_state_dict\(\)"):
        copies(engine)


def test_an_engine_that_is_let_go_of_is_gone_without_the_garbage_collector():
    """No reference cycle holds what it has."""
    gc.collect()
    gc.disable()
    try:
        engine = Engine(seeded(WithBuffer), config=config())
        engine.train_batch(inputs())
        engine.state_dict()
        engine.to("cpu")
        gone, model = weakref.ref(engine), weakref.ref(engine.module)
        engine.destroy()
        del engine
        assert gone() is None
        assert model() is None
    finally:
        gc.enable()
