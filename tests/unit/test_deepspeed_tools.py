"""Calls of DeepSpeed's that need no engine, by their names: optimizers, schedules, tools, topologies, profiles."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

import partita
import partita.compat.deepspeed as deepspeed
import pytest
import torch
from partita.compat.deepspeed.accelerator import get_accelerator
from partita.compat.deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from partita.compat.deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from partita.compat.deepspeed.profiling.flops_profiler import FlopsProfiler, get_model_profile
from partita.compat.deepspeed.runtime import lr_schedules, utils
from partita.compat.deepspeed.runtime.pipe import (
    PipeDataParallelTopology,
    PipeModelDataParallelTopology,
    ProcessTopology,
    topology,
)
from partita.optim.fused_adam import is_native
from surface import exercises
from torch import nn

# -- optimizers


def trained(make: Any, steps: int = 3) -> torch.Tensor:
    """A weight after some steps of an optimizer."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5, 3))
    optimizer = make([weight])
    for step in range(steps):
        optimizer.zero_grad()
        (weight * (step + 1)).square().sum().backward()
        optimizer.step()
    return weight.detach()


@exercises("ops.adam.", "FusedAdam DeepSpeedCPUAdam")
@pytest.mark.parametrize("mode", [True, False], ids=["AdamW", "Adam"])
def test_both_adams_take_deepspeeds_arguments(mode: bool):
    reference = torch.optim.AdamW if mode else torch.optim.Adam
    expected = trained(lambda p: reference(p, lr=0.1, weight_decay=0.1))
    torch.testing.assert_close(trained(lambda p: FusedAdam(p, 0.1, adam_w_mode=mode, weight_decay=0.1)), expected)
    torch.testing.assert_close(trained(lambda p: DeepSpeedCPUAdam(p, 0.1, adamw_mode=mode, weight_decay=0.1)), expected)


class OwnStep(FusedAdam):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_an_engine_runs_them_natively():
    """A subclass with other arguments is the same update; one with a step of its own is not."""
    for _ in range(2):  # torch wraps the `step` of a class when its first optimizer is made
        parameters = [nn.Parameter(torch.ones(2))]
        assert is_native(DeepSpeedCPUAdam(parameters)) and is_native(FusedAdam(parameters))
        assert is_native(partita.FusedAdam(parameters)) and not is_native(OwnStep(parameters))


@pytest.mark.parametrize("make", [FusedAdam, DeepSpeedCPUAdam], ids=lambda make: make.__name__)
def test_amsgrad_is_refused(make: Any):
    with pytest.raises(ValueError, match=r"torch\.optim\.AdamW\(amsgrad=True\)"):
        make([nn.Parameter(torch.ones(2))], amsgrad=True)


@exercises("ops.adagrad.", "DeepSpeedCPUAdagrad")
def test_adagrad_is_torchs():
    expected = trained(lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1))
    assert torch.equal(trained(lambda p: DeepSpeedCPUAdagrad(p, lr=0.1, weight_decay=0.1)), expected)


# -- schedules

SCHEDULES: dict[str, dict[str, Any]] = {
    "LRRangeTest": {"lr_range_test_min_lr": 0.1, "lr_range_test_step_size": 2},
    "OneCycle": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 2},
    "WarmupLR": {"warmup_num_steps": 4, "warmup_type": "linear"},
    "WarmupDecayLR": {"total_num_steps": 6, "warmup_num_steps": 3},
    "WarmupCosineLR": {"total_num_steps": 6, "warmup_num_steps": 3},
}


@exercises("runtime.lr_schedules.", "VALID_LR_SCHEDULES LRRangeTest OneCycle WarmupLR WarmupDecayLR WarmupCosineLR")
@exercises(
    "runtime.lr_schedules.",
    "LRRangeTest OneCycle WarmupLR WarmupDecayLR WarmupCosineLR",
    "step get_lr get_last_lr state_dict load_state_dict",
)
def test_schedules_run_without_an_engine_and_go_on_from_a_state():
    assert sorted(lr_schedules.VALID_LR_SCHEDULES) == sorted(SCHEDULES)
    for name in ["LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"]:
        runs = [torch.optim.Adam([nn.Parameter(torch.ones(1))], lr=0.3) for _ in range(2)]
        first, second = [getattr(lr_schedules, name)(optimizer, **SCHEDULES[name]) for optimizer in runs]
        for optimizer in runs:
            optimizer.step()
        seen = []
        for _ in range(3):
            first.step()
            seen.append(first.get_last_lr()[0])
        assert len(set(seen)) > 1, name
        second.load_state_dict(first.state_dict())
        second.step()
        first.step()
        assert second.get_last_lr() == first.get_last_lr() == [runs[0].param_groups[0]["lr"]]
        assert len(first.get_lr()) == 1


