"""Accelerator over Partita: the losses, norms, rates and predictions of Accelerate under DDP, in every stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hf_runs import furthest, launched, stage
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("accelerate")

SAMPLES = 37


def as_launched(function: Any, *args: Any) -> Any:
    with launched():
        return function(*args)


def ours(number: int = 0, transport: str = "auto", **options: Any) -> Any:
    from partita.integrations.huggingface import PartitaAccelerator

    return PartitaAccelerator(cpu=True, **stage(number, comm={"transport": transport}), **options)


def plain(**options: Any) -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True, **options)


def model_of(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 15), nn.Dropout(0.1), nn.Tanh(), nn.Linear(15, 1))


def data() -> TensorDataset:
    x = torch.randn(SAMPLES, 8, generator=torch.Generator().manual_seed(3))
    return TensorDataset(x, x[:, :4].sum(1, keepdim=True))


def options() -> dict[str, Any]:
    from accelerate.utils import DataLoaderConfiguration

    return {
        "gradient_accumulation_steps": 2,
        "dataloader_config": DataLoaderConfiguration(use_seedable_sampler=True),
    }


class Program:
    """Two epochs of a program as Accelerate's documentation has it, and what it sees."""

    def __init__(self, accelerator: Any, order: str) -> None:
        self.accelerator = accelerator
        model = model_of()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 4) * 0.97**step)
        loader = DataLoader(data(), batch_size=4, shuffle=True)
        things = {"model": model, "optimizer": optimizer, "schedule": schedule, "loader": loader}
        prepared = accelerator.prepare(*[things[name] for name in order.split()])
        ready = dict(zip(order.split(), prepared, strict=True))
        self.model, self.optimizer = ready["model"], ready["optimizer"]
        self.schedule, self.loader = ready["schedule"], ready["loader"]
        self.seen: list[tuple[float, ...]] = []

    def train(self, epochs: range) -> None:
        for epoch in epochs:
            self.loader.set_epoch(epoch)
            self.model.train()
            for x, y in self.loader:
                with self.accelerator.accumulate(self.model):
                    loss = F.mse_loss(self.model(x), y)
                    self.accelerator.backward(loss)
                    norm = 0.0
                    if self.accelerator.sync_gradients:
                        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0).item()
                    self.optimizer.step()
                    self.schedule.step()
                    self.optimizer.zero_grad()
                self.seen.append((loss.item(), norm, self.optimizer.param_groups[0]["lr"]))

    def predictions(self) -> Tensor:
        """All samples once, though no number of ranks divides them."""
        loader = self.accelerator.prepare(DataLoader(data(), batch_size=4))
        self.model.eval()
        with torch.no_grad():
            return torch.cat([self.accelerator.gather_for_metrics(self.model(x)) for x, _ in loader])


def _trains_as_accelerate(folder: str, stages: tuple[int, ...], orders: tuple[str, ...], transport: str) -> None:
    """And a run that goes on from `save_state()` is the unbroken one."""
    expected = Program(plain(**options()), "model optimizer loader schedule")
    expected.train(range(2))
    for number, order in [(number, order) for number in stages for order in orders]:
        program = Program(ours(number, transport, **options()), order)
        program.train(range(1))
        program.accelerator.save_state(f"{folder}/{number}/{order[0]}")
        program.train(range(1, 2))
        assert furthest(program.seen, expected.seen) < 3e-6, (number, order)
        predictions = program.predictions()
        assert predictions.shape == (SAMPLES, 1)
        torch.testing.assert_close(predictions, expected.predictions(), atol=1e-5, rtol=0)
        again = Program(ours(number, transport, **options()), order)
        again.accelerator.load_state(f"{folder}/{number}/{order[0]}")
        again.train(range(1, 2))
        assert again.seen == program.seen[-len(again.seen) :]
        assert torch.equal(again.predictions(), predictions)
        for one in (program, again):
            one.accelerator.free_memory(one.model)


ORDERS = ("model optimizer loader schedule", "schedule loader optimizer model")


def test_it_trains_and_resumes_as_accelerate_does(ranks, tmp_path):
    ranks(2).run(as_launched, _trains_as_accelerate, str(tmp_path), (0, 3), ORDERS[1:], "auto")


@pytest.mark.slow
@pytest.mark.parametrize("over", ["auto", "torch"])
@pytest.mark.parametrize("world", [1, 2])
def test_it_trains_and_resumes_as_accelerate_does_in_every_stage(ranks, tmp_path, world, over):
    ranks(world).run(as_launched, _trains_as_accelerate, str(tmp_path), (0, 1, 2, 3), ORDERS, over)


# -- the calls of a loop


def prepared(accelerator: Any, lr: float = 0.1) -> tuple[Any, Any]:
    model = model_of()
    model[1].p = 0.0
    ready: tuple[Any, Any] = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=lr))
    return ready


