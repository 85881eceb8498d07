"""Rows: the engine's methods without arguments that answer from its config, each with its answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from partita.compat.deepspeed._surface.row import Answer, Row

if TYPE_CHECKING:
    from partita.config import Config

Question = Callable[["Config"], Any]

_NOT_HERE = "False or None: there is no such feature"


def _key(path: str) -> Question:
    """The value of a dotted key."""

    def ask(config: Config) -> Any:
        value: Any = config
        for name in path.split("."):
            value = getattr(value, name)
        return value

    return ask


def _offloads(section: str) -> Question:
    """A section of offloading, None if nothing is offloaded."""

    def ask(config: Config) -> Any:
        found = getattr(config.zero_optimization, section)
        return None if found.device == "none" else found

    return ask


def _constant(value: Any) -> Question:
    return lambda config: value


_KEYS: dict[str, str] = {
    "dump_state": "dump_state",
    "flops_profiler_detailed": "flops_profiler.detailed",
    "flops_profiler_enabled": "flops_profiler.enabled",
    "flops_profiler_module_depth": "flops_profiler.module_depth",
    "flops_profiler_output_file": "flops_profiler.output_file",
    "flops_profiler_profile_step": "flops_profiler.profile_step",
    "flops_profiler_recompute_fwd_factor": "flops_profiler.recompute_fwd_factor",
    "flops_profiler_top_modules": "flops_profiler.top_modules",
    "gradient_predivide_factor": "gradient_predivide_factor",
    "memory_breakdown": "memory_breakdown",
    "torch_autocast_enabled": "torch_autocast.enabled",
    "wall_clock_breakdown": "wall_clock_breakdown",
    "zero_allgather_bucket_size": "zero_optimization.allgather_bucket_size",
    "zero_contiguous_gradients": "zero_optimization.contiguous_gradients",
    "zero_max_live_parameters": "zero_optimization.stage3_max_live_parameters",
    "zero_overlap_comm": "zero_optimization.overlap_comm",
    "zero_param_persistence_threshold": "zero_optimization.stage3_param_persistence_threshold",
    "zero_prefetch_bucket_size": "zero_optimization.stage3_prefetch_bucket_size",
    "zero_reduce_bucket_size": "zero_optimization.reduce_bucket_size",
    "zero_reduce_scatter": "zero_optimization.reduce_scatter",
}

_ANSWERED: dict[str, tuple[Question, str]] = {
    "checkpoint_tag_validation_enabled checkpoint_tag_validation_fail": (
        _constant(True),
        "True: ranks that give different tags are told",
    ),
    "dynamic_loss_scale": (lambda c: c.fp16.loss_scale == 0, "whether the config leaves the scale to the engine"),
    "initial_dynamic_scale": (lambda c: 2.0**c.fp16.initial_scale_power, "of `fp16.initial_scale_power`"),
    "dynamic_loss_scale_args": (
        lambda c: {
            "init_scale": 2.0**c.fp16.initial_scale_power,
            "scale_window": c.fp16.loss_scale_window,
            "min_scale": c.fp16.min_loss_scale,
            "delayed_shift": c.fp16.hysteresis,
            "consecutive_hysteresis": c.fp16.consecutive_hysteresis,
        },
        "of the `fp16` section, under DeepSpeed's names",
    ),
    "managed_gradient_accumulation": (_constant(True), "True; `set_gradient_accumulation_boundary()` decides by hand"),
    "loss_scale": (_key("fp16.loss_scale"), "`fp16.loss_scale`; the present scale is `engine.optimizer.loss_scale`"),
    "postscale_gradients": (lambda c: not c.prescale_gradients, "the opposite of `prescale_gradients`"),
    "zero_offload_optimizer": (_offloads("offload_optimizer"), "the section, None if nothing is offloaded"),
    "zero_offload_param": (_offloads("offload_param"), "the section, None if nothing is offloaded"),
    "zero_cpu_offload zero_use_cpu_optimizer": (
        lambda c: c.zero_optimization.offload_optimizer.device == "cpu",
        "whether `offload_optimizer.device` is cpu",
    ),
    "zero_partial_offload": (_key("zero_optimization.offload_optimizer.ratio"), "`offload_optimizer.ratio`"),
    "zero_allow_untested_optimizer zero_ignore_unused_parameters zero_allgather_partitions zero_elastic_checkpoint "
    "zero_load_from_fp32_weights checkpoint_serialization_enabled": (_constant(True), "True: it is always so"),
    "zero_hpz_partition_size zero_nvme_offload_optimizer zero_quantized_gradients zero_quantized_weights "
    "zero_quantized_nontrainable_weights zero_multi_rank_bucket_allreduce zero_round_robin_gradients "
    "zero_legacy_stage1 zero_force_ds_cpu_optimizer zero_log_trace_cache_warnings zero_allgather_sequential "
    "zero_save_muon_momentum_buffer_in_memory super_offload curriculum_learning_enabled data_efficiency_enabled "
    "data_sampling_enabled random_ltd_enabled autotuning_enabled autotuning_profile_model_info fp16_auto_cast "
    "fp16_master_weights_and_gradients bf16_master_weights_and_gradients bf16_optimizer_states "
    "is_sanity_checks_enabled load_universal_checkpoint use_node_local_storage optimizer_legacy_fusion "
    "compile_autosp compile_autotp checkpoint_writer_enabled uses_parallelization_pass_only": (
        _constant(False),
        _NOT_HERE,
    ),
    "curriculum_learning_config data_efficiency_config data_sampling_config random_ltd_config "
    "autotuning_start_profile_step autotuning_end_profile_step autotuning_metric_path autotuning_model_info_path "
    "autotuning_metric aio_config swap_tensor_config zenflow_config tensor_parallel_config": (
        _constant(None),
        _NOT_HERE,
    ),
    "autotp_size": (_constant(0), "0: there is no tensor parallelism"),
    "compile_zero_optimization_stage": (_key("zero_optimization.stage"), "the stage"),
}

QUESTIONS: dict[str, Question] = {
    **{name: _key(path) for name, path in _KEYS.items()},
    **{name: ask for several, (ask, _) in _ANSWERED.items() for name in several.split()},
}
"""What each method answers, from the config of an engine."""

_OF_THE_CLASS: dict[str, str] = {
    "bfloat16_enabled fp16_enabled": "`bf16.enabled` and `fp16.enabled`",
    "gradient_clipping": "DeepSpeed's default: 1.0",
    "optimizer_name optimizer_params scheduler_name scheduler_params": "of the config; None where it has none",
    "steps_per_print": "`steps_per_print`",
    "zero_gather_16bit_weights_on_model_save": "whether the config asks for whole weights in `save_16bit_model()`",
    "zero_optimization": "whether the stage is 1 or more",
    "zero_optimization_partition_gradients": "whether the stage is 2 or more",
    "zero_optimization_partition_weights": "whether the stage is 3",
    "zero_optimization_stage": "0 to 3",
}

_WORDS: dict[str, str] = {
    **{name: f"`{path}`" for name, path in _KEYS.items()},
    **{name: words for several, (_, words) in _ANSWERED.items() for name in several.split()},
    **{name: words for several, words in _OF_THE_CLASS.items() for name in several.split()},
}

_ABSENT = {
    "cpuadam_cores_perc zero_sub_group_size zero_module_granularity_threshold zero_model_persistence_threshold "
    "zero_max_reuse_distance zero_parameter_alignment zero_compute_grad_norm": "Partita has no such number",
    "torch_autocast_lower_precision_safe_modules torch_autocast_dtype": "read `engine.config`'s `torch_autocast`",
    "communication_data_type get_data_types": "read `communication_data_type` and `data_types` in the config",
    "log_level": 'call `logging.getLogger("partita").level`',
    "dataloader_drop_last": "read the key in `engine.config`, a dict",
    "is_first_weights_partition_group": "there is one group of ranks",
}

ROWS: list[Row] = [
    *(Row(f"deepspeed.DeepSpeedEngine.{name}", Answer.WORKS, words) for name, words in _WORDS.items()),
    *(
        Row(f"deepspeed.DeepSpeedEngine.{name}", Answer.ABSENT, how)
        for several, how in _ABSENT.items()
        for name in several.split()
    ),
]
