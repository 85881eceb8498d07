"""Calls of zero.Init and GatheredParameters: nested, a config's dtype, DeepSpeed's arguments; what blocks leave."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import partita
import pytest
import torch
from blocks_model import TRANSPORTS, assert_same_weights, config_for, error_of
from partita import zero
from partita.units import holder_of
from partita.zero import AbsentParameterError, GatheredParameters
from torch import Tensor, nn


def _rank() -> int:
    return torch.distributed.get_rank()


def _whole(model: nn.Module) -> dict[str, Tensor]:
    with GatheredParameters(model.parameters()):
        return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _bytes_here(*models: nn.Module) -> int:
    return sum(p.untyped_storage().nbytes() for model in models for p in model.parameters())


class Nest(nn.Module):
    """Builds parts in blocks of their own, and goes on using what it had before and in between."""

    def __init__(self, block: Callable[..., Any]) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        with block():
            self.inner = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 5))
            with block(dtype=torch.bfloat16):
                self.half = nn.Linear(3, 3)
            with block(enabled=False):
                self.scale = nn.Parameter(self.inner[0].weight.detach().sum(0))
            nn.init.normal_(self.first.weight)
        with torch.no_grad():
            self.inner[1].weight.mul_(2).add_(self.first.weight.mean())
        self.last = nn.Linear(5, 5)


class _Plain:
    """What Init does to numbers, without it."""

    def __init__(self, dtype: torch.dtype | None = None, enabled: bool = True) -> None:
        self.dtype, self.before = dtype or torch.get_default_dtype(), torch.get_default_dtype()

    def __enter__(self) -> None:
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)


def _nests(transport: str) -> None:
    config = config_for(3, transport)

    def block(**given: Any) -> zero.Init:
        return zero.Init(config=config, **given)

    torch.manual_seed(0)
    plain = Nest(_Plain)
    torch.manual_seed(100 * _rank())
    with block():
        model = Nest(block)
        after = nn.Linear(5, 5)
        assert type(model.last.weight) is nn.Parameter  # inside, all is as it always is
    assert _bytes_here(model, after) == 0
    assert_same_weights(_whole(model), dict(plain.state_dict()))
    assert nn.Parameter.__deepcopy__ is not None and nn.Linear(3, 3).weight.sum().isfinite()
    # What an earlier block has built is used in a later one.
    with block():
        copied = copy.deepcopy(model)
        tied = nn.Linear(5, 7)
        tied.weight = model.first.weight
        with torch.no_grad():
            model.last.weight.copy_(tied.bias.sum() * 0 + 3)
        alias = nn.Parameter(model.last.weight)
        holds = nn.ParameterList([alias])
    assert _bytes_here(model, copied, tied, holds) == 0
    assert_same_weights(_whole(copied), dict(plain.state_dict()))
    assert_same_weights(_whole(tied), {"weight": plain.first.weight, "bias": _whole(tied)["bias"]})
    assert _whole(holds)["0"].eq(3).all() and _whole(model)["last.weight"].eq(3).all()
    # So is what an engine has in training.
    engine = partita.Engine(model=nn.ModuleList([nn.Linear(5, 7)]), config=config)
    weights = engine.module_state_dict()
    with block():
        teacher = copy.deepcopy(engine.module[0])
        nn.Linear(3, 3)
    assert _bytes_here(teacher) == 0
    assert torch.equal(_whole(teacher)["weight"], weights["0.weight"])
    assert_same_weights(engine.module_state_dict(), weights)
    engine.destroy()
    # An error in an inner block ends it, and the outer one goes on.
    with block():
        error_of(lambda: _raise_in(block), OSError)
        last = nn.Linear(3, 3)
        last.weight.data.fill_(1)
    assert _bytes_here(last) == 0 and _whole(last)["weight"].eq(1).all()


def _raise_in(block: Callable[..., Any]) -> None:
    with block():
        nn.Linear(3, 3)
        raise OSError("inside")


@pytest.mark.parametrize("path", TRANSPORTS)
def test_blocks_are_nested_and_follow_each_other(ranks, path):
    """F23: all is part of the outermost block; what an earlier block built can be copied, tied and written."""
    ranks(2).run(_nests, path)
    if path == TRANSPORTS[0]:
        ranks(3).run(_nests, path)


def _leaves(transport: str) -> None:
    config = config_for(3, transport)
    with zero.Init(config=config):
        model = nn.ModuleList([nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(5, 7)])
        view, rows = model[0].weight.detach()[1:], model[1].weight.data
        view.mul_(2)
    expected = _whole(model)
    # Views that a program has kept have memory of their own: they are what they were when the block ended.
    assert torch.equal(view, expected["0.weight"][1:]) and torch.equal(rows, expected["1.weight"])
    rows.zero_()
    assert_same_weights(_whole(model), expected)
    # So have views that are kept from a GatheredParameters, while the parameters go.
    with GatheredParameters(model[2].weight):
        kept = model[2].weight.detach()
    assert _bytes_here(model) == 0
    assert torch.equal(kept, expected["2.weight"])
    assert_same_weights(_whole(model), expected)
    # Outside of any gather, what would need the values says so, and names the parameter.
    for use in (copy.deepcopy, copy.copy, pickle.dumps, nn.Parameter, nn.Buffer, torch.from_dlpack):
        for parameter in (model[0].weight, model[0].bias):
            assert "'Linear." in error_of(lambda p=parameter, u=use: u(p), AbsentParameterError), use
    assert "'Linear.weight'" in error_of(lambda: copy.deepcopy(model), AbsentParameterError)
    with GatheredParameters(model.parameters()):
        copied, plain = copy.deepcopy(model), nn.Parameter(model[0].weight)
        again: nn.Module = pickle.loads(pickle.dumps(model))
    assert type(copied[0].weight) is nn.Parameter and type(plain) is nn.Parameter
    assert_same_weights(dict(copied.state_dict()), expected)
    assert_same_weights(dict(again.state_dict()), expected)
    assert torch.equal(plain, expected["0.weight"])
    assert_same_weights(_whole(model), expected)
    with GatheredParameters(model[1].weight, modifier_rank=1):
        model[1].weight.data = torch.full((7, 5), float(_rank()))
    assert _whole(model)["1.weight"].eq(1).all()


@pytest.mark.parametrize("path", TRANSPORTS)
def test_nothing_without_memory_looks_like_something(ranks, path):
    """F34's sibling: views, copies, pickles and new parameters have values, or an error names the parameter."""
    ranks(2).run(_leaves, path)


