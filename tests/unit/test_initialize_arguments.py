"""How `initialize()` may be called, and what it says to arguments of the wrong kind before anything else happens."""

from __future__ import annotations

import inspect
import json
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import partita
import pytest
import torch
from partita import ConfigError, Engine
from small_models import Regression, assert_same_weights, config, inputs, seeded, weights
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

DATA = [(inputs(i, 1)[0],) for i in range(8)]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def halving(optimizer: Any) -> Any:
    return StepLR(optimizer, 1, gamma=0.5)


# -- what works

ARGS = Namespace(local_rank=0, deepspeed=True, deepspeed_config=None)
WITH_CONFIG = Namespace(deepspeed_config=config())
CALLS: dict[str, Callable[[Any], Any]] = {
    "names": lambda m: partita.initialize(model=m, optimizer=sgd, lr_scheduler=halving, config=config()),
    "places": lambda m: partita.initialize(m, sgd, None, None, halving, config(), list),
    "model, then names": lambda m: partita.initialize(m, config=config(), optimizer=sgd, lr_scheduler=halving),
    "DeepSpeed's names": lambda m: partita.initialize(
        args=ARGS,
        model=m,
        optimizer=sgd,
        model_parameters=m.parameters(),
        training_data=None,
        lr_scheduler=halving,
        distributed_port=29500,
        mpu=None,
        dist_init_required=True,
        collate_fn=None,
        config=None,
        mesh_param=None,
        config_params=config(),
    ),
    "DeepSpeed's places": lambda m: partita.initialize(
        ARGS, m, sgd, None, None, halving, 29500, None, None, None, config()
    ),
    "args, model, then names": lambda m: partita.initialize(WITH_CONFIG, m, optimizer=sgd, lr_scheduler=halving),
    "None, model": lambda m: partita.initialize(None, m, sgd, lr_scheduler=halving, config=config()),
    "args, then names": lambda m: partita.initialize(WITH_CONFIG, model=m, optimizer=sgd, lr_scheduler=halving),
    "args with a dict": lambda m: partita.initialize(
        args={"deepspeed": config()}, model=m, optimizer=sgd, lr_scheduler=halving
    ),
    "the same config twice": lambda m: partita.initialize(
        WITH_CONFIG, m, sgd, lr_scheduler=halving, config=config(steps_per_print=None, comm={}) | config()
    ),
    "Engine": lambda m: (Engine(m, sgd, lr_scheduler=halving, config_dict=config()),),
    "Engine.initialize": lambda m: Engine.initialize(WITH_CONFIG, m, sgd, lr_scheduler=halving),
    "Engine, either": lambda m: (Engine(m, sgd, lr_scheduler=halving, config_dict_or_path=config()),),
}


@pytest.fixture(scope="module")
def expected() -> Any:
    model = seeded()
    optimizer = sgd(model.parameters())
    for step in range(2):
        for part in inputs(step).chunk(1):
            model(part).backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] *= 0.5
    return weights(model)


@pytest.mark.parametrize("call", CALLS)
def test_every_way_to_call_trains_the_same(call, expected):
    engine = CALLS[call](seeded())[0]
    assert engine.train_micro_batch_size_per_gpu() == 2
    for step in range(2):
        engine.train_batch(inputs(step))
    assert_same_weights(weights(engine.module), expected, 1e-6)
    engine.destroy()


def test_a_config_path_comes_from_the_command_line(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(config(seed=7)))
    for args in (Namespace(deepspeed_config=tmp_path / "ds.json"), Namespace(deepspeed=str(tmp_path / "ds.json"))):
        engine, *_ = partita.initialize(args=args, model=seeded())
        assert engine.config.seed == 7
        engine.destroy()


def test_the_arguments_are_documented():
    """`help(partita.initialize)` tells about each."""
    doc = inspect.getdoc(partita.initialize) or ""
    names = list(inspect.signature(partita.initialize).parameters)
    assert names[:3] == ["positional", "args", "model"]
    assert [name for name in names if f"{name}:" not in doc and f"{name}," not in doc] == []


# -- what is refused


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.DataParallel(Regression())


def engine_of_another() -> Any:
    return Engine(seeded(), config=config())


def ddp(model: nn.Module) -> nn.Module:
    partita.init_distributed("gloo")
    return nn.parallel.DistributedDataParallel(model)


