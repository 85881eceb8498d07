"""Where `train_batch()` and `eval_batch()` take batches from, DeepSpeed's arguments of a step, notes on errors."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import Any

import partita
import pytest
import torch
from partita import Engine
from small_models import Regression, assert_same_weights, config, inputs, seeded, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader

ROWS = [(row,) for row in inputs(9, samples=12)]


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(ROWS, batch_size=2, **options)


class Generating(DataLoader[Any]):
    """Its iterator is a generator, as that of accelerate's loaders."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


def trained(steps: int, source: Any, **names: Any) -> dict[str, Tensor]:
    engine = Engine(seeded(), config=config(gradient_accumulation_steps=2))
    for _ in range(steps):
        engine.train_batch(source) if source is not None else engine.train_batch(**names)
    engine.destroy()
    return weights(engine.module)


@pytest.mark.parametrize("make", [loader, lambda: Generating(ROWS, batch_size=2), lambda: loader(num_workers=1)])
def test_a_loader_goes_on_where_it_was_over_epochs(make):
    """6 micro-batches an epoch, 2 in a step: 4 steps reach the second epoch. Begun anew, all steps were alike."""
    batches = [batch for _ in range(2) for batch in loader()]
    expected = trained(4, iter(batches))
    assert_same_weights(trained(4, make()), expected)
    assert_same_weights(trained(4, None, data_iter=make()), expected)
    assert_same_weights(trained(4, partita.RepeatingLoader(make())), expected)
    assert_same_weights(trained(4, None, data_iter=iter(batches)), expected)


def test_two_loaders_have_a_position_each():
    engine = Engine(seeded(), config=config())
    seen: list[Tensor] = []
    engine.module.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    first, second = loader(), loader()
    for _ in range(2):
        engine.train_batch(first)
        engine.eval_batch(second)
    a, b = [batch[0][0] for batch in list(loader())[:2]]
    assert all(torch.equal(x, y) for x, y in zip(seen, [a, a, b, b], strict=True))


def test_the_engines_own_loader_may_be_given():
    engine, _, own, _ = partita.initialize(seeded(), training_data=ROWS, config=config())
    other, *_ = partita.initialize(seeded(), training_data=ROWS, config=config())
    for _ in range(8):
        assert engine.train_batch(own).item() == other.train_batch().item()


def test_eval_batch_of_an_iterator_is_the_mean_loss_of_a_steps_micro_batches():
    engine = Engine(seeded(), config=config(gradient_accumulation_steps=3))
    batches = list(loader())
    with torch.no_grad():
        losses = [engine.module(*batch).item() for batch in batches]
    iterator = iter(batches)
    assert engine.eval_batch(iterator).item() == pytest.approx(sum(losses[:3]) / 3)
    assert engine.eval_batch(data_iter=iterator).item() == pytest.approx(sum(losses[3:]) / 3)
    assert engine.module.training
    assert engine.micro_steps == 0


def test_a_source_that_cannot_be_used_is_named():
    """Promise 7."""
    engine = Engine(seeded(), config=config())
    with pytest.raises(TypeError, match=r"data_iter is a list, which would begin anew.*RepeatingLoader"):
        engine.train_batch(data_iter=list(loader()))
    with pytest.raises(TypeError, match=r"eval_batch\(\) takes a batch or data_iter, not both"):
        engine.eval_batch(inputs(), data_iter=loader())
    with pytest.raises(ValueError, match=r"eval_batch\(\) needs a batch"):
        engine.eval_batch()
    with pytest.raises(ValueError, match="an epoch of the DataLoader has no batches"):
        engine.train_batch(DataLoader(ROWS, batch_size=20, drop_last=True))
    with pytest.raises(ValueError, match=r"after 0 of the 1 micro-batches.*RepeatingLoader"):
        engine.train_batch(iter(()))


class Logits(Regression):
    def forward(self, x: Tensor) -> Any:
        return self.predict(x)


def test_a_model_without_a_loss_is_named_with_the_way_out():
    with pytest.raises(TypeError, match=r"no loss.*Tensor of shape \(4, 1\).*engine\.backward\(loss\)"):
        Engine(seeded(Logits), config=config()).train_batch(inputs())


# -- backward(scale_wrt_gas=), was_step_applied(), global_samples


