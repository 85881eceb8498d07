"""Several micro-batches, several backwards: whatever runs before a step counts once, in full."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any

import partita
import pytest
import torch
import torch.nn.functional as F
from communicators import RecordingCommunicator, communicating_through
from partita.utils import safe_get_full_grad
from reference import (
    DTYPES,
    ODD_MODEL,
    PRECISIONS,
    Outcome,
    Training,
    assert_equal_runs,
    assert_same_runs,
    backward_of,
    sgd_config,
    three_backwards,
    tokens_of,
    train_in_engine,
    train_plain,
)
from support import make_model
from torch import Tensor, nn

STAGES = (0, 1, 2, 3)


class Weighted(nn.Module):
    """The odd model with a factor on the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()

    def forward(self, tokens: Tensor, targets: Tensor, weight: float) -> Tensor:
        return self.model(tokens, targets) * weight


def only_one(chosen: int, forward: Any, backward: Any, step: int, index: int) -> None:
    backward(forward(*tokens_of(step, index), weight=float(index == chosen)))


@pytest.mark.pairwise
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("accumulation", [1, 2, 5])
@pytest.mark.parametrize("stage", STAGES)
def test_one_micro_batch_on_one_rank_is_enough(ranks, stage, accumulation, precision):
    """G4. Only the last micro-batch of rank 1 has a non-zero gradient; in fp32 also only the first of rank 0."""
    config = sgd_config(stage=stage, gradient_accumulation_steps=accumulation, **PRECISIONS[precision])
    count = 2 * accumulation
    for chosen in {count - 1, 0} if precision == "fp32" else {count - 1}:
        training = Training(Weighted, partial(only_one, chosen))
        expected = train_plain(training, count, DTYPES[precision])
        assert_equal_runs(ranks(2).run(train_in_engine, training, config), expected, precision)


def forwards_first(forward: Any, backward: Any, step: int, index: int) -> None:
    losses = [forward(*tokens_of(step, index + 100 * i)) for i in range(2)]
    for loss in losses:
        backward(loss)


def two_losses_of_one_forward(forward: Any, backward: Any, step: int, index: int) -> None:
    loss = forward(*tokens_of(step, index))
    backward(loss, retain_graph=True)
    backward(0.5 * loss.sqrt())


def sum_of_two_forwards(forward: Any, backward: Any, step: int, index: int) -> None:
    backward(forward(*tokens_of(step, index)) + 0.5 * forward(*tokens_of(step, index + 100)))


MANY = [three_backwards, forwards_first, two_losses_of_one_forward, sum_of_two_forwards]


@pytest.mark.pairwise
@pytest.mark.parametrize("micro_batch", MANY)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_every_backward_before_a_step_counts(ranks, stage, accumulation, micro_batch):
    """G5. Also after the boundary's first backward was reduced already."""
    training = Training(make_model, micro_batch)
    config = sgd_config(stage=stage, gradient_accumulation_steps=accumulation)
    assert_equal_runs(ranks(2).run(train_in_engine, training, config), train_plain(training, 2 * accumulation))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backward", ["engine.scale", "loss.backward"])
def test_every_way_to_call_backward_is_the_same(ranks, backward, precision):
    """engine.scale(loss).backward() and a plain loss.backward() are engine.backward(loss)."""
    config = sgd_config(stage=2, gradient_accumulation_steps=2, **PRECISIONS[precision])
    runs = [ranks(2).run(train_in_engine, ODD_MODEL, config, None, b) for b in (backward, "engine.backward")]
    if (backward, precision) != ("loss.backward", "fp16"):  # there, small gradients underflow before they are scaled
        assert_same_runs(*runs)
    assert_equal_runs(runs[0], train_plain(ODD_MODEL, 4, DTYPES[precision]), precision)


@pytest.mark.parametrize(
    ("backward", "micro_batch"),
    list(product(["engine.backward", "engine.scale", "loss.backward"], MANY)),
)
def test_every_loss_is_scaled_once(ranks, backward, micro_batch):
    """G5. In fp16, in every way to call backward, for each backward of a micro-batch."""
    training = Training(make_model, micro_batch)
    runs = ranks(2).run(train_in_engine, training, sgd_config(stage=1, **PRECISIONS["fp16"]), None, backward)
    assert_equal_runs(runs, train_plain(training, 2, DTYPES["fp16"]), "fp16")


