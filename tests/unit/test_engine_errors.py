"""Promise 7: every error names the thing at fault and what to do. A table of what `initialize()` refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import partita
import pytest
import torch
from partita import ConfigError
from small_models import Regression, config, inputs, seeded
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR

SPLIT = {"enabled": True, "master_weights": "split"}


def initialize(settings: Any = None, make: Callable[[], nn.Module] = Regression, **arguments: Any) -> partita.Engine:
    return partita.initialize(seeded(make), config=config() if settings is None else settings, **arguments)[0]


class WithFloat64(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Linear(2, 2, dtype=torch.float64)


class WithComplex(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Parameter(torch.ones(2, dtype=torch.complex64))


class WithMeta(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Linear(2, 2, device="meta")


class WithFrozenMeta(WithMeta):
    def __init__(self) -> None:
        super().__init__()
        self.odd.requires_grad_(False)


class WithMetaBuffer(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("odd", torch.ones(2, device="meta"))


def foreign() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(3, 7))], lr=0.1)


def stepped() -> partita.Engine:
    model = seeded()
    optimizer = torch.optim.AdamW(model.parameters())
    model(inputs()).backward()
    optimizer.step()
    return partita.Engine(model, optimizer, config=config())


def plateau(optimizer: Any) -> Any:
    return ReduceLROnPlateau(optimizer)


# what: (call, error, every word that the message must have)
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    # config (F1)
    "unknown key": (lambda: initialize({"train_batchsize": 4}), ConfigError, ["train_batchsize", "'train_batch_size'"]),
    "unknown key at depth": (
        lambda: initialize({"zero_optimization": {"reduce_bucket_sise": 1}}),
        ConfigError,
        ["zero_optimization.reduce_bucket_sise", "'reduce_bucket_size'"],
    ),
    "key of another section": (lambda: initialize({"stage": 2}), ConfigError, ["stage", "'zero_optimization.stage'"]),
    "bad value": (
        lambda: initialize({"zero_optimization": {"stage": 7}}),
        ConfigError,
        ["zero_optimization.stage = 7", "0", "3"],
    ),
    "bad type": (lambda: initialize({"gradient_clipping": "much"}), ConfigError, ["gradient_clipping = 'much'"]),
    "several at once": (
        lambda: initialize({"a": 1, "bf16": {"enabled": 3}}),
        ConfigError,
        ["2 problems", "bf16.enabled"],
    ),
    "batch sizes": (
        lambda: initialize(config(train_batch_size=5, gradient_accumulation_steps=2)),
        ConfigError,
        [
            "train_batch_size = 5",
            "train_micro_batch_size_per_gpu = 2",
            "gradient_accumulation_steps = 2",
            "2 x 2 x 1 = 4",
        ],
    ),
    "batch that does not divide": (
        lambda: initialize(config(train_batch_size=5)),
        ConfigError,
        ["train_batch_size = 5", "train_micro_batch_size_per_gpu = 2", "4 or 6"],
    ),
    "missing file": (lambda: initialize("/nowhere/config.json"), ConfigError, ["/nowhere/config.json"]),
    "not a config": (lambda: initialize(3), ConfigError, ["int", "dict"]),
    # optimizer
    "unknown optimizer": (
        lambda: initialize(config(optimizer={"type": "AdmW"})),
        ConfigError,
        ["optimizer.type", "AdmW", "'AdamW'"],
    ),
    "unknown argument": (
        lambda: initialize(config(optimizer={"type": "AdamW", "params": {"weight_decy": 0}})),
        ConfigError,
        ["optimizer.params", "weight_decy", "'weight_decay'"],
    ),
    "value out of range": (
        lambda: initialize(config(optimizer={"type": "AdamW", "params": {"lr": -1}})),
        ConfigError,
        ["optimizer.params", "optimizer.params.lr = -1"],
    ),
    "foreign parameters": (lambda: initialize(optimizer=foreign()), ValueError, ["group 0", "(3, 7)", "initialize()"]),
    "foreign model_parameters": (
        lambda: initialize(model_parameters=[nn.Parameter(torch.ones(3, 7))]),
        ValueError,
        ["group 0", "(3, 7)"],
    ),
    "no optimizer": (lambda: initialize(optimizer="AdamW"), TypeError, ["optimizer", "str"]),
    "makes no optimizer": (lambda: initialize(optimizer=lambda p: 3), TypeError, ["optimizer", "int"]),
    "used optimizer": (stepped, ValueError, ["AdamW", "state", "fresh"]),
    "split masters without bf16": (
        lambda: initialize(config(bf16={"master_weights": "split"})),
        ConfigError,
        ["bf16", "master_weights", "split", "enabled"],
    ),
    "split masters of SGD": (
        lambda: initialize(config(optimizer={"type": "SGD", "params": {"lr": 0.1}}, bf16=SPLIT)),
        ValueError,
        ["SGD", "bf16.master_weights", "split", "AdamW"],
    ),
    "split masters of amsgrad": (
        lambda: initialize(config(bf16=SPLIT), optimizer=lambda p: torch.optim.Adam(p, amsgrad=True)),
        ValueError,
        ["Adam", "bf16.master_weights", "options"],
    ),
    # schedule
    "metric schedule": (lambda: initialize(lr_scheduler=plateau), TypeError, ["ReduceLROnPlateau", "step(metric)"]),
    "no step()": (lambda: initialize(lr_scheduler=3), TypeError, ["lr_scheduler", "int", "step()"]),
    "makes no schedule": (lambda: initialize(lr_scheduler=lambda o: "x"), TypeError, ["lr_scheduler", "str", "step()"]),
    "unknown schedule": (
        lambda: initialize(config(scheduler={"type": "WarmupLRR"})),
        ConfigError,
        ["scheduler", "WarmupLRR", "WarmupLR"],
    ),
    "unknown schedule argument": (
        lambda: initialize(config(scheduler={"type": "WarmupLR", "params": {"warmup_steps": 3}})),
        ConfigError,
        ["scheduler", "warmup_steps"],
    ),
    "schedule without optimizer": (
        lambda: initialize({"scheduler": {"type": "WarmupLR"}}),
        ConfigError,
        ["scheduler", "WarmupLR", "optimizer"],
    ),
    # parameters
    "float64": (lambda: initialize(make=WithFloat64), TypeError, ["'odd.weight'", "float64", "freeze"]),
    "complex": (lambda: initialize(make=WithComplex), TypeError, ["'odd'", "complex64"]),
    "meta": (lambda: initialize(make=WithMeta), ValueError, ["'odd.weight'", "meta", "to_empty()"]),
    "frozen meta": (lambda: initialize(make=WithFrozenMeta), ValueError, ["'odd.weight'", "meta", "to_empty()"]),
    "meta buffer": (lambda: initialize(make=WithMetaBuffer), ValueError, ["'odd'", "meta", "to_empty()"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_initialize_refuses_and_names(what):
    """Promise 7, F1."""
    call, error, words = REFUSED[what]
    with pytest.raises(error) as raised:
        call()
    missing = [word for word in words if word not in str(raised.value)]
    assert not missing, f"{missing} not in: {raised.value}"


@pytest.mark.parametrize("lr_scheduler", [plateau, 3])
def test_a_refused_initialize_leaves_the_model_free_for_the_next(lr_scheduler):
    """F5: nothing of the failed engine takes gradients away from the model or from the next engine."""
    model, other = seeded(), seeded()
    with pytest.raises(TypeError):
        partita.initialize(model, config=config(), lr_scheduler=lr_scheduler)
    engine, reference = partita.Engine(model, config=config()), partita.Engine(other, config=config())
    for step in range(3):
        assert engine.train_batch(inputs(step)).item() == reference.train_batch(inputs(step)).item()


def test_a_model_has_one_engine_at_a_time():
    """F5: the second engine would see no gradients, as the first consumes them."""
    model = seeded()
    first = partita.Engine(model, config=config())
    with pytest.raises(ValueError, match=r"'first\.weight' is trained by another engine.*destroy\(\)"):
        partita.Engine(model, config=config())
    first.train_batch(inputs())  # not disturbed by the attempt
    first.destroy()
    partita.Engine(model, config=config()).train_batch(inputs())


# -- what happens to a model after initialize()


def replace_data(model: nn.Module) -> None:
    model.second.weight.data = model.second.weight.data.clone()


def convert(model: nn.Module) -> None:
    model.to(torch.bfloat16)


def exchange_module(model: nn.Module) -> None:
    model.second = nn.Linear(5, 1)


def exchange_parameter(model: nn.Module) -> None:
    model.second.weight = nn.Parameter(torch.ones(1, 5))


def load_with_assign(model: nn.Module) -> None:
    model.load_state_dict(Regression().state_dict(), assign=True)


def unfreeze(model: nn.Module) -> None:
    model.first.weight.requires_grad_(True)


def add_parameter(model: nn.Module) -> None:
    model.first.adapter = nn.Linear(5, 5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (replace_data, r"memory of parameter 'second\.weight' was replaced.*copy_\(\)"),
        (convert, r"memory of parameter '\w+\.\w+' was replaced.*convert the model before"),
        (exchange_module, r"'second\.\w+' is no longer in the model"),
        (exchange_parameter, r"'second\.weight' is no longer in the model"),
        (load_with_assign, r"'\w+\.\w+' is no longer in the model.*assign"),
        (unfreeze, r"'first\.weight' was frozen.*freeze it again"),
        (add_parameter, r"'first\.adapter\.weight' was added"),
    ],
)
def test_a_change_that_training_would_not_reach_is_named(change, says):
    """Promise 7, S4: training would go on and change nothing that the model uses."""
    model = seeded()
    model.first.weight.requires_grad_(False)
    engine = partita.Engine(model, config=config())
    engine.train_batch(inputs())
    change(model)
    with pytest.raises(RuntimeError, match=says):
        engine.train_batch(inputs(1))


def test_changes_that_training_reaches_are_no_error():
    """Wrapping a module, writing in place, freezing again, adding something frozen."""
    model = seeded()
    model.first.bias.requires_grad_(False)
    engine = partita.Engine(model, config=config())
    model.second = nn.Sequential(model.second)
    model.first.bias.requires_grad_(True)
    model.first.bias.requires_grad_(False)
    model.extra = nn.Linear(2, 2).requires_grad_(False)
    with torch.no_grad():
        model.first.weight.copy_(torch.ones(5, 4))
    model.load_state_dict(model.state_dict())
    for step in range(2):
        engine.train_batch(inputs(step))
    assert engine.global_steps == 2


def test_frozen_integers_and_expanded_buffers_are_accepted():
    """What is not trained may be of any type and strides."""
    model = seeded()
    model.ids = nn.Parameter(torch.arange(3), requires_grad=False)
    model.register_buffer("mask", torch.zeros(1).expand(5))
    model.register_buffer("turned", torch.arange(6.0).reshape(2, 3).t())
    engine = partita.Engine(model, config=config(bf16={"enabled": True}))
    engine.train_batch(inputs())
    assert model.ids.tolist() == [0, 1, 2]
    assert model.mask.tolist() == [0.0] * 5
    assert model.turned.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


@pytest.mark.parametrize("make", [lambda o: StepLR(o, 1), lambda o: LambdaLR(o, lambda k: 1 / (k + 1))])
def test_torch_schedules_are_accepted_over_either_optimizer(make):
    """As a function of the optimizer, or made over the user's own."""
    model = seeded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    engine = partita.Engine(model, optimizer, lr_scheduler=make(optimizer), config=config())
    other = partita.Engine(seeded(), torch.optim.AdamW, lr_scheduler=make, config=config())
    engine.train_batch(inputs())
    other.train_batch(inputs())
    assert engine.get_lr()[0] < 1.0
    assert other.get_lr()[0] < 1e-3


def test_named_parameters_are_accepted_as_torch_does():
    model = seeded()
    engine = partita.initialize(model, model_parameters=model.named_parameters(), config=config())[0]
    engine.train_batch(inputs())
    assert engine.get_global_grad_norm() > 0


def test_a_refused_engine_leaves_no_hooks():
    """Whatever refuses its arguments does so before the model is touched by hooks."""
    model = nn.Linear(2, 2)
    zero = {"stage": 1, "overlap_gather": True}
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW"}, "zero_optimization": zero}
    with pytest.raises(TypeError, match="has no step"):
        partita.Engine(model, config=config, lr_scheduler=7)
    assert not model._forward_pre_hooks
    engine = partita.Engine(model, config=config)
    assert model._forward_pre_hooks
    engine.destroy()
    assert not model._forward_pre_hooks
