"""The configuration of an engine: "auto" follows the model and what the program gives, and what was noted is listed."""

from __future__ import annotations

import logging
from typing import Any

import partita
import pytest
import torch
from partita.config import ConfigError
from small_models import Regression, inputs, seeded

AUTO_SIZES = dict.fromkeys(
    ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"
)
AUTO_TYPES = {"fp16": {"enabled": "auto", "initial_scale_power": 32}, "bf16": {"enabled": "auto"}}
WARMUP = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": 2, "warmup_type": "linear"}


def reasons(engine: partita.Engine) -> dict[str, str]:
    return {note.key: note.reason for note in engine.config.ignored}


def step(engine: partita.Engine) -> None:
    engine.backward(engine(inputs()))
    engine.step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_auto_precision_is_the_models(dtype: torch.dtype) -> None:
    config = {**AUTO_TYPES, **AUTO_SIZES, "optimizer": {"type": "AdamW"}}
    engine = partita.initialize(Regression().to(dtype), config=config)[0]
    assert engine.config.fp16.enabled == (dtype is torch.float16)
    assert engine.config.bf16.enabled == (dtype is torch.bfloat16)
    assert engine.loss_scale == (2.0**24 if dtype is torch.float16 else 1.0)
    assert {p.dtype for p in engine.module.parameters()} == {dtype}
    assert engine.train_batch_size() == 1
    assert reasons(engine)["train_micro_batch_size_per_gpu"].startswith("is 1: nothing says how many")
    engine.destroy()


def test_a_data_loader_has_a_batch_size() -> None:
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 4)), batch_size=4)
    engine = partita.Engine(Regression(), config={**AUTO_SIZES, "optimizer": {"type": "AdamW"}}, train_data=data)
    assert engine.train_micro_batch_size_per_gpu() == 4
    assert reasons(engine)["train_micro_batch_size_per_gpu"] == "is 4, the batch size of the data loader"
    engine.destroy()


@pytest.mark.parametrize("as_function", [False, True])
def test_an_optimizer_of_the_program_is_taken_and_the_configs_is_noted(as_function: bool) -> None:
    model = Regression()
    given: Any = torch.optim.SGD(model.parameters(), lr=0.5)
    if as_function:
        given = lambda parameters: torch.optim.SGD(parameters, lr=0.5)  # noqa: E731
    config = {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}}}
    engine, optimizer, _, _ = partita.initialize(model, optimizer=given, config=config)
    assert optimizer is not None
    assert type(optimizer.inner) is torch.optim.SGD
    assert engine.get_lr() == [0.5]
    assert reasons(engine) == {
        "optimizer": f"the program gives {'a function that makes one' if as_function else 'a SGD'}, which is taken"
    }
    engine.destroy()


def test_an_open_warm_up_ends_at_the_learning_rate_of_the_optimizer() -> None:
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 0.25}},
        "scheduler": {"type": "WarmupLR", "params": WARMUP},
    }
    engine = partita.initialize(Regression(), config=config)[0]
    for _ in range(5):
        step(engine)
    assert engine.get_lr() == [0.25]
    engine.destroy()


# What is said at start


def messages(caplog: pytest.LogCaptureFixture, config: dict[str, Any]) -> list[tuple[int, str]]:
    with caplog.at_level(logging.INFO, logger="partita"):
        partita.initialize(Regression(), config=config)[0].destroy()
    return [(record.levelno, record.getMessage()) for record in caplog.records if "config" in record.getMessage()]


def test_noted_keys_are_listed_in_one_line_at_start(caplog: pytest.LogCaptureFixture) -> None:
    config = {
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "zero_optimization": {"stage": 1, "sub_group_size": 1e9},
        "autotuning": {"enabled": False},
    }
    ((level, line),) = messages(caplog, config)
    assert level == logging.INFO
    assert line.startswith("config, noted: ")
    for key in (
        "optimizer.params.torch_adam = True",
        "zero_optimization.sub_group_size = 1000000000.0",
        "autotuning =",
    ):
        assert key in line


def test_nothing_noted_is_no_line(caplog: pytest.LogCaptureFixture) -> None:
    assert messages(caplog, {"optimizer": {"type": "AdamW"}}) == []


def test_a_decay_without_an_end_warns(caplog: pytest.LogCaptureFixture) -> None:
    decay = {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_num_steps": 5}}
    ((level, line),) = messages(caplog, {"optimizer": {"type": "AdamW"}, "scheduler": decay})
    assert level == logging.WARNING
    assert "scheduler.params.total_num_steps = 'auto': nobody says how many optimizer steps" in line


# Adam's meanings


def test_adam_over_groups_with_a_decay_is_refused_while_the_model_is_as_it_was() -> None:
    """F18: the decay of the program's groups counts."""
    model = seeded(Regression)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    groups = [{"params": list(model.parameters()), "weight_decay": 0.1}]
    with pytest.raises(ConfigError, match=r"model_parameters: weight_decay = 0\.1 in param group 0: .*L2 in torch"):
        partita.initialize(model, model_parameters=groups, config={"optimizer": {"type": "Adam"}})
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("stage", [0, 2])
def test_without_bias_correction_moments_are_used_as_they_are(stage: int) -> None:
    """DeepSpeed's parameter, in its BERT configs."""
    params = {"lr": 0.01, "betas": [0.9, 0.99], "eps": 1e-6, "bias_correction": False}
    config = {"optimizer": {"type": "Adam", "params": params}, "zero_optimization": {"stage": stage}}
    model, plain = seeded(Regression), seeded(Regression)
    engine = partita.initialize(model, config=config)[0]
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in plain.named_parameters()}
    for _ in range(3):
        step(engine)
        plain.zero_grad()
        plain(inputs()).backward()
        for name, p in plain.named_parameters():
            assert p.grad is not None
            m, v = moments[name]
            m.lerp_(p.grad, 0.1)
            v.mul_(0.99).addcmul_(p.grad, p.grad, value=0.01)
            p.data.addcdiv_(m, v.sqrt() + 1e-6, value=-0.01)
    for (name, ours), theirs in zip(engine.module.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=name)
    engine.destroy()


@pytest.mark.parametrize("optimizes", [True, False])
def test_parameters_are_forgotten_only_by_an_optimizer(caplog: pytest.LogCaptureFixture, optimizes: bool) -> None:
    model = seeded(Regression)
    optimizer = torch.optim.SGD(list(model.parameters())[1:], lr=0.1) if optimizes else None
    with caplog.at_level(logging.INFO, logger="partita"):
        partita.initialize(model, optimizer, config={"train_micro_batch_size_per_gpu": 1})[0].destroy()
    assert ("are in no optimizer group" in caplog.text) == optimizes
    assert ("nothing is trained" in caplog.text) != optimizes
