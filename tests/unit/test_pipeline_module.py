"""`PipelineModule`: each rank builds its own layers, with values that do not depend on the division."""

from __future__ import annotations

import copy
import gc
import inspect
import random
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import partita
import pytest
import torch
from partita.comm import place_in_job
from partita.pipeline import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn


class Counted(nn.Linear):
    """Counts how many of it are built with memory; has parameters of three kinds of generators."""

    built: ClassVar[list[int]] = []

    def __init__(self, tag: int, width: int = 4) -> None:
        super().__init__(width, width)
        self.scale = nn.Parameter(torch.tensor(random.random() + float(np.random.rand())))
        if self.weight.device.type != "meta":
            self.built.append(tag)


def specs(count: int = 6, width: int = 4) -> list[LayerSpec]:
    return [LayerSpec(Counted, i, width) for i in range(count)]


def built(layers: Sequence[Any], stage_ranks: Sequence[int] | None = None, **kwargs: Any) -> PipelineModule:
    """After the same random numbers as all others."""
    torch.manual_seed(1)
    module = PipelineModule(layers, **kwargs)
    module.build(stage_ranks)
    return module


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


# -- who builds what


def test_a_rank_builds_its_own_layers_and_no_other(as_rank):
    as_rank(1, 2)
    for given in ("parameters", "uniform"):
        Counted.built = []
        module = PipelineModule(specs(), num_stages=2, partition_method=given)
        assert Counted.built == []
        module.build([0, 1, 1, 0])
        assert Counted.built == [*module.bounds[1], *module.bounds[2]]
        assert sorted(module.stages) == [1, 2]
        assert {name.split(".")[0] for name, _ in module.named_parameters()} == {str(i) for i in Counted.built}


def test_inside_of_zero_init_a_rank_builds_its_own_layers_and_no_other():
    Counted.built = []
    with partita.zero.Init():
        module = PipelineModule(specs(3), num_stages=1)
        assert Counted.built == []
        module.build([0, 0])
        assert Counted.built == [0, 1, 2]
    assert module(torch.ones(2, 4)).shape == (2, 4)


def _builds_after_init() -> None:
    with partita.zero.Init(config={"train_micro_batch_size_per_gpu": 1, "comm": {"timeout_seconds": 30}}):
        module = PipelineModule(specs(4), num_stages=2)
    Counted.built = []
    module.build()
    rank, _ = place_in_job()
    assert Counted.built == list(module.bounds[rank])
    assert all(type(p) is nn.Parameter for p in module.parameters())
    assert all(p.isfinite().all() for p in module.parameters())


def test_what_is_made_inside_of_zero_init_on_several_ranks_is_built_whole_after_it(ranks):
    ranks(2).run(_builds_after_init)


