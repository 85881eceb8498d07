"""What is true before, between and after steps of a pipeline: same data on both ends, modes, interrupts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import partita
import pytest
import torch
from partita import LifecycleError
from partita.pipeline import LayerSpec, PipelineError, PipelineModule
from pipelines import WIDTH, Block, Shape, config_for, micro_batch
from ranks import RankError
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

COUNT = 4


def _batches(step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    return iter([micro_batch(step, m) for m in range(COUNT)])


def _shuffled(first_is_random: bool) -> list[float]:
    """Two epochs of a program's own DataLoader. A layer that draws random numbers is on one of two ranks."""
    torch.manual_seed(0)
    x = torch.arange(2.0 * COUNT)[:, None].repeat(1, 3)
    layers = [nn.Dropout(0.5) if first_is_random else nn.Identity(), nn.Linear(3, 3), LayerSpec(nn.Linear, 3, 3)]
    model = PipelineModule(layers, 2, loss_fn=nn.functional.mse_loss, partition_method="uniform")
    config = {**config_for(COUNT), "train_micro_batch_size_per_gpu": 2}
    engine, *_ = partita.initialize(model=model, config=config)
    loader = DataLoader(TensorDataset(x, x), batch_size=2, shuffle=True)
    losses = [engine.train_batch(loader).item() for _ in range(2)]
    engine.destroy()
    return losses


def test_inputs_and_labels_of_a_loader_that_shuffles_on_each_rank(ranks):
    ranks(2).run(_shuffled, False)
    with pytest.raises(RankError, match=r"(?s)ValueError: the rank of the first stage has read other labels"):
        ranks(2).run(_shuffled, True)


def _labels_are_missing() -> list[float]:
    """Ranks that have no use for labels, or for inputs, may give anything that is recognised as such."""
    engine, *_ = partita.initialize(model=Shape().module(2), config=config_for(COUNT))
    losses = []
    for dummy in (lambda x: None, torch.zeros_like):
        pairs = list(_batches())
        given = [(x, dummy(y)) for x, y in pairs] if engine.is_first_stage() else [(None, y) for _, y in pairs]
        losses.append(engine.train_batch(iter(given)).item())
    engine.destroy()
    return losses


def test_ranks_may_give_only_what_they_need(ranks):
    assert all(loss > 0 for losses in ranks(2).run(_labels_are_missing) for loss in losses)


class _Counts(nn.Module):
    """Counts its forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(x)


def _calls_after_evaluation() -> int:
    counts = _Counts()
    layers = [nn.Linear(3, 3), counts, nn.Linear(3, 3), nn.Linear(3, 3)]
    model = PipelineModule(
        layers, 2, loss_fn=nn.functional.mse_loss, partition_method="uniform", activation_checkpoint_interval=1
    )
    engine, *_ = partita.initialize(model=model, config=config_for(COUNT))
    pairs = [(torch.ones(3, 3), torch.ones(3, 3))] * COUNT
    engine.eval_batch(iter(pairs))
    counts.calls = 0
    engine.train_batch(iter(pairs))
    engine.destroy()
    return counts.calls


def test_activations_are_recomputed_after_an_evaluation(ranks):
    assert ranks(2).run(_calls_after_evaluation)[0] == 2 * COUNT


def _within_inference_mode() -> tuple[str, float, float]:
    engine, *_ = partita.initialize(model=Shape().module(2), config=config_for(COUNT))
    with torch.inference_mode():
        evaluated = engine.eval_batch(_batches()).item()
        with pytest.raises(LifecycleError) as caught:
            engine.train_batch(_batches())
    trained = engine.train_batch(_batches()).item()
    engine.destroy()
    return str(caught.value), evaluated, trained


def test_inference_mode(ranks):
    for said, evaluated, trained in ranks(2).run(_within_inference_mode):
        assert "inside torch.inference_mode()" in said
        assert evaluated == trained


def _many_are_evaluated(pipe: int, chunks: int, skips: dict[int, list[int]]) -> list[float]:
    """A layer per stage; far more micro-batches than messages may be under way."""
    torch.manual_seed(0)
    layers = [LayerSpec(Block, WIDTH) for _ in range(pipe * chunks)]
    model = PipelineModule(layers, pipe, loss_fn=nn.functional.mse_loss, partition_method="uniform", skips=skips)
    config = config_for(2 * pipe, pipeline={"schedule": "interleaved", "chunks": chunks}, comm={"timeout_seconds": 20})
    engine, *_ = partita.initialize(model=model, config=config)
    pairs = [(torch.full((2, WIDTH), float(m)), torch.ones(2, WIDTH)) for m in range(40)]
    losses = [engine.eval_batch(iter(pairs), len(pairs)).item(), engine.train_batch(iter(pairs)).item()]
    engine.destroy()
    return losses


# First evaluation needs a larger window than training; then an action sends several messages to one rank.
@pytest.mark.parametrize(("pipe", "chunks", "skips"), [(3, 3, {8: [0]}), (4, 4, {4: [0], 5: [0], 6: [0]})])
def test_many_micro_batches_are_evaluated_with_skips(ranks, pipe, chunks, skips):
    assert all(
        loss > 0 for losses in ranks(pipe).run(partial(_many_are_evaluated, pipe, chunks, skips)) for loss in losses
    )


class _Interrupted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyboardInterrupt


def _interrupt() -> list[Any]:
    """What each of two calls raises; the first stage is interrupted."""
    layers = [nn.Linear(3, 3), _Interrupted(), nn.Linear(3, 3), nn.Linear(3, 3)]
    model = PipelineModule(layers, 2, loss_fn=nn.functional.mse_loss, partition_method="uniform")
    engine, *_ = partita.initialize(model=model, config=config_for(COUNT))
    raised = []
    for _ in range(2):
        try:
            engine.train_batch(iter([(torch.ones(3, 3), torch.ones(3, 3))] * COUNT))
        except BaseException as error:
            raised.append((type(error), str(error)))
    engine.destroy()
    return raised


def test_an_interrupt_on_one_rank_ends_the_engine_on_all(ranks):
    (interrupt, again), (other, other_again) = ranks(2).run(_interrupt)
    assert interrupt[0] is KeyboardInterrupt
    assert other[0] is PipelineError and "KeyboardInterrupt" in other[1]
    assert again[0] is LifecycleError and other_again[0] is LifecycleError
    assert "cannot go on (KeyboardInterrupt)" in again[1]
