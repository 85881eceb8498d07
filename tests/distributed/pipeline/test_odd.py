"""Pipelines with stages that train nothing, optimizers of programs, offload, and ranks that were not given the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import partita
import pytest
import torch
from partita.pipeline import LayerSpec, PipelineModule, by_name, placement, to_text
from pipelines import (
    WIDTH,
    WORDS,
    Embedded,
    Shape,
    Trained,
    config_for,
    cross_entropy,
    merged,
    micro_batch,
    train,
)
from ranks import RankError
from torch import Tensor, nn


def _run(
    ranks: Any, pipe: int, make: Callable[[int], PipelineModule], config: dict[str, Any], copies: int = 1
) -> Trained:
    return merged(ranks(pipe * copies).run(train, partial(make, pipe), config))


def _assert_close(ours: Trained, theirs: Trained, tolerance: float = 1e-5) -> None:
    assert ours.losses == pytest.approx(theirs.losses, rel=tolerance)
    assert ours.norms == pytest.approx(theirs.norms, rel=1e-4)
    assert ours.weights.keys() == theirs.weights.keys()
    for name, value in theirs.weights.items():
        torch.testing.assert_close(ours.weights[name], value, rtol=tolerance, atol=tolerance, msg=name)


def _double(x: Tensor) -> Tensor:
    return 2 * x


def _without_parameters(pipe: int) -> PipelineModule:
    """The second stage of three has functions only; the buffers of the third differ between ranks."""
    torch.manual_seed(0)
    layers = [
        LayerSpec(Embedded, WORDS, WIDTH),
        _double,
        torch.tanh,
        _double,
        LayerSpec(nn.BatchNorm1d, 5),
        LayerSpec(nn.Linear, WIDTH, WORDS),
    ]
    return PipelineModule(layers, pipe, loss_fn=cross_entropy, partition_method="uniform")


def _frozen(pipe: int, layers: range, schedule: str) -> PipelineModule:
    model = Shape().module(pipe)
    model.build(placement(schedule, pipe, None))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(int(name.partition(".")[0]) not in layers)
    return model


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_stage_without_parameters(ranks, stage, schedule):
    """N6."""
    config = config_for(4, pipeline={"schedule": schedule}, zero_optimization={"stage": stage}, gradient_clipping=0.1)
    expected = _run(ranks, 1, _without_parameters, config)
    _assert_close(_run(ranks, 3, _without_parameters, config), expected)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
@pytest.mark.parametrize("layers", [range(4), range(4, 8), range(3, 6), range(1, 8)])
def test_frozen_layers(ranks, layers, schedule):
    """At the beginning, the end or in the middle: gradients flow as far as something is trained."""
    config = config_for(4, pipeline={"schedule": schedule}, zero_optimization={"stage": 1})
    make = partial(_frozen, layers=layers, schedule=schedule)
    _assert_close(_run(ranks, 2, make, config), _run(ranks, 1, make, config))


OPTIONS: dict[str, dict[str, Any]] = {
    "offload": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    "overlap_gather": {"zero_optimization": {"stage": 1, "overlap_gather": True}},
    "no overlap": {"zero_optimization": {"stage": 1, "overlap_comm": False}},
    "reduced whole": {"zero_optimization": {"stage": 2, "reduce_scatter": False}},
    "prescaled": {"prescale_gradients": True, "gradient_predivide_factor": 2.0},
    "bf16 messages": {"communication_data_type": "bf16"},
    "adagrad": {"optimizer": {"type": "Adagrad", "params": {"lr": 0.05}}, "zero_optimization": {"stage": 2}},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
}


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_engine(ranks, option, schedule):
    config = config_for(4, **{"pipeline": {"schedule": schedule}, **OPTIONS[option]})
    ours = _run(ranks, 2, Shape().module, config, copies=2)
    theirs = merged(ranks(2).run(train, partial(Shape().module, 1), config))
    _assert_close(ours, theirs, 0.02 if option == "bf16 messages" else 1e-5)


def _grouped(pipe: int) -> Any:
    """Weights with decay, others without; the last rank has nothing in the third group."""
    model = Shape().module(pipe)
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": 0.1}, {"params": []}, {"params": [], "lr": 0.05}]
    for name, parameter in model.named_parameters():
        groups[2 if name.startswith("0.") else parameter.dim() < 2]["params"].append(parameter)
    config = config_for(4, optimizer={"type": "AdamW", "params": {"lr": 0.01}})
    engine, *_ = partita.initialize(model=model, model_parameters=groups, config=config)
    losses = [engine.train_batch(iter([micro_batch(step, m) for m in range(4)])).item() for step in range(3)]
    weights = dict(engine.module_state_dict())
    engine.destroy()
    return losses, weights


def test_param_groups_may_be_empty_on_a_rank(ranks):
    ((losses, weights),) = ranks(1).run(_grouped, 1)
    for ours, own in ranks(2).run(_grouped, 2):
        assert ours == pytest.approx(losses, rel=1e-5)
        for name, value in own.items():
            torch.testing.assert_close(value, weights[name], rtol=1e-5, atol=1e-6, msg=name)


def _positions() -> Any:
    inputs, labels = micro_batch(0, 0, sizes=(48,))
    data = [(inputs[i], labels[i]) for i in range(48)]
    engine, *_ = partita.initialize(model=Shape().module(3), training_data=data, config=config_for(4))
    losses = [engine.train_batch().item() for _ in range(3)]
    state = engine.dataloader.state_dict()
    engine.destroy()
    return losses, state


def test_all_ranks_have_the_position_in_the_data(ranks):
    assert all(one == ranks(3).run(_positions)[0] for one in ranks(3).run(_positions))


def _given_otherwise(what: str, path: str) -> None:
    rank = torch.distributed.get_rank()
    blocks = 6 + (rank if what == "layers" else 0)
    skips = {3: [1]} if what == "skips" and rank else {}
    schedule = "1f1b"
    if what == "schedule":
        schedule = f"{path}{rank}"
        Path(schedule).write_text(to_text(by_name("1f1b" if rank else "gpipe", 2, 4)))
    torch.manual_seed(0)
    options = {"partition_method": "parameters" if what == "division" and rank else "uniform", "skips": skips}
    specs = Shape(blocks).specs() if what != "division" else [*Shape(5).specs(), LayerSpec(nn.Linear, WORDS, 3 * WORDS)]
    model = PipelineModule(specs, 2, loss_fn=cross_entropy, **options)
    engine, *_ = partita.initialize(model=model, config=config_for(4, pipeline={"schedule": schedule}))
    engine.destroy()


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("layers", "layer 7 is Linear on rank 0 and Block on rank 1"),
        ("skips", "skips between layers"),
        ("schedule", "schedule"),
        ("division", "layers of each"),
    ],
)
def test_ranks_that_were_given_other_pipelines(ranks, tmp_path, what, says):
    with pytest.raises(RankError, match=says):
        ranks(2).run(_given_otherwise, what, str(tmp_path / "schedule"))


def _data_parallel_difference() -> None:
    model = Shape().module(2)
    model.build()
    if torch.distributed.get_rank() == 3:
        next(model.parameters()).requires_grad_(False)
    partita.initialize(model=model, config=config_for(4))


def test_copies_of_a_stage_train_the_same(ranks):
    with pytest.raises(RankError, match=r"requires_grad of parameter 4\.norm\.weight"):
        ranks(4).run(_data_parallel_difference)


class _InPlace(nn.Module):
    """Changes its input."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(x)


