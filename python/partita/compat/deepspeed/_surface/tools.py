"""Rows: recomputation, files, communication, tools, and what watches a run."""

from partita.compat.deepspeed._surface.row import Row, absent, differs, works

_HERE = "as there"

RECOMPUTATION: list[Row] = [
    *works(
        "checkpointing.",
        {
            "checkpoint": "torch's, without reentrance; keyword arguments too",
            "configure": "`checkpoint_in_cpu` counts; the other wishes are accepted, as activations are whole",
            "is_configured": _HERE,
            "reset": "nothing is kept between two steps",
            "get_cuda_rng_tracker": "random generators by name, on CPUs too",
            "model_parallel_cuda_manual_seed": "all ranks get one seed, as there is no tensor parallelism",
            "CudaRNGStatesTracker": "as there, on CPUs too",
            **{f"CudaRNGStatesTracker.{call}": _HERE for call in ("reset", "get_states", "set_states", "add", "fork")},
            "non_reentrant_checkpoint": "`checkpoint`",
            "set_num_layers partition_activations_in_checkpoint": "accepted, without effect",
            "model_parallel_reconfigure_tp_seed": "`model_parallel_cuda_manual_seed`",
        },
    ),
    *absent(
        "checkpointing.",
        {
            "CheckpointFunction": "call `checkpoint()`",
            "partition_activations gather_partitioned_activations get_partition_size get_partition_start "
            "get_partitioned_activations_for_backward get_cpu_activations_for_backward": "activations are whole",
            "extract_tensors merge_tensors detach_variable is_activation_to_checkpoint": "call `checkpoint()`",
            "get_offloaded_activations_for_backward restore_offloaded_activations": "set `checkpoint_in_cpu`",
        },
    ),
    *absent(
        "runtime.activation_checkpointing.",
        {"offload_activations": "`torch.autograd.graph.save_on_cpu`, or `activation_checkpointing.cpu_checkpointing`"},
    ),
]

_FP32 = "reads Partita's checkpoints and those that DeepSpeed saved"

CHECKPOINTS: list[Row] = [
    *differs(
        "utils.zero_to_fp32.",
        {
            "get_fp32_state_dict_from_zero_checkpoint": f"{_FP32}; `lazy_mode` and `exclude_frozen_parameters` are "
            "refused",
            "load_state_dict_from_zero_checkpoint": _FP32,
            "convert_zero_checkpoint_to_fp32_state_dict convert_zero_checkpoint_to_state_dict": f"{_FP32}; writes "
            "safetensors only, in files of at most 5 GB",
        },
    ),
    *absent(
        "utils.zero_to_fp32.",
        {
            "parse_model_states parse_optim_states get_model_state_file get_model_state_files get_optim_files "
            "get_checkpoint_files zero3_partitioned_param_info to_torch_tensor natural_keys zero_model_state "
            "GatheredTensor": ("`partita checkpoint import` reads DeepSpeed's files")
        },
    ),
    *works("checkpoint.utils.", {"clone_tensors_for_torch_save": _HERE}),
    *absent(
        "checkpoint.",
        {
            "utils.get_layer_ckpt_name_for_rank utils.get_model_ckpt_name_for_rank utils.get_zero_ckpt_name_for_rank": (
                "a checkpoint has one set of files for all ranks"
            ),
            "ds_to_universal universal_checkpoint DeepSpeedCheckpoint reshape_utils": "every checkpoint is universal: "
            "any number of ranks and any stage loads it",
        },
    ),
]

COMMUNICATION: list[Row] = [
    *works(
        "comm.",
        {
            "init_distributed is_initialized get_rank get_world_size get_local_rank barrier": "over torch.distributed",
            "all_reduce all_gather broadcast reduce_scatter send recv new_group get_world_group ReduceOp": "those of "
            "torch.distributed",
        },
    ),
    *absent("comm.", {"log_summary": "set `comms_logger` and call `engine.log_comms()`"}),
    *works("accelerator.", {"get_accelerator": "the GPU if torch has one, else the CPU"}),
    *absent("accelerator.", {"set_accelerator": "the device is that of the model"}),
    *works(
        "utils.groups.",
        {
            "get_data_parallel_group get_data_parallel_world_size get_data_parallel_rank": "all ranks of the job",
            "get_model_parallel_world_size get_model_parallel_rank get_tensor_model_parallel_world_size "
            "get_tensor_model_parallel_rank get_tensor_model_parallel_src_rank": "of a rank alone: 1, 0 and itself",
        },
    ),
    *absent(
        "utils.groups.",
        {
            "initialize": "there is no expert parallelism",
            "get_model_parallel_group get_tensor_model_parallel_group set_tensor_model_parallel_rank "
            "set_tensor_model_parallel_world_size": "there is no tensor parallelism",
        },
    ),
]