def _losses_over_tokens(stage: int, accumulation: int) -> Outcome:
    engine = partita.Engine(
        model=nn.Sequential(nn.Embedding(11, 7), nn.Linear(7, 11)).apply(_reset),
        config=sgd_config(stage=stage, gradient_accumulation_steps=accumulation),
    )
    norms = []
    for step in range(3):
        mine = [i * engine.world_size + engine.global_rank for i in range(accumulation)]
        tokens_in_step = sum(valid_tokens(step, index) for index in mine)
        for index in mine:
            engine.backward(engine.token_mean(summed_loss(engine, step, index), tokens_in_step))
            engine.step()
        norms.append(engine.get_global_grad_norm())
    weights = engine.module_state_dict()
    engine.destroy()
    return Outcome(weights, norms)


def _reset(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        torch.manual_seed(module.weight.numel())
        module.reset_parameters()


def valid_tokens(step: int, index: int) -> int:
    """Between none and all twelve."""
    return (5 * index + 7 * step) % 13


def summed_loss(forward: Any, step: int, index: int) -> Tensor:
    tokens, targets = (t.flatten() for t in tokens_of(step, index))
    targets[valid_tokens(step, index) :] = -100
    return F.cross_entropy(forward(tokens), targets, reduction="sum")


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_token_mean_is_the_mean_over_all_tokens(ranks, stage, accumulation):
    """G6. Ranks and micro-batches hold unequal numbers of valid tokens, some none."""
    world_size = 3
    indices = range(world_size * accumulation)

    def step_mean(forward: Any, backward: Any, step: int, _index: int) -> None:
        loss = sum(summed_loss(forward, step, i) for i in indices)
        backward(loss / sum(valid_tokens(step, i) for i in indices))

    training = Training(lambda: nn.Sequential(nn.Embedding(11, 7), nn.Linear(7, 11)).apply(_reset), step_mean)
    runs = ranks(world_size).run(_losses_over_tokens, stage, accumulation)
    assert_equal_runs(runs, train_plain(training, 1))


TINY = 2.0**-9  # 1 + TINY is 1 in bfloat16


def _tiny_gradients(stage: int, accumulation: int, no_sync: bool) -> float | None:
    """The norm for one weight that is given a gradient of 1, then of TINY in all other micro-batches."""
    config = sgd_config(stage=stage, gradient_accumulation_steps=accumulation, bf16={"enabled": True})
    engine = partita.Engine(model=nn.Linear(1, 1, bias=False), config=config)
    for i in range(accumulation):
        loss = engine(torch.full((1, 1), 1.0 if i == 0 else TINY, dtype=torch.bfloat16)).sum()
        if no_sync and i < accumulation - 1:
            with engine.no_sync():
                engine.backward(loss)
        else:
            engine.backward(loss)
        engine.step()
    norm = engine.get_global_grad_norm()
    engine.destroy()
    return norm


@pytest.mark.parametrize(("stage", "no_sync"), [(0, False), (1, False), (2, False), (0, True), (1, True)])
def test_tiny_gradients_are_not_lost_in_the_sum(ranks, stage, no_sync):
    """G13. 256 micro-batches in bf16; the fp32 sum is exact."""
    assert ranks(2).run(_tiny_gradients, stage, 256, no_sync) == [(1 + 255 * TINY) / 256] * 2


# Which of five micro-batches are in a no_sync block.
WITHOUT_SYNC = {"boundary": (), "all but the last": range(4), "all": range(5), "all after a reduction": (2, 3, 4)}


def _by_hand(stage: int, backward: str, how: str) -> Outcome:
    """Steps of five micro-batches that no config announces: divided by 1, so each has a fifth of the loss."""
    engine = partita.Engine(model=make_model(), config=sgd_config(stage=stage))
    run_backward = backward_of(engine, backward)
    norms = []
    for step in range(3):
        for i in range(5):
            last = i == 4
            if how == "boundary":
                engine.set_gradient_accumulation_boundary(last)
                assert engine.is_gradient_accumulation_boundary() == last
            with engine.no_sync() if i in WITHOUT_SYNC[how] else nullcontext():
                run_backward(engine(*tokens_of(step, i * engine.world_size + engine.global_rank)) / 5)
            if how == "boundary" or last:
                engine.step()
        norms.append(engine.get_global_grad_norm())
    assert engine.global_steps == 3
    weights = engine.module_state_dict()
    engine.destroy()
    return Outcome(weights, norms)


@pytest.mark.parametrize("backward", ["engine.backward", "loss.backward"])
@pytest.mark.parametrize("stage", STAGES)
def test_boundaries_set_by_hand(ranks, stage, backward):
    """`set_gradient_accumulation_boundary` decides which steps update."""
    assert_equal_runs(ranks(2).run(_by_hand, stage, backward, "boundary"), train_plain(ODD_MODEL, 10))


@pytest.mark.pairwise
@pytest.mark.parametrize("how", ["all but the last", "all", "all after a reduction"])
@pytest.mark.parametrize("backward", ["engine.backward", "loss.backward"])
@pytest.mark.parametrize("stage", [0, 1])
def test_no_sync_defers_but_loses_nothing(ranks, stage, backward, how):
    """`no_sync()` in stages 0 and 1, around all backwards but the last, around all, or after one was reduced."""
    assert_equal_runs(ranks(2).run(_by_hand, stage, backward, how), train_plain(ODD_MODEL, 10))


def _collectives_in_no_sync(stage: int) -> int:
    with communicating_through(RecordingCommunicator) as recorder:
        engine = partita.Engine(model=make_model(), config=sgd_config(stage=stage))
        for step in range(2):
            recorder.events.clear()
            with engine.no_sync():
                for i in range(3):
                    engine.backward(engine(*tokens_of(step, i)))
                launches = len(recorder.launches())
            engine.step()
        engine.destroy()
    return launches


@pytest.mark.parametrize("stage", [0, 1])
def test_no_sync_communicates_nothing(ranks, stage):
    """That is what it is for."""
    assert ranks(2).run(_collectives_in_no_sync, stage) == [0, 0]


@pytest.mark.parametrize("stage", [2, 3])
def test_no_sync_is_refused_from_stage_2_on(ranks, stage):
    """There is no room for gradients that are not reduced."""
    with pytest.raises(AssertionError, match=rf"no_sync\(\) needs full gradients on every rank.*stage {stage}"):
        ranks(2).run(_by_hand, stage, "engine.backward", "all")


def test_a_step_inside_no_sync_is_refused():
    """Its gradients would stay on their rank. A block inside a block changes nothing; the step after it is right."""
    engine = partita.Engine(model=make_model(), config=sgd_config(stage=1))
    other = partita.Engine(model=make_model(), config=sgd_config(stage=1))
    with engine.no_sync():
        with engine.no_sync():
            engine.backward(engine(*tokens_of(0, 0)))
        with pytest.raises(RuntimeError, match=r"engine\.step\(\) was called inside engine\.no_sync\(\)"):
            engine.step()
        engine.backward(engine(*tokens_of(0, 1)))
    engine.step()
    for i in range(2):
        other.backward(other(*tokens_of(0, i)))
    other.step()
    assert engine.global_steps == 1
    for name, value in engine.module_state_dict().items():
        assert torch.equal(value, other.module_state_dict()[name]), name


def _local_gradients() -> str:
    engine = partita.Engine(model=make_model(), config=sgd_config(stage=1))
    with engine.no_sync():
        engine.backward(engine(*tokens_of(0, engine.global_rank)))
    try:
        safe_get_full_grad(engine.module.mix.weight)
    except RuntimeError as error:
        return str(error)
    raise AssertionError("not refused")


def test_gradients_that_are_local_are_not_given_as_the_steps(ranks):
    """A clear answer, on every rank."""
    for message in ranks(2).run(_local_gradients):
        assert "'mix.weight'" in message and "no_sync()" in message and "this rank's only" in message


def _dropped(stage: int) -> Outcome:
    """As the plain run, with backwards before every step whose gradients are dropped."""
    engine = partita.Engine(model=make_model(), config=sgd_config(stage=stage, gradient_accumulation_steps=2))
    norms = []
    for step in range(3):
        engine.backward(engine(*tokens_of(step, 77)))
        engine.backward(engine(*tokens_of(step, 78)))
        engine.zero_grad()
        for i in range(2):
            engine.backward(engine(*tokens_of(step, i * engine.world_size + engine.global_rank)))
            engine.step()
        norms.append(engine.get_global_grad_norm())
    weights = engine.module_state_dict()
    engine.destroy()
    return Outcome(weights, norms)


@pytest.mark.parametrize("stage", STAGES)
def test_zero_grad_drops_what_was_accumulated(ranks, stage):
    """Nothing of a dropped backward enters the step, reduced already or not."""
    assert_equal_runs(ranks(2).run(_dropped, stage), train_plain(ODD_MODEL, 4))