@pytest.mark.parametrize("precision", [{}, {"fp16": {"enabled": True, "initial_scale_power": 8}}], ids=["fp32", "fp16"])
def test_without_scale_wrt_gas_losses_are_summed_over_micro_batches(precision):
    """The program divides by itself then, as older programs of DeepSpeed do."""
    settings = config(gradient_accumulation_steps=4, optimizer={"type": "SGD", "params": {"lr": 0.5}}, **precision)
    divided, plain = Engine(seeded(), config=settings), Engine(seeded(), config=settings)
    for part in inputs(samples=8).chunk(4):
        loss = divided(part) / 4
        assert divided.backward(loss, scale_wrt_gas=False) is loss
        divided.step()
        plain.backward(plain(part))
        plain.step()
    assert_same_weights(weights(divided.module), weights(plain.module))


def test_was_step_applied_tells_of_the_last_step():
    """At a boundary, and not of one that was skipped."""
    engine = Engine(seeded(), config=config(gradient_accumulation_steps=2))
    assert not engine.was_step_applied()
    seen, samples = [], []
    for batch in (*inputs(0).chunk(2), inputs(1)[:2] * float("nan"), inputs(1)[2:], *inputs(2).chunk(2)):
        engine.backward(engine(batch))
        engine.step()
        seen.append(engine.was_step_applied())
        samples.append(engine.global_samples)
    assert seen == [False, True, False, False, False, True]
    assert samples == [0, 4, 4, 8, 8, 12]
    other = Engine(seeded(), config=config(gradient_accumulation_steps=2))
    other.train_state().restore(engine.train_state().copy())
    assert other.global_samples == 12


def test_the_bound_on_the_norm_may_change_between_steps():
    """Against the config's bound; 0 and infinity bound nothing, and a bound that is none is refused."""
    settings = config(optimizer={"type": "SGD", "params": {"lr": 0.5}})
    moved = []
    for given, bounds in (({"gradient_clipping": 1e-3}, [None]), ({}, [1e-3, 0.0, 1e-3, float("inf")])):
        engine = Engine(seeded(), config={**settings, **given})
        for bound in bounds:
            if bound is not None:
                engine.set_gradient_clipping(bound)
            before = torch.cat([p.detach().flatten().clone() for p in engine.module.parameters()])
            engine.backward(engine(inputs()))
            engine.step()
            after = torch.cat([p.detach().flatten() for p in engine.module.parameters()])
            moved.append((after - before).norm().item() / 0.5)
    by_config, bounded, free, bounded_again, unbounded = moved
    assert bounded == by_config == pytest.approx(1e-3, rel=1e-2)
    assert bounded_again == pytest.approx(1e-3, rel=1e-2)
    assert free > 1e-2 and unbounded > 1e-2
    with pytest.raises(ValueError, match=r"set_gradient_clipping\(nan\)"):
        engine.set_gradient_clipping(float("nan"))


# -- notes on errors about types


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.norm(self.first(x)).float().pow(2).mean()


def notes_of(model: nn.Module, settings: dict[str, Any], *args: Any, **kwargs: Any) -> str:
    engine = Engine(model, config=config(**settings))
    with pytest.raises(RuntimeError) as raised:
        engine(*args, **kwargs)
    return "".join(traceback.format_exception(raised.value)).partition("RuntimeError: ")[2]


BF16 = {"bf16": {"enabled": True}}


def test_batch_norm_in_bf16_names_the_buffer_and_the_key():
    """F51."""
    text = notes_of(seeded(Normed), BF16, inputs().bfloat16())
    assert "the buffer 'norm.running_mean' of a BatchNorm1d is not torch.bfloat16" in text
    assert '"data_types": {"buffer_dtype": "bf16"}' in text
    assert "the input" not in text
    engine = Engine(seeded(Normed), config=config(**BF16, data_types={"buffer_dtype": "bf16"}))
    engine.train_batch(inputs().bfloat16())  # what the note says helps


@pytest.mark.parametrize(("section", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_an_fp32_input_is_named_with_its_place(section, dtype):
    text = notes_of(nn.Linear(4, 1), {section: {"enabled": True}}, inputs())
    assert f"the input [0] is torch.float32 and the parameters are torch.{dtype} ({section}.enabled)" in text
    assert f".to(torch.{dtype})" in text


def test_an_input_by_name_is_found():
    assert "the input ['x'] is torch.float32" in notes_of(seeded(Normed), BF16, x=inputs())


@pytest.mark.parametrize(("settings", "dtype"), [({}, torch.float64), (BF16, torch.bfloat16)])
def test_other_errors_have_no_note(settings, dtype):
    """One in a model without 16-bit parameters, and one about shapes."""
    assert "partita:" not in notes_of(nn.Linear(4, 1), settings, torch.ones(2, 3, dtype=dtype))