@exercises("runtime.lr_schedules.", "OneCycle.get_mom WarmupCosineLR.get_lr_ratio")
def test_what_schedules_say_beside_the_learning_rate():
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(1))], lr=0.3)
    cycle = lr_schedules.OneCycle(optimizer, **SCHEDULES["OneCycle"])
    assert cycle.get_mom() == [tuple(optimizer.param_groups[0]["betas"])]
    cosine = lr_schedules.WarmupCosineLR(optimizer, **SCHEDULES["WarmupCosineLR"])
    assert 0 <= cosine.get_lr_ratio() <= 1


# -- tools


@exercises("utils.", "logger log_dist log_dist_once set_log_level_from_string")
@exercises("utils.logging.", "logger log_dist log_dist_once print_dist set_log_level_from_string")
@exercises("", "logger log_dist utils")
def test_messages_of_some_ranks(caplog, capsys):
    tools = deepspeed.utils.logging
    assert deepspeed.logger is deepspeed.utils.logger is tools.logger
    with caplog.at_level(logging.INFO, logger="partita"):  # gives the level back
        tools.set_log_level_from_string("error")
        assert tools.logger.level == logging.ERROR
        tools.set_log_level_from_string("info")
        deepspeed.log_dist("of rank 0", ranks=[0])
        deepspeed.utils.log_dist("of all", ranks=[-1])
        for _ in range(2):
            deepspeed.utils.log_dist_once("once", ranks=[0])
    assert caplog.messages == ["[Rank 0] of rank 0", "[Rank 0] of all", "[Rank 0] once"]
    tools.print_dist("printed", ranks=[0])
    assert capsys.readouterr().out == "[Rank 0] printed\n"
    with pytest.raises(ValueError, match="'loud' is none of"):
        deepspeed.utils.set_log_level_from_string("loud")


@exercises("", "OnDevice")
@exercises("utils.", "OnDevice")
def test_a_model_is_built_elsewhere():
    with deepspeed.OnDevice(dtype=torch.float16, device="meta"):
        model = nn.Linear(2, 2)
    assert model.weight.is_meta and model.weight.dtype == torch.float16
    assert torch.get_default_dtype() == torch.float32 and torch.ones(1).device.type == "cpu"
    with deepspeed.utils.OnDevice(dtype=torch.float16, enabled=False):
        assert nn.Linear(2, 2).weight.dtype == torch.float32


@exercises("utils.", "RepeatingLoader instrument_w_nvtx get_default_deepspeed_config groups")
@exercises("runtime.dataloader.", "RepeatingLoader")
def test_small_tools():
    loader = deepspeed.runtime.dataloader.RepeatingLoader([1, 2])
    assert [next(loader) for _ in range(3)] == [1, 2, 1] and type(loader) is deepspeed.utils.RepeatingLoader
    assert deepspeed.utils.instrument_w_nvtx(lambda x: x + 1)(1) == 2
    assert deepspeed.utils.get_default_deepspeed_config() == partita.default_config()
    assert deepspeed.utils.groups.get_data_parallel_world_size() == 1


@exercises(
    "utils.groups.",
    "get_data_parallel_world_size get_data_parallel_rank get_model_parallel_world_size get_model_parallel_rank "
    "get_tensor_model_parallel_world_size get_tensor_model_parallel_rank get_tensor_model_parallel_src_rank",
)
@exercises(
    "utils.",
    "get_data_parallel_world_size get_data_parallel_rank get_model_parallel_world_size get_model_parallel_rank "
    "get_tensor_model_parallel_world_size get_tensor_model_parallel_rank get_tensor_model_parallel_src_rank",
)
@pytest.mark.parametrize("groups", [deepspeed.utils.groups, deepspeed.utils], ids=["groups", "utils"])
def test_groups_of_a_rank_alone(groups: Any):
    ones = (
        groups.get_data_parallel_world_size,
        groups.get_model_parallel_world_size,
        groups.get_tensor_model_parallel_world_size,
    )
    zeros = (
        groups.get_data_parallel_rank,
        groups.get_model_parallel_rank,
        groups.get_tensor_model_parallel_rank,
        groups.get_tensor_model_parallel_src_rank,
    )
    assert [ask() for ask in ones] == [1, 1, 1] and [ask() for ask in zeros] == [0, 0, 0, 0]


