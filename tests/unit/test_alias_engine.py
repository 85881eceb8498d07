"""DeepSpeed's engine over Partita's: boundaries said by hand, what calls return, configs as DeepSpeed reads them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import partita
import pytest
import torch
from late_streams import on_late_streams
from partita.checkpoint import CheckpointError
from partita.compat import deepspeed
from partita.compat.deepspeed._config import translated
from torch import Tensor, nn

TINY = 1e-3  # of a gradient: a bfloat16 sum of many such would stand still
MICRO_BATCHES = 48


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def config_of(stage: int, accumulation: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        **changes,
    }


def test_an_engine_without_a_config_is_refused_as_there():
    """A program that was started without --deepspeed_config would train otherwise than its author thinks."""
    with pytest.raises(deepspeed.DeepSpeedConfigError, match=r"there is no config.*--deepspeed_config"):
        deepspeed.initialize(model=model_of())


def batch_of(number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(number)).to(dtype)


def weights_of(engine: Any) -> dict[str, Tensor]:
    weights = {name: value.float() for name, value in engine.module_state_dict().items()}
    engine.destroy()
    return weights


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def accumulated(stage: int, way: str) -> dict[str, Tensor]:
    """Weights after one step of many micro-batches of a bfloat16 model."""
    config = config_of(stage, MICRO_BATCHES, bf16={"enabled": True})
    engine, *_ = deepspeed.initialize(model=model_of(), config=config)
    for number in range(MICRO_BATCHES):
        last = number == MICRO_BATCHES - 1
        if way in ("boundary", "boundary and steps"):
            engine.set_gradient_accumulation_boundary(last)
        loss = engine(batch_of(number, torch.bfloat16)).float().mean() * TINY
        if way == "no_sync" and not last:
            with engine.no_sync():
                engine.backward(loss)
        else:
            engine.backward(loss)
        if last or way in ("boundary and steps", "counted"):
            engine.step()
    assert engine.global_steps == 1
    return weights_of(engine)


@pytest.mark.parametrize("stage", range(4))
def test_a_step_is_called_once_or_after_each_backward(stage):
    """Hugging Face calls it at boundaries only. Micro-batches add in fp32 in all ways, to the same bits."""
    counted = accumulated(stage, "counted")
    assert not torch.equal(counted["2.bias"], model_of().state_dict()["2.bias"])
    ways = ("boundary", "boundary and steps", *(("no_sync",) if stage < 2 else ()))
    for way in ways:
        assert_same(accumulated(stage, way), counted)


@pytest.mark.parametrize("way", ["boundary", "no_sync"])
def test_gradients_of_steps_by_hand_are_those_of_plain_torch(way):
    """`scale_wrt_gas=False`: the program has divided, and gradients are sums. Without a boundary said by hand, each
    micro-batch would be a step here."""
    model, reference = model_of(), model_of()
    engine, *_ = deepspeed.initialize(model=model, config=config_of(1, 2 if way == "boundary" else 1))
    for number in range(6):
        last = number % 3 == 2
        if way == "boundary":
            engine.set_gradient_accumulation_boundary(last)
        with nullcontext() if last or way == "boundary" else engine.no_sync():
            loss = engine(batch_of(number)).mean() / 3
            returned = engine.backward(loss, scale_wrt_gas=False)
        assert torch.equal(returned, loss.detach()) and not returned.requires_grad
        (reference(batch_of(number)).mean() / 3).backward()
        if last:
            engine.step()
            with torch.no_grad():
                for p in reference.parameters():
                    p -= p.grad
                    p.grad = None
    assert engine.global_steps == 2
    for name, value in weights_of(engine).items():
        torch.testing.assert_close(value, reference.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_backward_returns_the_share_of_a_micro_batch():
    engine, *_ = deepspeed.initialize(model=model_of(), config=config_of(0, 4))
    loss = engine(batch_of(0)).mean()
    assert torch.equal(engine.backward(loss), loss.detach() / 4)
    engine.destroy()


def test_no_sync_is_refused_where_gradients_are_divided_and_step_is_inside_it():
    for stage, call in ((2, None), (0, "step")):
        engine, *_ = deepspeed.initialize(model=model_of(), config=config_of(stage))
        with pytest.raises(RuntimeError, match=r"no_sync\(\)"), engine.no_sync():
            engine.backward(engine(batch_of(0)).mean())
            if call:
                engine.step()
        engine.destroy()


def test_a_skipped_step_is_an_overflow_of_the_optimizer():
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model_of(), config=config_of(2, fp16={"enabled": True, "initial_scale_power": 4, "hysteresis": 1})
    )
    seen = []
    for factor in (1.0, float("inf"), 1.0):
        engine.backward(engine(batch_of(0, torch.float16)).float().mean() * factor)
        engine.step()
        seen.append((optimizer.overflow, engine.skipped_steps, optimizer.cur_scale))
    assert seen == [(False, 0, 16.0), (True, 1, 8.0), (False, 1, 8.0)]
    assert isinstance(optimizer, torch.optim.Optimizer) and optimizer.optimizer.param_groups is optimizer.param_groups
    engine.destroy()


def test_whether_a_step_overflowed_is_told_without_a_wait():
    """On a GPU the optimizer tells of the step before."""
    fp16 = {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}
    adam = {"type": "Adam", "params": {"lr": 0.01}}
    with on_late_streams() as streams:
        engine, optimizer, _, _ = deepspeed.initialize(model=model_of(), config=config_of(2, fp16=fp16, optimizer=adam))
        seen = []
        for factor in (1.0, float("inf"), 1.0):
            engine.backward(engine(batch_of(0, torch.float16)).float().mean() * factor)
            engine.step()
            assert streams.copies not in streams.waits()  # the last copy is that of this step's outcome
            seen.append(optimizer.overflow)
    assert seen == [False, False, True]
    engine.destroy()


def test_zero_grad_keeps_finished_micro_batches():
    """A program calls it where it has always called it."""
    ways = []
    for call in (False, True):
        engine, optimizer, _, _ = deepspeed.initialize(model=model_of(), config=config_of(2, 2))
        for number in range(4):
            if call:
                (engine if number % 2 else optimizer).zero_grad()
            engine.backward(engine(batch_of(number)).mean())
            engine.step()
        assert engine.global_steps == 2
        ways.append(weights_of(engine))
    assert_same(*ways)


def test_checkpoints_come_back_with_what_the_program_gave(tmp_path):
    engine, *_ = deepspeed.initialize(model=model_of(), config=config_of(2))
    assert engine.load_checkpoint(tmp_path) == (None, None)
    engine.backward(engine(batch_of(0)).mean())
    engine.step()
    assert engine.save_checkpoint(str(tmp_path), tag=7, client_state={"epoch": 3}, exclude_frozen_parameters=True)
    before = {name: value.clone() for name, value in engine.module_state_dict().items()}
    engine.backward(engine(batch_of(1)).mean())
    engine.step()
    assert engine.load_checkpoint(str(tmp_path)) == (str(tmp_path / "7"), {"epoch": 3})
    assert_same(engine.module_state_dict(), before)
    with pytest.raises(ValueError, match="custom_load_fn"):
        engine.load_checkpoint(tmp_path, custom_load_fn=print)
    assert engine.save_16bit_model(str(tmp_path)) is True
    assert_same(torch.load(tmp_path / "pytorch_model.bin", weights_only=True), before)
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 2])
def test_compile_is_of_the_model_in_place(stage):
    """With the numbers of eager execution; in stage 3 it is refused."""
    weights = []
    for compiles in (False, True):
        engine, *_ = deepspeed.initialize(model=model_of(), config=config_of(stage))
        if compiles:
            engine.compile(backend="eager", compile_kwargs={"dynamic": False})
        for number in range(3):
            engine.backward(engine(batch_of(number)).mean())
            engine.step()
        assert engine.is_compiled is compiles
        weights.append(weights_of(engine))
    assert_same(*weights)
    engine, *_ = deepspeed.initialize(model=model_of(), config=config_of(3))
    with pytest.raises(RuntimeError, match="stages 0 to 2"):
        engine.compile()
    engine.destroy()


def test_attributes_are_the_engines_and_then_the_models():
    model = model_of()
    model.own = "the model's"
    engine, *_ = deepspeed.initialize(model=model, config=(config := config_of(0)))
    assert engine.module is model and engine.own == "the model's" and engine.config is config
    assert [name for name, _ in engine.named_parameters()] == [f"module.{n}" for n, _ in model.named_parameters()]
    engine.client_state = {"epoch": 1}
    assert vars(engine)["_engine"].client_state == {"epoch": 1}
    for name in ("optimizer", "lr_scheduler"):
        with pytest.raises(AttributeError, match=rf"engine\.{name} is what trains the model"):
            setattr(engine, name, None)
    with pytest.raises(AttributeError, match="no_such"):
        _ = engine.no_such
    with pytest.raises(TypeError, match=r"engine\.module"):
        partita.initialize(model=engine, config=config_of(0))
    engine.destroy()


def test_a_config_means_what_it_means_in_deepspeed():
    """Clipping at 1, no progress lines, Adam that is AdamW; and keys with dots, which TRL writes, are not read."""
    given = {
        "optimizer": {"type": "Adam", "params": {"weight_decay": 0.1}},
        "zero_optimization.reduce_bucket_size": 9.5,
    }
    own = translated(given)
    assert (own["gradient_clipping"], own["steps_per_print"]) == (1.0, None)
    assert own["optimizer"]["params"] == {"weight_decay": 0.1, "adam_w_mode": True}
    assert not [key for key in own if "." in key]
    assert given["optimizer"]["params"] == {"weight_decay": 0.1}
    assert translated({"gradient_clipping": 0.5})["gradient_clipping"] == 0.5
    for kind, params, decay in (
        ("Adam", {"torch_adam": True}, 0.01),
        ("AdamW", {"torch_adam": True}, 0.01),
        ("AdamW", {"torch_adam": True, "weight_decay": 0.0}, 0.0),
        ("Adam", {"torch_adam": True, "adam_w_mode": False}, None),
        ("AdamW", {}, None),
    ):  # torch's AdamW has a weight decay of its own
        section = translated({"optimizer": {"type": kind, "params": params}})["optimizer"]
        assert section["params"].get("weight_decay") == decay
    with pytest.raises(partita.ConfigError, match="config and config_params are two configs that differ"):
        deepspeed.initialize(model=model_of(), config={"train_batch_size": 1}, config_params={"train_batch_size": 2})


def test_init_takes_a_config_of_deepspeeds():
    config = config_of(3, optimizer={"type": "Adam", "params": {"weight_decay": 0.1}}, bf16={"enabled": True})
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = model_of()
    assert next(model.parameters()).dtype is torch.bfloat16
    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        assert torch.equal(model[0].weight, model_of()[0].weight.bfloat16())
    engine, optimizer, _, _ = deepspeed.initialize(model=model, config=config)
    statuses = deepspeed.runtime.zero.partition_parameters.ZeroParamStatus
    assert {p.ds_status for p in model.parameters()} == {statuses.NOT_AVAILABLE}
    assert [p.ds_numel for p in model.parameters()] == [64, 8, 8, 1] and optimizer.parameter_offload.forward_hooks == []
    engine.destroy()


@pytest.mark.parametrize("tag", [None, "global_step3"])
def test_a_checkpoint_of_deepspeeds_own_is_refused_with_the_way_to_its_weights(tmp_path, tag):
    (tmp_path / "global_step3").mkdir()
    (tmp_path / "latest").write_text("global_step3")
    torch.save({}, tmp_path / "global_step3" / "mp_rank_00_model_states.pt")
    engine, *_ = deepspeed.initialize(model=model_of(), config=config_of(1))
    with pytest.raises(CheckpointError, match=r"saved by DeepSpeed.*zero_to_fp32\.py .*load_weights"):
        engine.load_checkpoint(tmp_path, tag)
    engine.destroy()
