"""Calls of DeepSpeed's engines in one process, by their names, on real engines of Partita."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import partita.compat.deepspeed as deepspeed
import pytest
import torch
from partita.compat.deepspeed._surface import QUESTIONS
from partita.compat.deepspeed.monitor.monitor import MonitorMaster
from partita.compat.deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from safetensors.torch import load_file
from surface import exercises
from torch import Tensor, nn

ADAM = {"optimizer": {"type": "Adam", "params": {"lr": 0.1, "betas": [0.8, 0.9]}}}
CONFIG: dict[str, Any] = {"train_batch_size": 4, "gradient_accumulation_steps": 2, **ADAM}


def made(**changes: Any) -> deepspeed.DeepSpeedEngine:
    torch.manual_seed(0)
    return deepspeed.initialize(model=nn.Linear(3, 2), config=CONFIG | changes)[0]


@pytest.fixture
def engine() -> Iterator[deepspeed.DeepSpeedEngine]:
    engine = made()
    yield engine
    engine.destroy()


def micro_batch(engine: deepspeed.DeepSpeedEngine, value: float = 1.0) -> Tensor:
    loss: Tensor = engine(torch.full((2, 3), value)).square().mean()
    engine.backward(loss)
    return loss


# -- training


@exercises("", "initialize DeepSpeedEngine DeepSpeed")
@exercises("DeepSpeedEngine.", "forward backward step was_step_applied is_gradient_accumulation_boundary zero_grad")
@exercises("DeepSpeedEngine.", "global_steps global_samples micro_steps skipped_steps get_global_grad_norm")
def test_a_training_loop():
    model = nn.Linear(3, 2)
    engine, optimizer, loader, scheduler = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config_params=CONFIG
    )
    assert isinstance(engine, deepspeed.DeepSpeed) and isinstance(engine, deepspeed.DeepSpeedEngine)
    assert optimizer is engine.optimizer and loader is None and scheduler is None
    seen = []
    for step in range(4):
        seen.append(engine.is_gradient_accumulation_boundary())
        loss = engine.forward(torch.full((2, 3), float(step))).square().mean()
        engine.backward(loss)
        engine.step()
        assert engine.was_step_applied() is seen[-1]
        engine.zero_grad()
    assert seen == [False, True, False, True]
    assert (engine.global_steps, engine.global_samples, engine.micro_steps, engine.skipped_steps) == (2, 8, 4, 0)
    assert engine.get_global_grad_norm() > 0
    engine.destroy()


@exercises("DeepSpeedEngine.", "train eval module device optimizer lr_scheduler training_dataloader")
@exercises("DeepSpeedEngine.", "global_rank local_rank world_size dp_world_size mp_world_size get_data_parallel_rank")
@exercises("DeepSpeedEngine.", "get_model_parallel_rank get_tensor_parallel_rank destroy")
def test_what_an_engine_has():
    model = nn.Linear(3, 2)
    schedule = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}}}
    engine = deepspeed.initialize(model=model, config=CONFIG | schedule, training_data=[torch.ones(3)] * 8)[0]
    assert engine.module is model and engine.device.type == "cpu"
    assert not engine.eval().training and engine.train().training and model.training
    assert len(engine.optimizer.param_groups) == 1 and engine.lr_scheduler.get_last_lr() == engine.get_lr()
    assert next(iter(engine.training_dataloader)).shape == (2, 3)
    assert (engine.global_rank, engine.local_rank, engine.world_size) == (0, 0, 1)
    assert (engine.dp_world_size, engine.mp_world_size, engine.get_data_parallel_rank()) == (1, 1, 0)
    assert engine.get_model_parallel_rank() == engine.get_tensor_parallel_rank() == 0
    engine.destroy()
    with pytest.raises(RuntimeError, match="destroy"):
        engine(torch.ones(2, 3))


@exercises("DeepSpeedEngine.", "get_lr get_mom get_type get_batch_info empty_partition_cache")
@exercises("DeepSpeedEngine.", "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps")
def test_numbers_of_the_optimizer_and_of_batches(engine: deepspeed.DeepSpeedEngine):
    assert engine.get_lr() == [0.1] and [tuple(betas) for betas in engine.get_mom()] == [(0.8, 0.9)]
    assert engine.get_type() == [None]
    sizes = (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps())
    assert engine.get_batch_info() == sizes == (4, 2, 2)
    engine.empty_partition_cache()


def test_momentum_without_betas_and_without_an_optimizer():
    parameters = nn.Linear(3, 2)
    engine = deepspeed.initialize(
        model=parameters, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.7), config={"train_batch_size": 2}
    )[0]
    assert engine.get_mom() == [0.7]
    engine.destroy()
    bare = deepspeed.initialize(model=nn.Linear(3, 2), config={"train_batch_size": 2})[0]
    assert bare.get_mom() == [] and bare.optimizer is None
    bare.destroy()


def weights_after(engine: deepspeed.DeepSpeedEngine, run: Any) -> Tensor:
    """The weights after what `run` does with an engine."""
    run(engine)
    weights: Tensor = engine.module_state_dict()["weight"]
    engine.destroy()
    return weights


@exercises("DeepSpeedEngine.", "no_sync coalesce_grad_reduction scale set_gradient_accumulation_boundary")
def test_ways_to_take_one_step_of_two_micro_batches():
    def plain(engine: Any) -> None:
        for value in (1.0, 2.0):
            micro_batch(engine, value)
            engine.step()

    def without_sync(engine: Any) -> None:
        with engine.no_sync():
            micro_batch(engine, 1.0)
        engine.step()
        micro_batch(engine, 2.0)
        engine.step()

    def coalesced(engine: Any) -> None:
        engine.set_gradient_accumulation_boundary(True)
        with engine.coalesce_grad_reduction():
            for value in (1.0, 2.0):
                micro_batch(engine, value)
        engine.step()

    def own_backward(engine: Any) -> None:
        for value in (1.0, 2.0):
            engine.scale(engine(torch.full((2, 3), value)).square().mean()).backward()
            engine.step()

    def by_hand(engine: Any) -> None:
        engine.set_gradient_accumulation_boundary(False)
        micro_batch(engine, 1.0)
        engine.step()
        engine.set_gradient_accumulation_boundary(True)
        micro_batch(engine, 2.0)
        engine.step()

    expected = weights_after(made(), plain)
    assert not torch.equal(expected, made().module.weight)
    for run in (without_sync, coalesced, own_backward, by_hand):
        torch.testing.assert_close(weights_after(made(), run), expected, msg=run.__name__)


@exercises("DeepSpeedEngine.", "train_batch")
def test_a_whole_step_in_one_call():
    """The articles' `train_batch()`, of an engine that is no pipeline."""
    model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).square().mean()

    engine = deepspeed.DeepSpeedEngine(model=WithLoss(), config_dict=CONFIG)
    losses = [engine.train_batch(torch.ones(4, 3)).item() for _ in range(3)]
    assert losses[2] < losses[0] and engine.global_steps == 3
    engine.destroy()