# what: (arguments, words of the message)
WRONG: dict[str, tuple[Callable[[], dict[str, Any] | list[Any]], list[str]]] = {
    "no model": (lambda: {"model": None}, ["no model", "model=", "torch.nn.Module"]),
    "nothing": (dict, ["no model"]),
    "a class": (lambda: {"model": Regression}, ["Regression is a class", "Regression(...)"]),
    "a function": (lambda: {"model": lambda: None}, ["model: a function", "forward()"]),
    "a state dict": (lambda: {"model": seeded().state_dict()}, ["OrderedDict", "state dict"]),
    "a name": (lambda: {"model": "gpt2"}, ["model: a str", "load the model"]),
    "args as the model": (lambda: [ARGS], ["model: a Namespace", "args="]),
    "an engine": (lambda: {"model": engine_of_another()}, ["engine already", "engine.module"]),
    "DDP": (lambda: {"model": ddp(seeded())}, ["DistributedDataParallel", ".module"]),
    "DataParallel": (lambda: {"model": nn.DataParallel(seeded())}, ["DataParallel", ".module", "each GPU"]),
    "DataParallel inside": (lambda: {"model": Wrapped()}, ["its module 'inner'", "DataParallel"]),
    "config as second": (lambda: [seeded(), config()], ["optimizer: a dict", "config="]),
    "config path as second": (lambda: [seeded(), "ds.json"], ["optimizer: a str", "config"]),
    "model twice": (lambda: [seeded(), seeded()], ["optimizer: a Regression", "args"]),
    "optimizers": (lambda: {"model": seeded(), "optimizer": [sgd]}, ["optimizer: a list", "param group"]),
    "optimizer": (lambda: {"model": seeded(), "optimizer": 3}, ["optimizer: a int", "torch.optim.Optimizer"]),
    "optimizer of another": (
        lambda: {"model": seeded(), "optimizer": engine_of_another().optimizer},
        ["optimizer", "another engine"],
    ),
    "module as parameters": (lambda: {"model": seeded(), "model_parameters": seeded()}, ["parameters()"]),
    "one parameter": (
        lambda: {"model": seeded(), "model_parameters": nn.Parameter(torch.ones(2))},
        ["model_parameters: a Parameter", "[parameter]"],
    ),
    "one group": (
        lambda: {"model": seeded(), "model_parameters": {"params": []}},
        ["model_parameters: a dict", "list"],
    ),
    "data dict": (lambda: {"model": seeded(), "training_data": {"train": DATA, "test": DATA}}, ["'train', 'test'"]),
    "data path": (lambda: {"model": seeded(), "training_data": "data.json"}, ["training_data: a str", "load"]),
    "repeating loader": (
        lambda: {"model": seeded(), "training_data": partita.RepeatingLoader(DATA)},
        ["training_data: a RepeatingLoader", "train_batch(loader)"],
    ),
    "schedule name": (lambda: {"model": seeded(), "lr_scheduler": "WarmupLR"}, ["lr_scheduler: a str", "config"]),
    "collate": (lambda: {"model": seeded(), "collate_fn": 3}, ["collate_fn: a int"]),
    "args as config": (lambda: {"model": seeded(), "config": ARGS}, ["config: a Namespace", "args="]),
    "loader as config": (lambda: {"model": seeded(), "config": DataLoader(DATA)}, ["config: a DataLoader"]),
    "given twice": (lambda: {"args": ARGS, "model": seeded(), "positional": [ARGS]}, ["args twice"]),
    "too many": (lambda: [seeded(), *[None] * 7], ["7 arguments without a name, got 8"]),
}


def call(arguments: dict[str, Any] | list[Any]) -> Any:
    if isinstance(arguments, list):
        return partita.initialize(*arguments)
    return partita.initialize(*arguments.pop("positional", ()), **{"config": None, **arguments})


@pytest.mark.parametrize("what", WRONG)
def test_an_argument_of_the_wrong_kind_is_named_with_the_way_out(what):
    """F56, promise 7: whatever is given in the place of something else."""
    arguments, words = WRONG[what]
    with pytest.raises(TypeError) as raised:
        call(arguments())
    assert [word for word in words if word not in str(raised.value)] == [], raised.value


OTHERS: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "mpu": (lambda: partita.initialize(model=seeded(), mpu=object()), ValueError, ["mpu", "model parallelism"]),
    "mesh": (lambda: partita.initialize(model=seeded(), mesh_param=(1, 2)), ValueError, ["mesh_param", "sequence"]),
    "two configs": (
        lambda: partita.initialize(WITH_CONFIG, seeded(), config=config(seed=3, gradient_clipping=1.0)),
        ConfigError,
        ["config and args.deepspeed_config are two configs", "gradient_clipping, seed"],
    ),
    "config and config_params": (
        lambda: partita.initialize(model=seeded(), config=config(), config_params={"seed": 3}),
        ConfigError,
        ["config and config_params", "train_micro_batch_size_per_gpu"],
    ),
    "unknown name": (
        lambda: Engine(seeded(), config_dct=config()),
        TypeError,
        ["'config_dct'", "did you mean 'config_dict'"],
    ),
    "unknown to initialize": (
        lambda: partita.initialize(model=seeded(), train_data=DATA),
        TypeError,
        ["train_data"],
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_contradicts_or_is_not_there_is_named(what):
    """Promise 7."""
    make, error, words = OTHERS[what]
    with pytest.raises(error) as raised:
        make()
    assert [word for word in words if word not in str(raised.value)] == [], raised.value