def batches(count: int) -> list[tuple[Tensor, ...]]:
    """This rank's."""
    x, y = data().tensors
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    return [(a[mine], b[mine]) for a, b in zip(x.chunk(count), y.chunk(count), strict=True)]


def weights(accelerator: Any, model: Any) -> Tensor:
    """On the main process."""
    state = accelerator.get_state_dict(model)
    return torch.cat([value.flatten() for value in state.values()]) if state else torch.zeros(0)


def _accumulates_by_hand(number: int) -> list[Tensor]:
    """Weights after two steps of two micro-batches: with no_sync(), and with nothing."""
    found = []
    for accelerator, with_no_sync in ((plain(), True), (ours(number), True), (ours(number), False)):
        model, optimizer = prepared(accelerator)
        for i, (x, y) in enumerate(batches(4)):
            if i % 2 == 0 and with_no_sync:
                with accelerator.no_sync(model):
                    accelerator.backward(F.mse_loss(model(x), y))
            else:
                accelerator.backward(F.mse_loss(model(x), y))
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()
        found.append(weights(accelerator, model))
        accelerator.free_memory(model)
    return found


@pytest.mark.parametrize(
    "number", [1, pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_gradients_accumulate_without_accumulate(ranks, number):
    """G5"""
    expected, *found = ranks(2).run(as_launched, _accumulates_by_hand, number)[0]
    for one in found:
        torch.testing.assert_close(one, expected, atol=1e-6, rtol=0)


def _drops_and_skips() -> None:
    """F10: zero_grad() without step() drops; a step that is not finite is skipped, and said to be."""
    (x, y), *_ = batches(2)
    norms = []
    for drops in (False, True):
        accelerator = ours(2)
        model, optimizer = prepared(accelerator)
        if drops:
            accelerator.backward(F.mse_loss(model(x), y))
            optimizer.zero_grad()
        accelerator.backward(F.mse_loss(model(x), y))
        norms.append(accelerator.clip_grad_norm_(model.parameters(), float("inf")).item())
        optimizer.step()
    assert norms[0] == norms[1]
    before = weights(accelerator, model)
    accelerator.backward(F.mse_loss(model(x * float("inf")), y))
    optimizer.step()
    assert accelerator.optimizer_step_was_skipped and optimizer.step_was_skipped
    assert torch.equal(weights(accelerator, model), before)
    accelerator.backward(F.mse_loss(model(x), y))
    norm = accelerator.clip_grad_norm_(model.parameters(), float("inf"))
    optimizer.step()
    assert not accelerator.optimizer_step_was_skipped
    after = weights(accelerator, model)
    if accelerator.is_main_process:
        assert (after - before).norm().item() == pytest.approx(0.1 * norm.item(), rel=1e-4), "one step, once"


def _bounds_each_norm_of_its_own() -> None:
    """A step without clip_grad_norm_() is not clipped, whatever the step before was."""
    accelerator = ours(3)
    model, optimizer = prepared(accelerator)
    (x, y), *_ = batches(2)
    moved = []
    for bound in (1e-3, None, 2e-3):
        before = weights(accelerator, model)
        accelerator.backward(F.mse_loss(model(x), y))
        if bound is not None:
            accelerator.clip_grad_norm_(model.parameters(), bound)
        optimizer.step()
        optimizer.zero_grad()
        moved.append((weights(accelerator, model) - before).norm().item())
    if accelerator.is_main_process:
        assert moved[0] == pytest.approx(1e-4, rel=1e-2) and moved[2] == pytest.approx(2e-4, rel=1e-2)
        assert moved[1] > 1e-2


def _says_what_cannot_be() -> None:
    from partita.integrations.huggingface import PartitaAccelerator

    accelerator = ours(3)
    model, optimizer = prepared(accelerator)
    (x, y), *_ = batches(2)
    accelerator.backward(F.mse_loss(model(x), y))
    some = next(iter(model.parameters()))
    for part in (some, [some], iter([some])):
        with pytest.raises(ValueError, match=r"1 of \d+ trained parameters"):
            accelerator.clip_grad_norm_(part, 0.5)
    optimizer.step()
    other = model_of(2)
    with pytest.raises(NotImplementedError, match=r"clip_grad_value_.*clip_grad_norm_"):
        accelerator.clip_grad_value_(model.parameters(), 1.0)
    with pytest.raises(NotImplementedError, match="even_batches"):
        accelerator.join_uneven_inputs([model])
    with pytest.raises(ValueError, match="2-norm"):
        accelerator.clip_grad_norm_(model.parameters(), 1.0, norm_type=1)
    with pytest.raises(ValueError, match="one model"):
        accelerator.prepare(other, torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"prepare\(model, optimizer\)"):
        ours(0).prepare(torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="parameters that are not in Sequential"):
        ours(0).prepare(model_of(3), torch.optim.SGD(other.parameters(), lr=0.1))
    with_two = PartitaAccelerator(cpu=True, partita_config={"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}})
    with pytest.raises(ValueError, match=r"optimizer is in the config, and SGD comes to prepare\(\)"):
        prepared(with_two)
    with pytest.raises(RuntimeError, match=r"prepare\(model, optimizer\)"):
        ours(0).backward(torch.ones(()))
    accelerator.backward(F.mse_loss(model(x), y))
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(RuntimeError, match=r"max_norm=0\.5.*max_norm=1 before"):
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
    with pytest.raises(RuntimeError, match="cannot be left out"):
        optimizer.zero_grad()
    clipped = ours(0, gradient_accumulation_steps=1)
    assert clipped.gradient_accumulation_steps == 1
    with pytest.raises(ValueError, match="mixed_precision = 'fp8'"):
        ours(0, mixed_precision="fp8")


def _calls() -> None:
    _drops_and_skips()
    _bounds_each_norm_of_its_own()
    _says_what_cannot_be()


def test_calls_mean_what_they_mean_in_accelerate_or_are_refused(ranks):
    ranks(2).run(as_launched, _calls)


# -- models


def _evaluates_another_model(number: int) -> None:
    """Beside the one in training, and prepared by itself: as it was, and in stage 3 partitioned."""
    accelerator = ours(number)
    model, _ = prepared(accelerator)
    teacher, plain_teacher = model_of(5), model_of(5)
    ready = accelerator.prepare(teacher)
    x = data().tensors[0]
    for one in (ready, plain_teacher):
        one.eval()
    with torch.no_grad():
        assert torch.equal(ready(x), plain_teacher(x))
    assert accelerator.unwrap_model(ready) is teacher
    assert type(accelerator.unwrap_model(model)) is nn.Sequential
    assert (type(ready).__name__ == "Engine") == (number == 3)
    state = accelerator.get_state_dict(ready)
    assert bool(state) == (accelerator.is_main_process or number < 3)
    accelerator.free_memory(model, *([ready] if number == 3 else []))
    with pytest.raises(RuntimeError, match="destroy"):
        model.save_checkpoint("nowhere")


@pytest.mark.parametrize("number", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_second_model_is_for_evaluation(ranks, number):
    ranks(2).run(as_launched, _evaluates_another_model, number)


def _takes_floats_in_bf16() -> None:
    """The config's precision is the accelerator's, and inputs are cast, as autocast would."""
    from partita.integrations.huggingface import PartitaAccelerator

    accelerator = PartitaAccelerator(
        partita_config={"bf16": {"enabled": True}, "gradient_accumulation_steps": 4}, cpu=True
    )
    assert accelerator.mixed_precision == "bf16" and accelerator.gradient_accumulation_steps == 4
    model, optimizer = prepared(accelerator)
    assert model.config.data_types.grad_accum_dtype == "fp32"
    (x, y), *_ = batches(2)
    with accelerator.accumulate(model):
        outputs = model(x)
        accelerator.backward(F.mse_loss(outputs.float(), y))
        optimizer.step()
    assert outputs.dtype == torch.bfloat16 and x.dtype == torch.float32


def _saves_a_model(folder: str) -> None:
    """One safetensors file with each tied weight once, from parameters that no rank has alone."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 5)
            self.head = nn.Linear(5, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    accelerator, model = ours(3), Tied()
    weight = model.embed.weight.detach().clone()
    ready, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.save_model(ready, folder)
    accelerator.wait_for_everyone()
    [(_, saved)] = load_file(f"{folder}/model.safetensors").items()
    assert torch.equal(saved, weight)


@pytest.mark.slow
def test_save_model_writes_the_whole_model(ranks, tmp_path):
    ranks(2).run(as_launched, _saves_a_model, str(tmp_path))


def _scales_losses() -> None:
    """fp16: the first steps overflow, and say so; the schedule stands still meanwhile."""
    accelerator = ours(1, mixed_precision="fp16")
    model, optimizer = prepared(accelerator, lr=1e-3)
    schedule = accelerator.prepare(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    (x, y), *_ = batches(2)
    skipped = 0
    for _ in range(8):
        loss = 10 * F.mse_loss(model(x).float(), y)
        accelerator.backward(loss)
        optimizer.step()
        skipped += accelerator.optimizer_step_was_skipped
        schedule.step()
        optimizer.zero_grad()
    assert 0 < skipped < 8 and model.skipped_steps == skipped
    taken = accelerator.num_processes * (8 - skipped)  # Accelerate's schedules step once for each process
    assert schedule.get_last_lr()[0] == pytest.approx(1e-3 * 0.5**taken)


@pytest.mark.slow
def test_fp16_skips_steps_and_their_schedule(ranks):
    """N1, O5"""
    ranks(2).run(as_launched, _scales_losses)


@pytest.mark.slow
def test_inputs_of_a_bf16_model_may_be_fp32(ranks):
    ranks(2).run(as_launched, _takes_floats_in_bf16)