def _dtypes(transport: str) -> None:
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        config = config_for(3, transport, precision)
        for given in ({"config": config}, {"config_dict_or_path": config}):
            with zero.Init(**given):
                assert nn.Linear(3, 3).weight.dtype == dtype
        with zero.Init(config=config, dtype=torch.float32):
            assert nn.Linear(3, 3).weight.dtype == torch.float32
        with zero.Init(config=config, enabled=False):
            assert nn.Linear(3, 3).weight.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_the_dtype_is_the_configs(ranks):
    """F41"""
    ranks(2).run(_dtypes, TRANSPORTS[0])


def _given_modules(transport: str) -> None:
    config = config_for(3, transport)
    torch.manual_seed(_rank())
    model = nn.Sequential(nn.Linear(5, 7), nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last), nn.BatchNorm1d(3))
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 7), nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last), nn.BatchNorm1d(3))
    numbers = torch.get_rng_state()
    zero.Init(module=model, config_dict_or_path=config, enabled=False)
    assert _bytes_here(model) > 0
    zero.Init(module=model, config_dict_or_path=config)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert _bytes_here(model) == 0
    assert_same_weights(_whole(model), dict(plain.state_dict()))
    assert model[1].weight.stride() == plain[1].weight.stride()
    for place in ({"remote_device": "cpu"}, {"remote_device": "none"}, {"remote_device": "cpu", "pin_memory": True}):
        with zero.Init(config=config, **place):
            nn.Linear(3, 3).weight.data.mul_(2)
    on_host = {"device": "cpu"}
    offloaded = config_for(3, transport, zero={"offload_param": on_host, "offload_optimizer": on_host})
    with zero.Init(config=offloaded):
        copied = copy.deepcopy(plain)
    with zero.Init(None, torch.distributed.group.WORLD, False, None, False, config):
        assert type(nn.Linear(3, 3).weight) is nn.Parameter
    assert_same_weights(dict(copied.state_dict()), dict(plain.state_dict()))


@pytest.mark.parametrize("path", TRANSPORTS)
def test_a_module_that_is_there_is_partitioned_at_once(ranks, path):
    """With rank 0's values, and with shards where they are asked for."""
    ranks(2).run(_given_modules, path)