@exercises("DeepSpeedEngine.", "compile is_compiled")
def test_a_model_is_compiled(engine: deepspeed.DeepSpeedEngine):
    assert not engine.is_compiled
    engine.compile(backend="eager")
    assert engine.is_compiled
    micro_batch(engine)


# -- saving


@exercises("DeepSpeedEngine.", "save_checkpoint load_checkpoint module_state_dict load_module_state_dict")
@exercises("DeepSpeedEngine.", "save_16bit_model save_fp16_model")
@exercises("utils.zero_to_fp32.", "get_fp32_state_dict_from_zero_checkpoint load_state_dict_from_zero_checkpoint")
@exercises("utils.zero_to_fp32.", "convert_zero_checkpoint_to_fp32_state_dict convert_zero_checkpoint_to_state_dict")
def test_a_run_is_saved_and_goes_on(engine: deepspeed.DeepSpeedEngine, tmp_path):
    tools = deepspeed.utils.zero_to_fp32
    for _ in range(2):
        micro_batch(engine)
        engine.step()
    assert engine.save_checkpoint(str(tmp_path / "runs"), tag="first", client_state={"epoch": 3})
    weights = engine.module_state_dict()
    other = made()
    other.load_module_state_dict({name: torch.zeros_like(value) for name, value in weights.items()})
    path, client_state = other.load_checkpoint(str(tmp_path / "runs"))
    assert path.endswith("first") and client_state == {"epoch": 3} and other.global_steps == 1
    torch.testing.assert_close(other.module_state_dict(), weights)
    other.destroy()

    state = tools.get_fp32_state_dict_from_zero_checkpoint(tmp_path / "runs")
    torch.testing.assert_close(state, weights)
    fresh = tools.load_state_dict_from_zero_checkpoint(nn.Linear(3, 2), tmp_path / "runs", tag="first")
    torch.testing.assert_close(dict(fresh.state_dict()), weights)
    tools.convert_zero_checkpoint_to_fp32_state_dict(tmp_path / "runs", tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["weight"].dtype == torch.float32
    tools.convert_zero_checkpoint_to_state_dict(tmp_path / "runs", tmp_path / "half", torch.float16)
    assert load_file(tmp_path / "half" / "model.safetensors")["weight"].dtype == torch.float16
    with pytest.raises(ValueError, match="safe_serialization=True"):
        tools.convert_zero_checkpoint_to_fp32_state_dict(tmp_path / "runs", tmp_path / "x", safe_serialization=False)

    for save in (engine.save_16bit_model, engine.save_fp16_model):
        assert save(str(tmp_path / "saved"), "m.bin")
        torch.testing.assert_close(torch.load(tmp_path / "saved" / "m.bin"), weights)


# -- what an engine says of its config


def test_questions_about_the_config(engine: deepspeed.DeepSpeedEngine):
    """All that the table has; some values are compared below."""
    for name in QUESTIONS:
        getattr(engine, name)()


@exercises("DeepSpeedEngine.", "zero_optimization_stage zero_optimization zero_optimization_partition_gradients")
@exercises("DeepSpeedEngine.", "zero_optimization_partition_weights zero_overlap_comm zero_reduce_scatter")
@exercises("DeepSpeedEngine.", "zero_reduce_bucket_size zero_allgather_bucket_size zero_contiguous_gradients")
@exercises("DeepSpeedEngine.", "zero_max_live_parameters zero_param_persistence_threshold zero_prefetch_bucket_size")
@exercises("DeepSpeedEngine.", "zero_offload_optimizer zero_offload_param zero_cpu_offload zero_use_cpu_optimizer")
@exercises("DeepSpeedEngine.", "zero_partial_offload zero_gather_16bit_weights_on_model_save")
@exercises("DeepSpeedEngine.", "fp16_enabled bfloat16_enabled torch_autocast_enabled gradient_clipping steps_per_print")
@exercises("DeepSpeedEngine.", "optimizer_name optimizer_params scheduler_name scheduler_params")
@exercises("DeepSpeedEngine.", "wall_clock_breakdown memory_breakdown dump_state gradient_predivide_factor")
@exercises("DeepSpeedEngine.", "postscale_gradients compile_zero_optimization_stage")
def test_answers_are_those_of_the_config():
    zero = {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 1000, "offload_optimizer": {"device": "cpu"}}
    engine = made(zero_optimization=zero, gradient_clipping=0.5, bf16={"enabled": True}, steps_per_print=7)
    answers = {
        "zero_optimization_stage": 2,
        "compile_zero_optimization_stage": 2,
        "zero_optimization": True,
        "zero_optimization_partition_gradients": True,
        "zero_optimization_partition_weights": False,
        "zero_overlap_comm": False,
        "zero_reduce_scatter": True,
        "zero_reduce_bucket_size": 1000,
        "zero_allgather_bucket_size": 8_388_608,
        "zero_contiguous_gradients": True,
        "zero_max_live_parameters": 1_000_000_000,
        "zero_param_persistence_threshold": 10_000,
        "zero_prefetch_bucket_size": 8_388_608,
        "zero_offload_param": None,
        "zero_cpu_offload": True,
        "zero_use_cpu_optimizer": True,
        "zero_partial_offload": 1.0,
        "zero_gather_16bit_weights_on_model_save": False,
        "fp16_enabled": False,
        "bfloat16_enabled": True,
        "torch_autocast_enabled": False,
        "gradient_clipping": 0.5,
        "gradient_predivide_factor": 1.0,
        "postscale_gradients": True,
        "steps_per_print": 7,
        "optimizer_name": "Adam",
        "scheduler_name": None,
        "scheduler_params": None,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
    }
    assert {name: getattr(engine, name)() for name in answers} == answers
    assert engine.optimizer_params()["lr"] == 0.1 and engine.zero_offload_optimizer().device == "cpu"
    engine.destroy()


@exercises("DeepSpeedEngine.", "loss_scale dynamic_loss_scale initial_dynamic_scale dynamic_loss_scale_args")
@exercises("DeepSpeedEngine.", "flops_profiler_enabled flops_profiler_profile_step flops_profiler_module_depth")
@exercises("DeepSpeedEngine.", "flops_profiler_top_modules flops_profiler_detailed flops_profiler_output_file")
@exercises("DeepSpeedEngine.", "flops_profiler_recompute_fwd_factor managed_gradient_accumulation autotp_size")
def test_answers_about_scales_and_profiles():
    profiler = {"enabled": True, "profile_step": 5, "module_depth": 2, "top_modules": 3, "detailed": False}
    engine = made(fp16={"enabled": True, "initial_scale_power": 4, "hysteresis": 3}, flops_profiler=profiler)
    answers = {
        "loss_scale": 0,
        "dynamic_loss_scale": True,
        "initial_dynamic_scale": 16,
        "flops_profiler_enabled": True,
        "flops_profiler_profile_step": 5,
        "flops_profiler_module_depth": 2,
        "flops_profiler_top_modules": 3,
        "flops_profiler_detailed": False,
        "flops_profiler_output_file": None,
        "flops_profiler_recompute_fwd_factor": 0,
        "managed_gradient_accumulation": True,
        "autotp_size": 0,
    }
    assert {name: getattr(engine, name)() for name in answers} == answers
    assert engine.dynamic_loss_scale_args()["delayed_shift"] == 3 and engine.optimizer.loss_scale == 16
    engine.destroy()


@exercises("DeepSpeedEngine.", "checkpoint_tag_validation_enabled checkpoint_tag_validation_fail")
@exercises("DeepSpeedEngine.", "zero_allow_untested_optimizer zero_ignore_unused_parameters zero_elastic_checkpoint")
@exercises("DeepSpeedEngine.", "zero_allgather_partitions zero_load_from_fp32_weights checkpoint_serialization_enabled")
def test_what_is_always_so(engine: deepspeed.DeepSpeedEngine):
    always = [
        engine.checkpoint_tag_validation_enabled,
        engine.checkpoint_tag_validation_fail,
        engine.zero_allow_untested_optimizer,
        engine.zero_ignore_unused_parameters,
        engine.zero_elastic_checkpoint,
        engine.zero_allgather_partitions,
        engine.zero_load_from_fp32_weights,
        engine.checkpoint_serialization_enabled,
    ]
    assert all(ask() is True for ask in always)


NOT_HERE = """
zero_hpz_partition_size zero_nvme_offload_optimizer zero_quantized_gradients zero_quantized_weights
zero_quantized_nontrainable_weights zero_multi_rank_bucket_allreduce zero_round_robin_gradients zero_legacy_stage1
zero_force_ds_cpu_optimizer zero_log_trace_cache_warnings zero_allgather_sequential
zero_save_muon_momentum_buffer_in_memory super_offload curriculum_learning_enabled data_efficiency_enabled
data_sampling_enabled random_ltd_enabled autotuning_enabled autotuning_profile_model_info fp16_auto_cast
fp16_master_weights_and_gradients bf16_master_weights_and_gradients bf16_optimizer_states is_sanity_checks_enabled
load_universal_checkpoint use_node_local_storage optimizer_legacy_fusion compile_autosp compile_autotp
checkpoint_writer_enabled uses_parallelization_pass_only curriculum_learning_config data_efficiency_config
data_sampling_config random_ltd_config autotuning_start_profile_step autotuning_end_profile_step
autotuning_metric_path autotuning_model_info_path autotuning_metric aio_config swap_tensor_config zenflow_config
tensor_parallel_config
"""


@exercises("DeepSpeedEngine.", NOT_HERE)
def test_features_that_are_not_here_are_off(engine: deepspeed.DeepSpeedEngine):
    assert [name for name in NOT_HERE.split() if getattr(engine, name)()] == []


# -- configs, arguments and monitors


@exercises("", "DeepSpeedConfig DeepSpeedConfigError add_config_arguments")
@exercises("runtime.config.", "DeepSpeedConfig DeepSpeedConfigError")
def test_configs_and_arguments():
    config = deepspeed.DeepSpeedConfig(CONFIG)
    assert config.train_micro_batch_size_per_gpu == 2 and isinstance(config, DeepSpeedConfig)
    with pytest.raises(deepspeed.DeepSpeedConfigError, match="train_batch_siz"):
        deepspeed.DeepSpeedConfig({"train_batch_siz": 4})
    assert deepspeed.DeepSpeedConfigError is DeepSpeedConfigError
    parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
    assert parser.parse_args(["--deepspeed", "--deepspeed_config", "x.json"]).deepspeed_config == "x.json"


@exercises("monitor.monitor.", "MonitorMaster MonitorMaster.write_events")
@exercises("DeepSpeedEngine.", "monitor")
def test_a_program_writes_its_own_numbers(tmp_path):
    """The tutorial's calls."""
    config = CONFIG | {"csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}}
    monitor = MonitorMaster(DeepSpeedConfig(config).monitor_config)
    assert monitor.enabled and not MonitorMaster(CONFIG).enabled
    monitor.write_events([("Time per step", 0.5, 4), ("Time per step", 0.25, 8)])
    assert (tmp_path / "job" / "Time_per_step.csv").read_text().splitlines()[1:] == ["4,0.5", "8,0.25"]
    engine = made(csv_monitor=config["csv_monitor"] | {"job_name": "engine"})
    engine.monitor.write_events([("Own", torch.tensor(1.5), engine.global_samples)])
    assert "0,1.5" in (tmp_path / "engine" / "Own.csv").read_text()
    engine.destroy()
