"""The answers to the keys of DeepSpeed's section zero_optimization that are not keys of `models`."""

from __future__ import annotations

from partita.config.answers import ANY, EMPTY, Rule, noted, numbers, only, refused, written_as

_ZERO = "zero_optimization"
_NOTHING = "asks for nothing"
_GATHERS = "stage 3 gathers whole layers and needs no further limit"
_SAVES = "engine.save_16bit_model() and save_model() always write whole weights"
_NVME = "it tunes NVMe offload, which is not there"
_NO_NVME = 'there is no NVMe offload: set device to "cpu", and remove nvme_path'
_FULL_PRECISION = (
    "parameters and gradients travel unquantized: remove it; communication_data_type can halve the traffic"
)
_DEFAULT_SIZE = "a bucket needs a size: the default is used"


def _section(name: str, keys: dict[str, Rule]) -> dict[str, Rule]:
    return {f"{name}.{key}": rule for key, rule in keys.items()}


_QUANTIZED: Rule = (noted(_NOTHING, only(False, None)), refused(_FULL_PRECISION))
_ZERO_SIZE: Rule = (noted(_DEFAULT_SIZE, numbers("`0`", lambda value: value == 0, 0)),)
_CPU = only(True)

_KEYS: dict[str, Rule] = {
    "allgather_bucket_size": _ZERO_SIZE,
    "reduce_bucket_size": _ZERO_SIZE,
    "allgather_partitions": (noted("updated parameters are always gathered by all-gather"),),
    "compute_grad_norm": (noted("the norm is a by-product of the check for overflow"),),
    "contiguous_gradients": (noted("gradients are always packed into flat buffers", only(False, None)),),
    "cpu_offload": (
        noted(_NOTHING, only(False, None)),
        written_as(f"{_ZERO}.offload_optimizer.device", _CPU, "cpu"),
        refused("write true or false, or better offload_optimizer"),
    ),
    **dict.fromkeys(
        ("cpu_offload_param", "cpu_offload_params"),
        (
            noted(_NOTHING, only(False, None)),
            written_as(f"{_ZERO}.offload_param.device", _CPU, "cpu"),
            refused("write true or false, or better offload_param"),
        ),
    ),
    "cpu_offload_use_pin_memory": (noted("host memory is pinned unless offload_*.pin_memory is false"),),
    "elastic_checkpoint": (noted("every checkpoint is one that any number of ranks loads"),),
    "enable_sanity_checks": (noted("it checks DeepSpeed's internals"),),
    "ignore_unused_parameters": (noted("a parameter without a gradient counts as zero"),),
    "leaf_module": (noted("blocks are found by themselves; zero_optimization.unit_classes names others"),),
    "legacy_stage1": (noted("there is one implementation of the stages"),),
    "load_from_fp32_weights": (noted("master weights are always restored in fp32"),),
    "log_trace_cache_warnings": (noted("it reports about DeepSpeed's prefetching"),),
    "mics_hierarchical_params_gather": (noted("parameters are gathered over all ranks"),),
    "mics_shard_size": (
        noted(_NOTHING, numbers("below `1`", lambda value: value < 1, -1)),
        refused("parameters are divided over all ranks; DeepSpeed 0.19 has removed MiCS too: remove it"),
    ),
    "memory_efficient_linear": (noted("it replaces a function of torch that needs no replacement"),),
    "overlap_comm": (noted("null: the default", only(None)),),
    "override_module_apply": (noted("it tunes how DeepSpeed wraps modules"),),
    "parameter_alignment": (noted("parameters always start on a 128-byte boundary"),),
    "pipeline_loading_checkpoint": (noted("it tunes DeepSpeed's reader"),),
    "round_robin_gradients": (noted("it tunes DeepSpeed's offloading"),),
    "save_muon_momentum_buffer_in_memory": (noted("it tunes NVMe offload of Muon, and neither is there"),),
    "use_multi_rank_bucket_allreduce": (noted("every rank gets its part by a reduce-scatter"),),
    "zenflow": (
        noted(_NOTHING, EMPTY),
        refused("ZenFlow updates most weights late, from old gradients: remove it, offload_optimizer overlaps too"),
    ),
    "zero_hpz_partition_size": (noted("parameters are divided over all ranks, and shared by those of one host"),),
    "zero_quantized_gradients": _QUANTIZED,
    "zero_quantized_nontrainable_weights": _QUANTIZED,
    "zero_quantized_weights": _QUANTIZED,
    "zeropp_loco_param": (noted(_NOTHING, EMPTY), refused(_FULL_PRECISION)),
    "sub_group_size": (noted("the update is a pass over whole shards and needs no tiles"),),
    **dict.fromkeys(
        (
            "gather_16bit_weights_on_model_save",
            "stage3_gather_16bit_weights_on_model_save",
            "stage3_gather_fp16_weights_on_model_save",
        ),
        (noted(_SAVES),),
    ),
    **{
        name: (written_as(f"{_ZERO}.stage3_{name}"),)
        for name in ("max_live_parameters", "param_persistence_threshold", "prefetch_bucket_size")
    },
    **{
        f"{prefix}{name}": (noted(_GATHERS, ANY),)
        for prefix in ("", "stage3_")
        for name in (
            "allgather_sequential",
            "max_reuse_distance",
            "model_persistence_threshold",
            "module_granularity_threshold",
            "use_all_reduce_for_fetch_params",
        )
    },
}

_OFFLOAD_OPTIMIZER: dict[str, Rule] = {
    "device": (refused(_NO_NVME, only("nvme")),),
    "buffer_count": (noted(_NVME),),
    "cpuadam_cores_perc": (noted("set OMP_NUM_THREADS to the number of threads of a rank"),),
    "fast_init": (noted(_NVME),),
    "nvme_path": (noted(_NVME),),
    "pipeline_read": (noted(_NVME),),
    "pipeline_write": (noted(_NVME),),
    "super_offload": (noted("the update on the host always overlaps with its transfers"),),
}

_OFFLOAD_PARAM: dict[str, Rule] = {
    "device": (refused(_NO_NVME, only("nvme")),),
    "buffer_count": (noted(_NVME),),
    "buffer_size": (noted(_NVME),),
    "max_in_cpu": (noted(_NVME),),
    "nvme_path": (noted(_NVME),),
}

ZERO_RULES: dict[str, Rule] = {
    **_section(_ZERO, _KEYS),
    **_section(f"{_ZERO}.offload_optimizer", _OFFLOAD_OPTIMIZER),
    **_section(f"{_ZERO}.offload_param", _OFFLOAD_PARAM),
}