@exercises("runtime.utils.", "move_to_device")
def test_what_is_moved_to_a_device():
    batch = {"x": [torch.ones(1), "word"], "y": (torch.ones(1),), "z": SimpleNamespace(a=1)}
    moved = utils.move_to_device(batch, "meta")
    assert moved["x"][0].is_meta and moved["x"][1] == "word" and moved["y"][0].is_meta and moved["z"] is batch["z"]


@exercises("runtime.utils.", "clip_grad_norm_ get_weight_norm get_global_norm get_global_norm_of_tensors")
def test_norms():
    weights = [nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([4.0]))]
    assert utils.get_weight_norm(weights) == utils.get_global_norm_of_tensors(weights) == 5
    assert utils.get_global_norm([3.0, 4.0]) == 5 and utils.get_global_norm([1.0, math.nan]) == math.inf
    for weight in weights:
        weight.grad = weight.detach().clone()
    assert utils.clip_grad_norm_(weights, 1.0) == 5
    torch.testing.assert_close(weights[0].grad, torch.tensor([0.6]))


@exercises(
    "runtime.utils.",
    "see_memory_usage empty_cache set_random_seed ensure_directory_exists call_to_str noop_decorator",
)
def test_other_helpers(capsys, tmp_path):
    utils.see_memory_usage("not seen")
    utils.see_memory_usage("after forward", force=True)
    out = capsys.readouterr().out
    assert out.startswith("after forward\n") and "GB" in out and "not seen" not in out
    utils.empty_cache()
    utils.set_random_seed(3)
    drawn = torch.rand(1)
    utils.set_random_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    utils.ensure_directory_exists(tmp_path / "a" / "b" / "file")
    assert (tmp_path / "a" / "b").is_dir()
    assert utils.call_to_str("call", 1, name="x") == "call(1, name='x')"
    assert utils.noop_decorator(len) is len


@exercises("runtime.utils.", "partition_uniform partition_balanced")
def test_partitions():
    assert utils.partition_uniform(7, 3) == [0, 2, 4, 7] and utils.partition_uniform(2, 3) == [0, 1, 2, 2]
    assert utils.partition_balanced([1, 1, 1, 3], 2) == [0, 3, 4]


@exercises("checkpoint.utils.", "clone_tensors_for_torch_save")
def test_views_are_cloned_for_saving(tmp_path):
    whole = torch.arange(1000.0)
    state = {"part": whole[:2], "more": [whole[2:3], "word"]}
    lean = deepspeed.checkpoint.utils.clone_tensors_for_torch_save(state)
    assert lean["part"].untyped_storage().nbytes() == 8 and lean["more"][1] == "word"
    assert torch.equal(lean["more"][0], whole[2:3])


@exercises("", "get_accelerator")
@exercises("accelerator.", "get_accelerator")
def test_the_device_is_there():
    assert deepspeed.get_accelerator() is get_accelerator()
    assert torch.ones(1, device=get_accelerator().current_device_name()).device.type == get_accelerator().device_name()


@exercises("moe.utils.", "has_moe_layers is_moe_param is_moe_param_group")
@exercises("moe.utils.", "split_params_into_different_moe_groups_for_optimizer")
@exercises("moe.", "layer.MoE")
def test_a_model_has_no_experts():
    tools, model = deepspeed.moe.utils, nn.Linear(2, 2)
    assert tools.has_moe_layers(model) == (False, 0) and not tools.is_moe_param(model.weight)
    groups = tools.split_params_into_different_moe_groups_for_optimizer({"params": model.parameters()})
    assert groups[0]["params"] == [model.weight, model.bias] and not tools.is_moe_param_group(groups[0])
    with pytest.raises(NotImplementedError, match="no expert parallelism"):
        deepspeed.moe.layer.MoE(4, model)