@pytest.mark.parametrize(("world_size", "num_stages"), [(4, 2), (4, 4), (6, 3), (3, 1)])
def test_the_ranks_of_a_pipeline_are_neighbours_of_their_data_parallel_copies(as_rank, world_size, num_stages):
    places = []
    for rank in range(world_size):
        as_rank(rank, world_size)
        places += list(built(specs(), num_stages=num_stages).stages)
    assert places == [rank // (world_size // num_stages) for rank in range(world_size)]


def test_without_a_number_of_stages_there_are_as_many_as_ranks(as_rank):
    as_rank(2, 3)
    assert list(built(specs()).stages) == [2]


def test_modules_of_other_ranks_are_dropped(as_rank):
    as_rank(0, 2)
    layers = [nn.Linear(4, 4) for _ in range(4)]
    references = [weakref.ref(layer) for layer in layers]
    loss = nn.Linear(4, 4)
    loss_reference = weakref.ref(loss)
    module = PipelineModule(nn.Sequential(*layers), num_stages=2, loss_fn=loss)
    del layers, loss
    module.build()
    gc.collect()
    assert [reference() is not None for reference in references] == [True, True, False, False]
    assert loss_reference() is None
    assert module.loss_fn is not None
    with pytest.raises(RuntimeError, match="the loss is computed in the last stage, which is on pipe rank 1"):
        module.loss_fn(None, None)


# -- values


DIVISIONS = [(1, [0]), (1, [0, 0, 0]), (2, [0, 1]), (2, [0, 1, 1, 0]), (3, [0, 1, 2])]


@pytest.mark.parametrize(("num_stages", "stage_ranks"), DIVISIONS)
def test_values_and_random_numbers_after_do_not_depend_on_the_division(as_rank, num_stages, stage_ranks):
    tied = [TiedLayerSpec("t", Counted, 7), *specs(), TiedLayerSpec("t", Counted, 7)]
    whole = values(built(tied, num_stages=1))
    after = torch.rand(3)
    seen: dict[str, Tensor] = {}
    for rank in range(num_stages):
        as_rank(rank, num_stages)
        random.seed(5)
        np.random.seed(5)
        module = built(tied, stage_ranks, num_stages=num_stages)
        assert torch.equal(torch.rand(3), after)
        assert random.random() == random.Random(5).random()
        assert np.random.rand() == np.random.RandomState(5).rand()
        for name, value in values(module).items():
            assert torch.equal(value, whole[module.replicas.get(name, name)]), name
            seen[module.replicas.get(name, name)] = value
    assert seen.keys() == whole.keys()
    assert len({tuple(value.flatten().tolist()) for value in seen.values()}) == len(seen)


def test_a_base_seed_says_the_values():
    first = values(built(specs(2), num_stages=1, seed_layers=True, base_seed=3))
    torch.manual_seed(99)
    second = values(PipelineModule(specs(2), num_stages=1, seed_layers=True, base_seed=3))
    other = values(built(specs(2), num_stages=1, seed_layers=True, base_seed=30))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])


# -- as any other module


@pytest.mark.parametrize(
    "ask",
    [
        lambda m: list(m.parameters()),
        lambda m: list(m.named_parameters()),
        lambda m: list(m.modules()),
        lambda m: list(m.children()),
        lambda m: list(m.named_buffers()),
        lambda m: m.state_dict(),
        lambda m: m.to(torch.float64),
        lambda m: m.half(),
        lambda m: m.apply(lambda part: None),
        lambda m: m.requires_grad_(False),
        lambda m: m(torch.ones(1, 4)),
    ],
)
def test_what_a_program_asks_for_builds_the_layers(ask):
    module = PipelineModule(specs(2), num_stages=1)
    ask(module)
    assert [name for name, _ in module.named_children()] == ["0", "1"]
    module.build()
    with pytest.raises(RuntimeError, match=r"stages on ranks \[0\], and the schedule has them on \[0, 0\]"):
        module.build([0, 0])


def test_what_is_said_before_there_are_layers_holds_for_them():
    module = PipelineModule(specs(3), num_stages=1)
    module.eval()
    module.activation_checkpoint_interval = 2
    with pytest.raises(RuntimeError, match="stages are known when the layers are built"):
        module.bounds  # noqa: B018
    module.build([0, 0])
    assert not any(part.training for part in [*module.modules(), *module.stages.values()])
    module.train()
    assert all(part.training for part in [*module.modules(), *module.stages.values()])
    module.activation_checkpoint_interval = 1
    assert {stage.checkpoints.interval for stage in module.stages.values()} == {1}


def test_a_state_dict_of_a_sequential_model_fits():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4))
    module = PipelineModule([LayerSpec(nn.Linear, 4, 4), torch.relu, LayerSpec(nn.BatchNorm1d, 4)], num_stages=1)
    module.load_state_dict(model.state_dict())
    assert module.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(3, 4)
    assert torch.equal(module(x), model(x))
    module.double()
    assert {p.dtype for stage in module.stages.values() for p in stage.parameters()} == {torch.float64}


def test_a_copy_is_a_model_of_its_own():
    module = built([TiedLayerSpec("t", nn.Linear, 4, 4), *specs(2), TiedLayerSpec("t", nn.Linear, 4, 4)], [0, 0])
    twin = copy.deepcopy(module)
    x = torch.ones(1, 4)
    expected = module(x).detach()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(twin(x), expected)
    assert twin.stages.keys() == module.stages.keys()
    assert {id(p) for stage in twin.stages.values() for p in stage.parameters()} == {id(p) for p in twin.parameters()}


