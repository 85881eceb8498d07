"""What goes from stage to stage: tuples, dicts, integers, other shapes in other steps; over both transports."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import partita
import pytest
import torch
from partita.pipeline import LayerSpec, PipelineModule
from pipelines import WIDTH, WORDS, Block, Embedded, Shape, config_for, cross_entropy, merged, micro_batch, train
from torch import Tensor, nn

STEPS = 3


class Begin(nn.Module):
    """A payload with all that a stage may hand on."""

    def __init__(self) -> None:
        super().__init__()
        self.words = Embedded(WORDS, WIDTH)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        mask = torch.linspace(0.5, 1.0, inputs["ids"].shape[1])
        return {
            "x": self.words(inputs["ids"]),
            "beside": (inputs["ids"], [mask, None, 0.5]),
            "name": "x",
            "unused": self.words.weight.mean(1),
            "empty": torch.empty(0, 3),
        }


class Middle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block(WIDTH)

    def forward(self, given: dict[str, Any]) -> dict[str, Any]:
        ids, (mask, nothing, factor) = given["beside"]
        assert (
            ids.dtype == torch.int64 and not mask.requires_grad and nothing is None and given["empty"].shape == (0, 3)
        )
        x = self.block(given[given["name"]] * mask[:, None] * factor + ids[..., None] / WORDS)
        return {**given, "x": x}


class End(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, given: dict[str, Any]) -> Tensor:
        return self.head(given["x"])


def _model(pipe: int) -> PipelineModule:
    torch.manual_seed(0)
    layers = [LayerSpec(Begin), *(LayerSpec(Middle) for _ in range(6)), LayerSpec(End)]
    return PipelineModule(layers, pipe, loss_fn=cross_entropy, partition_method="uniform")


def _named(step: int, index: int) -> Any:
    ids, labels = micro_batch(step, index)
    return {"ids": ids}, labels


def _lengths(step: int, index: int) -> Any:
    """P4: sequences of another length in each step, and of two lengths in each."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    shape = (3, 4 + step + 2 * (index % 2))
    return torch.randint(WORDS, shape, generator=generator), torch.randint(WORDS, shape, generator=generator)


def _same(ours: Any, theirs: Any) -> None:
    assert (ours.losses, ours.evaluated) == (theirs.losses, theirs.evaluated)
    assert ours.weights.keys() == theirs.weights.keys()
    for name, value in theirs.weights.items():
        assert torch.equal(ours.weights[name], value), name


def _run(
    ranks: Any, pipe: int, make: Callable[[int], PipelineModule], schedule: str, batch: Any, **changes: Any
) -> Any:
    config = config_for(8, pipeline={"schedule": schedule}, **changes)
    return merged(ranks(pipe).run(partial(train, batch=batch), partial(make, pipe), config))


@pytest.mark.parametrize("over", ["auto", "torch"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
@pytest.mark.parametrize("pipe", [3, 4])
def test_dicts_with_integers_and_numbers(ranks, pipe, schedule, over):
    """P3: gradients flow through what has some, and through nothing else."""
    ours = _run(ranks, pipe, _model, schedule, _named, comm={"transport": over})
    _same(ours, _run(ranks, 1, _model, "1f1b", _named))


@pytest.mark.parametrize("over", ["auto", "torch"])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "dualpipe-v"])
def test_sequences_of_several_lengths(ranks, schedule, over):
    """P4: the first payload of each shape says what follows."""
    ours = _run(ranks, 2, Shape().module, schedule, _lengths, comm={"transport": over})
    _same(ours, _run(ranks, 1, Shape().module, "1f1b", _lengths))


def _slow(pipe: int) -> PipelineModule:
    """The last rank takes its time, and the first one goes on."""
    model = Shape().module(pipe)
    model.build()
    if pipe > 1 and pipe - 1 in model.stages:
        next(model.stages[pipe - 1].children()).register_forward_pre_hook(lambda *_: time.sleep(0.02))
    return model


@pytest.mark.parametrize("over", ["auto", "torch"])
def test_what_was_sent_stays_as_it_was(ranks, over):
    """P5: the first rank has gone on, and has freed and written much, when the other receives."""
    ours = _run(ranks, 2, _slow, "gpipe", micro_batch, comm={"transport": over})
    _same(ours, _run(ranks, 1, Shape().module, "gpipe", micro_batch))


def _with_evaluations(make: Callable[[], PipelineModule], config: dict[str, Any], counts: list[int]) -> Any:
    engine, *_ = partita.initialize(model=make(), config=config)
    evaluated = []
    for step in range(STEPS):
        engine.train_batch(iter([micro_batch(step, m) for m in range(4)]))
        for count in counts:
            batches = iter([micro_batch(50, m) for m in range(count)])
            evaluated.append(engine.eval_batch(batches, count).item())
    weights = {name: value.float() for name, value in engine.module_state_dict().items()}
    is_training = all(module.training for module in engine.module.modules())
    engine.destroy()
    return evaluated, weights, is_training


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v", "interleaved"])
def test_evaluations_between_steps_change_nothing(ranks, schedule):
    """P6: with other numbers of micro-batches."""
    config = config_for(4, pipeline={"schedule": schedule})
    ours = ranks(2).run(_with_evaluations, partial(Shape().module, 2), config, [1, 7])
    ((evaluated, _, _),) = ranks(1).run(_with_evaluations, partial(Shape().module, 1), config, [1, 7])
    undisturbed = ranks(2).run(_with_evaluations, partial(Shape().module, 2), config, [])
    for (losses, weights, is_training), (_, expected, _) in zip(ours, undisturbed, strict=True):
        assert losses == evaluated and is_training
        assert all(torch.equal(weights[name], value) for name, value in expected.items())