@exercises("compression.helper.", "recursive_getattr recursive_setattr")
def test_attributes_by_dotted_names():
    helper, model = deepspeed.compression.helper, nn.Sequential(nn.Sequential(nn.ReLU()))
    helper.recursive_setattr(model, "0.0", nn.Tanh())
    assert helper.recursive_getattr(model, "0.0") is model[0][0] and isinstance(model[0][0], nn.Tanh)


# -- topologies


@exercises("runtime.pipe.", "ProcessTopology PipeDataParallelTopology PipeModelDataParallelTopology")
@exercises(
    "runtime.pipe.",
    "ProcessTopology",
    "get_rank get_axis_names get_rank_repr get_dim get_coord get_axis_comm_lists filter_match get_axis_list world_size",
)
@exercises("runtime.pipe.topology.", "ProcessTopology PipeDataParallelTopology PipeModelDataParallelTopology")
def test_a_topology_is_a_grid_of_ranks():
    grid = ProcessTopology(axes=["pipe", "data", "model"], dims=[2, 2, 2])
    assert grid.world_size() == 8 and grid.get_axis_names() == ["pipe", "data", "model"]
    assert grid.get_rank(pipe=1, data=0, model=1) == 5 and grid.get_coord(5).pipe == 1
    assert grid.get_dim("data") == 2 and grid.get_dim("expert") == 0
    assert grid.get_rank_repr(5) == "model_01" and grid.get_rank_repr(5, omit_axes=["data"]) == "pipe_01-model_01"
    assert grid.get_axis_comm_lists("pipe") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert grid.get_axis_comm_lists("expert") == []
    assert grid.filter_match(pipe=0, data=1) == [2, 3] and grid.get_axis_list("model", 0) == [0, 2, 4, 6]
    with pytest.raises(ValueError, match=r"filter_match\(\)"):
        grid.get_rank(pipe=1)
    assert PipeDataParallelTopology(2, 3).get_rank(pipe=1, data=0) == 3
    assert PipeModelDataParallelTopology(2, 2, 3).axes == ["pipe", "data", "model"]
    assert topology.ProcessTopology is ProcessTopology


# -- profiles


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, times: int = 1) -> torch.Tensor:
        return self.second(self.first(x)) * times


@exercises("profiling.flops_profiler.", "get_model_profile profiler.get_model_profile")
def test_a_profile_of_a_model(tmp_path, capsys):
    assert deepspeed.profiling.flops_profiler.profiler.get_model_profile is get_model_profile
    flops, macs, params = get_model_profile(TwoLayers(), (5, 4), as_string=False, print_profile=False)
    assert (flops, macs, params) == (2 * 5 * (32 + 16), 5 * (32 + 16), 32 + 8 + 16 + 2)
    said = get_model_profile(TwoLayers(), kwargs={"x": torch.ones(5, 4), "times": 2}, output_file=str(tmp_path / "t"))
    assert said == ("480 FLOPs", "240 MACs", "58") and "first" in (tmp_path / "t").read_text()
    get_model_profile(TwoLayers(), (5, 4), detailed=False)
    assert "TwoLayers" not in (out := capsys.readouterr().out) and "Linear" in out
    with pytest.raises(ValueError, match="give input_shape"):
        get_model_profile(TwoLayers())


@exercises("profiling.flops_profiler.", "FlopsProfiler profiler.FlopsProfiler")
@exercises(
    "profiling.flops_profiler.",
    "FlopsProfiler",
    "start_profile stop_profile reset_profile end_profile get_total_flops get_total_macs get_total_params "
    "get_total_duration print_model_profile",
)
def test_a_profiler_counts_between_start_and_stop(capsys):
    assert deepspeed.profiling.flops_profiler.profiler.FlopsProfiler is FlopsProfiler
    model, batch = TwoLayers(), torch.ones(5, 4)
    profiler = FlopsProfiler(model)
    model(batch)
    profiler.start_profile()
    model(batch)
    profiler.stop_profile()
    model(batch)
    assert profiler.get_total_flops() == 480 and profiler.get_total_macs(as_string=True) == "240 MACs"
    assert profiler.get_total_params() == 58 and profiler.get_total_duration() > 0
    profiler.print_model_profile(profile_step=3)
    assert "TwoLayers" in capsys.readouterr().out
    profiler.reset_profile()
    assert profiler.get_total_flops() == 0
    profiler.end_profile()
    with pytest.raises(ValueError, match="ignore_list"):
        profiler.start_profile(ignore_list=[nn.Linear])