UTILITIES: list[Row] = [
    *works(
        "utils.",
        {
            "RepeatingLoader": "`partita.RepeatingLoader`",
            "logger": 'the logger "partita"',
            "log_dist log_dist_once set_log_level_from_string": _HERE,
            "OnDevice": "by torch's default device and dtype",
            "groups": "see [Communication and devices](#communication-and-devices)",
            "instrument_w_nvtx": _HERE,
            "get_data_parallel_group get_data_parallel_world_size get_data_parallel_rank get_model_parallel_world_size "
            "get_model_parallel_rank get_tensor_model_parallel_world_size get_tensor_model_parallel_rank "
            "get_tensor_model_parallel_src_rank": "of `deepspeed.utils.groups`",
            "get_default_deepspeed_config": "`partita.default_config`",
        },
    ),
    *works("utils.logging.", {"logger log_dist log_dist_once print_dist set_log_level_from_string": _HERE}),
    *absent(
        "utils.",
        {
            "initialize": "there is no expert parallelism",
            "get_model_parallel_group get_tensor_model_parallel_group set_tensor_model_parallel_rank "
            "set_tensor_model_parallel_world_size bwc_pipeline_parallel_world_size "
            "bwc_tensor_model_parallel_world_size": "there is no tensor parallelism",
            "get_caller_func recursive_getattr recursive_setattr get_numactl_cmd": "a few lines of Python do it",
            "timer": "set `wall_clock_breakdown` in the config",
            "nvtx.instrument_w_nvtx": "`deepspeed.utils.instrument_w_nvtx`",
        },
    ),
    *works("runtime.dataloader.", {"RepeatingLoader": "of `deepspeed.utils`"}),
    *absent("runtime.dataloader.", {"DeepSpeedDataLoader": "give `initialize(training_data=...)` the data"}),
    *works(
        "runtime.utils.",
        {
            "move_to_device": _HERE,
            "clip_grad_norm_": "torch's; for parameters without an engine",
            "get_weight_norm get_global_norm get_global_norm_of_tensors": _HERE,
            "see_memory_usage": "prints if `force`; of the host, the most that the process had",
            "empty_cache set_random_seed ensure_directory_exists call_to_str noop_decorator": _HERE,
            "partition_uniform partition_balanced": _HERE,
        },
    ),
    *absent(
        "runtime.utils.",
        {
            "memory_status get_ma_status": "call `see_memory_usage(message, force=True)`",
            "CheckOverflow has_inf_or_nan get_grad_zeros get_flattened_grad_norm clip_tensors_by_global_norm": "the "
            "engine checks, clips and tells: `get_global_grad_norm()`, `was_step_applied()`",
            "PartitionedTensor all_gather_dp_groups align_dense_tensors": "the engine partitions",
            "DummyOptim": "leave the optimizer out",
        },
    ),
    *absent("", {"env_report": "`pip show partita`; `partita --help` lists the commands"}),
]

_SECTION = "write the section into the config; docs/config.md has its keys"
_PROFILE = "`print_model_profile()` has a table of all modules"

WATCHING: list[Row] = [
    *works(
        "monitor.monitor.",
        {
            "MonitorMaster": "over `DeepSpeedConfig(...).monitor_config` or a config",
            "MonitorMaster.write_events": _HERE,
        },
    ),
    *absent(
        "monitor.",
        {
            "monitor.TensorBoardMonitor monitor.WandbMonitor monitor.CometMonitor monitor.csvMonitor monitor.Monitor": (
                "use `MonitorMaster`, or `engine.log()`"
            ),
            "config.TensorBoardConfig config.WandbConfig config.CometConfig config.CSVConfig "
            "config.DeepSpeedMonitorConfig config.get_monitor_config": _SECTION,
        },
    ),
    *differs(
        "profiling.flops_profiler.",
        {
            "get_model_profile": "strings have SI letters; `ignore_modules` is refused",
            "FlopsProfiler": "counts where torch dispatches; tables in Partita's form",
            "FlopsProfiler.start_profile": "`ignore_list` is refused",
        },
    ),
    *works(
        "profiling.flops_profiler.",
        {
            "FlopsProfiler.stop_profile FlopsProfiler.reset_profile FlopsProfiler.end_profile": _HERE,
            "FlopsProfiler.get_total_flops FlopsProfiler.get_total_macs FlopsProfiler.get_total_params "
            "FlopsProfiler.get_total_duration": _HERE,
            "FlopsProfiler.print_model_profile": "in Partita's form",
            "profiler.FlopsProfiler profiler.get_model_profile": "the same",
        },
    ),
    *absent(
        "profiling.flops_profiler.",
        {
            "FlopsProfiler.print_model_aggregated_profile FlopsProfiler.is_expert_tensor_parallelism_enabled": _PROFILE,
            "profiler.get_module_flops profiler.get_module_macs profiler.get_module_duration": _PROFILE,
            "profiler.number_to_string profiler.flops_to_string profiler.macs_to_string profiler.params_to_string "
            "profiler.bytes_to_string profiler.duration_to_string": "the totals take `as_string=True`",
        },
    ),
]