def _in_place(pipe: int) -> PipelineModule:
    torch.manual_seed(0)
    layers = [LayerSpec(Embedded, WORDS, WIDTH)]
    for _ in range(3):
        layers += [LayerSpec(nn.Linear, WIDTH, WIDTH), LayerSpec(_InPlace)]
    return PipelineModule(
        [*layers, LayerSpec(nn.Linear, WIDTH, WORDS)], pipe, loss_fn=cross_entropy, partition_method="uniform"
    )


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "zb-v"])
@pytest.mark.parametrize("pipe", [2, 4])
def test_a_stage_may_begin_with_a_layer_that_works_in_place(ranks, pipe, schedule):
    config = config_for(4, pipeline={"schedule": schedule})
    _assert_close(_run(ranks, pipe, _in_place, config), _run(ranks, 1, _in_place, config))


def _frozen_later(pipe: int) -> dict[str, Tensor]:
    engine, *_ = partita.initialize(model=Shape().module(pipe), config=config_for(4))
    for step in range(4):
        for name, parameter in engine.module.named_parameters():
            parameter.requires_grad_(not (step in (1, 2) and name.startswith(("1.", "6."))))
        engine.train_batch(iter([micro_batch(step, m) for m in range(4)]))
    weights = dict(engine.module_state_dict())
    engine.destroy()
    return weights


def test_layers_may_be_frozen_in_the_midst_of_training(ranks):
    """F12."""
    (expected,) = ranks(1).run(_frozen_later, 1)
    for weights in ranks(2).run(_frozen_later, 2):
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)
