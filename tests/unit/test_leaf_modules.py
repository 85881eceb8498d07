"""utils.set_z3_leaf_modules and its family: what is marked, what is refused, and what stage 3 gathers together then."""

from __future__ import annotations

import inside
import partita
import pytest
import torch
from partita import utils, zero
from torch import nn


class Experts(nn.Module):
    """A block with layers inside; the second expert runs only when it is wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts[2](self.experts[0](x))  # type: ignore[no-any-return]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Experts()
        self.middle = nn.Linear(3, 3)
        self.second = Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.middle(self.first(x))).square().mean()  # type: ignore[no-any-return]


def test_modules_are_marked_by_class_and_unmarked():
    model = Model()
    for classes in ([Experts], ["Experts"], [f"{__name__}.Experts"]):
        assert utils.get_z3_leaf_modules(model) == []
        assert utils.set_z3_leaf_modules(model, classes) == [model.first, model.second]
        assert utils.get_z3_leaf_modules(model) == [model.first, model.second]
        assert utils.z3_leaf_module(model.first)
        assert not utils.z3_leaf_module(model.middle)
        assert utils.z3_leaf_parameter(model.first.experts[0].weight)  # type: ignore[arg-type]
        assert not utils.z3_leaf_parameter(model.middle.weight)
        assert utils.unset_z3_leaf_modules(model, classes) == [model.first, model.second]
    assert not utils.z3_leaf_parameter(model.first.experts[0].weight)  # type: ignore[arg-type]


def test_modules_are_marked_by_name():
    model = Model()
    assert utils.set_z3_leaf_modules_by_name(model, ["second", "third"], raise_if_not_found=False) == (
        [model.second],
        ["third"],
    )
    assert utils.get_z3_leaf_modules(model) == [model.second]
    assert utils.set_z3_leaf_modules_by_name(model, ["second"], flag=False) == ([model.second], [])
    assert utils.set_z3_leaf_modules_by_suffix(model, ["experts"]) == ([model.first.experts, model.second.experts], [])
    utils.set_z3_leaf_module(model.first.experts, False)
    assert utils.get_z3_leaf_modules(model) == [model.second.experts]


def test_what_is_not_there_is_named():
    model = Model()
    with pytest.raises(ValueError, match=r"no module of class 'Expert'; it has 'Experts', 'Linear'"):
        utils.set_z3_leaf_modules(model, ["Expert"])
    assert utils.set_z3_leaf_modules(model, ["Expert"], raise_if_not_found=False) == []
    with pytest.raises(ValueError, match=r"no module 'third'; it has 'first', "):
        utils.set_z3_leaf_modules_by_name(model, ["third"])
    with pytest.raises(ValueError, match=r"no module '\.expert'"):
        utils.set_z3_leaf_modules_by_suffix(model, [".expert"])
    with pytest.raises(TypeError, match="3 is neither a class"):
        utils.set_z3_leaf_modules(model, [3])  # type: ignore[list-item]


def engine_of(model: nn.Module, **zero_keys: object) -> partita.Engine:
    """One rank gathers, too, where its shards are on the host."""
    offload = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "offload_param": offload,
            "offload_optimizer": offload,
            **zero_keys,
        },
        "steps_per_print": 0,
    }
    return partita.Engine(model=model, config=config)


def test_a_leaf_is_gathered_whole_and_trains_the_same():
    weights = []
    for classes in ([], [Experts], [nn.Linear], [Model]):
        torch.manual_seed(0)
        model = Model()
        if classes:
            utils.set_z3_leaf_modules(model, classes)  # type: ignore[arg-type]
        engine = engine_of(model)
        names = {module: name for name, module in model.named_modules()}
        blocks = [names[group.module] for group in inside.blocks(engine)]
        inner = [f"{block}.experts.{i}" for block in ("first", "second") for i in range(3)]
        expected = {0: inner, 1: ["first", "second"], 2: [*inner[:3], "middle", *inner[3:]], 3: []}
        assert blocks == expected[len(weights)]
        for seed in range(2):
            engine.backward(engine(torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))))
            engine.step()
            assert inside.gathered_bytes(engine) == 0
        weights.append(engine.module_state_dict())
        engine.destroy()
    for other in weights[1:]:
        assert all(torch.equal(weights[0][name], value) for name, value in other.items())


def test_a_leaf_inside_of_a_named_block_changes_nothing_and_one_around_it_does():
    model = Model()
    utils.set_z3_leaf_modules_by_name(model, ["first.experts.0", "second"])
    engine = engine_of(model, unit_classes=["Experts"])
    assert [group.module for group in inside.blocks(engine)] == [model.first, model.second]
    with pytest.raises(RuntimeError, match=r"'Model' is trained by an engine.*before initialize"):
        utils.set_z3_leaf_module(model, True)
    engine.destroy()


def test_external_parameters_are_accepted():
    model = Model()
    zero.register_external_parameter(model.first, model.middle.weight)
    zero.unregister_external_parameter(model.first, model.middle.weight)
    with pytest.raises(TypeError, match="a module and a parameter, not Model and Tensor"):
        zero.register_external_parameter(model, torch.ones(1))  # type: ignore[arg-type]