def test_a_model_that_is_not_whole_says_what_to_call(as_rank):
    as_rank(0, 2)
    with pytest.raises(RuntimeError, match=r"2 stages are on 2 ranks.*engine\.train_batch"):
        PipelineModule(specs(), num_stages=2)(torch.ones(1, 4))


DEEPSPEED_ARGUMENTS = [
    "layers",
    "num_stages",
    "topology",
    "loss_fn",
    "seed_layers",
    "seed_fn",
    "base_seed",
    "partition_method",
    "activation_checkpoint_interval",
    "activation_checkpoint_func",
    "checkpointable_layers",
    "dynamic_shape",
]


def test_arguments_are_in_the_order_that_programs_for_deepspeed_know():
    parameters = inspect.signature(PipelineModule).parameters
    assert list(parameters)[: len(DEEPSPEED_ARGUMENTS)] == DEEPSPEED_ARGUMENTS
    assert all(p.kind is p.KEYWORD_ONLY for name, p in parameters.items() if name not in DEEPSPEED_ARGUMENTS)
    asks_for_nothing = (
        1,
        None,
        None,
        False,
        None,
        1234,
        "parameters",
        0,
        torch.utils.checkpoint.checkpoint,
        None,
        True,
    )
    PipelineModule([nn.Linear(2, 2)], *asks_for_nothing)  # type: ignore[arg-type]


# -- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"topology": object()}, "topology is not supported: give num_stages"),
        ({"seed_fn": torch.manual_seed}, "seed_fn is not supported"),
        ({"activation_checkpoint_func": print}, "activation_checkpoint_func is not supported"),
        ({"activation_checkpoint_interval": -1}, "activation_checkpoint_interval is -1"),
        ({"num_stages": 3}, "num_stages is 3, and the job has 1 ranks"),
        ({"num_stages": 0}, "num_stages is 0"),
        ({"partition_method": "profile"}, 'partition_method is "profile": there are "parameters", "uniform"'),
        ({"partition_method": "type:Block"}, 'partition_method is "type:Block": no layer of Linear matches'),
        ({"partition_method": "type:("}, "expression is none"),
        ({"partition_method": "cost"}, "layer_costs is missing"),
        ({"partition_method": "cost", "layer_costs": [1.0]}, "layer_costs has 1 numbers for 3 layers"),
        ({"layer_costs": [1, 2, 3]}, 'layer_costs is for partition_method="cost"'),
        ({"skips": {2: [1]}}, r"skips has 2: \[1\]"),
        ({"skips": {5: [1]}}, r"skips has 5: \[1\]"),
        ({"skips": {2: [0, 0]}}, "name each layer once"),
        ({"skips": {2: 0}}, r"skips has 2: 0: give a list of layers, 2: \[0\]"),
        ({"partition_method": None}, 'partition_method is "None": there are "parameters"'),
    ],
)
def test_what_cannot_be_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        PipelineModule([nn.Linear(2, 2) for _ in range(3)], **arguments)


def test_arguments_of_a_wrong_kind_are_refused_by_name():
    with pytest.raises(TypeError, match="loss_fn is <class"):
        PipelineModule([nn.Linear(2, 2)], loss_fn=nn.MSELoss)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="checkpointable_layers is 'Linear': give a list of names"):
        PipelineModule([nn.Linear(2, 2)], checkpointable_layers="Linear")


def test_stages_that_cannot_be_are_refused(as_rank):
    module = PipelineModule(specs(3), num_stages=1)
    with pytest.raises(ValueError, match=r"3 layers do not make 4 stages \(num_stages = 1, 4 on each rank\)"):
        module.build([0] * 4)
    with pytest.raises(ValueError, match=r"stage_ranks is \[0, 2\]: .* every rank from 0 to 0"):
        module.build([0, 2])
    module.build([0, 0, 0])
    as_rank(0, 4)
    with pytest.raises(ValueError, match="3 layers do not make 4 stages"):
        PipelineModule(specs(3), num_stages=4)