REFUSED: dict[str, Any] = {
    "data_parallel_group": object(),
    "remote_device": "nvme",
    "mpu": object(),
    "zero_param_parallel_group": object(),
    "zero_quantized_weights": True,
    "zero_quantized_nontrainable_weights": True,
    "sequence_data_parallel_group": object(),
    "param_swapper": object(),
    "module": {"train_batch_size": 1},
    "dtype": "bf16",
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_that_asks_for_what_is_not_there_is_refused_by_name(name):
    with pytest.raises((ValueError, TypeError), match=rf"zero\.Init: {name} is"):
        zero.Init(**{name: REFUSED[name]})


def test_the_arguments_are_deepspeeds():
    """In its order; what none of its programs gives is not there."""
    assert list(inspect.signature(zero.Init).parameters) == [
        "module",
        "data_parallel_group",
        "mem_efficient_linear",
        "remote_device",
        "pin_memory",
        "config_dict_or_path",
        "config",
        "enabled",
        "dtype",
        "mpu",
        "zero_param_parallel_group",
        "zero_quantized_weights",
        "zero_quantized_nontrainable_weights",
        "sequence_data_parallel_group",
        "param_swapper",
    ]
    assert list(inspect.signature(GatheredParameters).parameters) == [
        "params",
        "modifier_rank",
        "fwd_module",
        "enabled",
    ]
    with pytest.raises(ValueError, match="config_dict_or_path and config are two names"):
        zero.Init(config={"train_batch_size": 1}, config_dict_or_path={"train_batch_size": 2})


def _forward_modules(transport: str) -> None:
    with zero.Init(config=config_for(3, transport)):
        model = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 5)])
    with GatheredParameters(model[0].parameters(), None, model[0]):
        assert model[0].weight.sum().isfinite()
    with GatheredParameters(model[0].weight, fwd_module=model, modifier_rank=0):
        model[0].weight.data.fill_(1)
    message = error_of(lambda: GatheredParameters([model[0].weight], fwd_module=model[1]), ValueError)
    assert "'Linear.weight'" in message and "fwd_module" in message and "Linear" in message
    assert "fwd_module is a bool" in error_of(lambda: GatheredParameters(model[0].weight, None, True), TypeError)
    with GatheredParameters(model[0].weight, enabled=False):
        error_of(model[0].weight.sum, AbsentParameterError)


def test_parameters_that_a_module_needs_in_its_forward_are_registered_there(ranks):
    """`fwd_module` says which module will use the parameters: one that has them needs nothing."""
    ranks(2).run(_forward_modules, TRANSPORTS[0])


def _communicators_open(transport: str) -> None:
    config = config_for(3, transport)

    def closed() -> list[bool]:
        gc.collect()
        return [lease() is None for lease in leases]

    leases: list[Any] = []
    with zero.Init(config=config):
        model = nn.Linear(5, 7)
        communicator = holder_of(model.weight).communicator  # type: ignore[union-attr]
    leases.append(weakref.ref(communicator))
    del communicator
    assert closed() == [False]
    engine = partita.Engine(model=model, config=config)
    assert closed() == [True]  # an engine has communicators of its own
    engine.destroy()


@pytest.mark.parametrize("path", TRANSPORTS)
def test_its_communicator_ends_with_the_parameters_that_need_it(ranks, path):
    """An engine that takes the model needs it no more."""
    ranks(2).run(_communicators_open, path)


def _has_used_a_gpu_on_rank_0() -> list[list[int]]:
    """The states that this rank's GPU has had."""
    states = [torch.full((4,), _rank(), dtype=torch.uint8)]
    with (
        mock.patch.object(torch.cuda, "is_initialized", lambda: _rank() == 0 or len(states) > 1),
        mock.patch.object(torch.cuda, "get_rng_state", lambda: states[-1].clone()),
        mock.patch.object(torch.cuda, "set_rng_state", states.append),
        zero.Init(config=config_for()),
    ):
        nn.Linear(3, 3)
    return [state.tolist() for state in states]


def test_a_gpu_that_one_rank_has_used_before_has_rank_0s_numbers_on_all(ranks):
    """The ranks send each other equally many states, whoever has used its GPU."""
    first, second = ranks(2).run(_has_used_a_gpu_on_rank_0)
    assert first == [[0] * 4] * 2
    assert second == [[1] * 4, [0] * 4, [1] * 4]  # its own again
