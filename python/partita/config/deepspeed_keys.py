"""Keys that DeepSpeed reads and Partita does not, with what to do instead (an empty hint: only removing it).

A section that is missing here as a whole stands under its own name; its keys need no entry.
"""

from __future__ import annotations

_STAGE_3 = "stage 3 does not need it"
_OFFLOAD = "use zero_optimization.offload_optimizer and offload_param"
_NVME = "there is no NVMe offload, only device cpu"
_SAVE = "engine.save_16bit_model() gathers the weights, and nothing else does"
_QUANTIZED = "quantized communication is not in this version; communication_data_type can halve the traffic"

_TOP_LEVEL = {
    "aio": "there is no NVMe offload",
    "allgather_size": "use zero_optimization.allgather_bucket_size",
    "amp": "use fp16, bf16 or torch_autocast",
    "autotuning": "set the batch sizes yourself",
    "bfloat16": "use bf16",
    "checkpoint": "",
    "comet": "",
    "comms_logger": "",
    "compile": "pass a model that torch.compile returned",
    "compression_training": "",
    "csv_monitor": "",
    "curriculum_learning": "",
    "data_efficiency": "",
    "dataloader_drop_last": "set drop_last where the data loader is made",
    "datastates_ckpt": "",
    "disable_allgather": "",
    "disable_python_gc": "call gc.disable() in the training script",
    "eigenvalue": "",
    "elasticity": "set train_batch_size; the other sizes follow from the number of ranks",
    "expert_parallel": "",
    "flops_profiler": "",
    "fp32_allreduce": 'set communication_data_type to "fp32"',
    "gradient_allreduce_op": "gradients are always averaged; scale the loss to get their sum",
    "graph_harvesting": "",
    "hybrid_engine": "",
    "log_level": "set it with Python's logging module",
    "managed_gradient_accumulation": "set gradient_accumulation_steps",
    "memory_breakdown": "read torch.cuda.memory_stats() in the training script",
    "nebula": "",
    "pipeline": "",
    "progressive_layer_drop": "",
    "quantize_training": "",
    "seq_parallel_communication_data_type": "use communication_data_type",
    "sequence_parallel_size": "",
    "sparse_attention": "",
    "sparse_gradients": "",
    "tensor_parallel": "",
    "tensorboard": "",
    "timers": "use wall_clock_breakdown",
    "use_data_before_expert_parallelism": "",
    "vocabulary_size": "it only served a warning",
    "wandb": "",
    "weight_quantization": "",
    "zero_allow_untested_optimizer": "an optimizer that cannot be sharded is refused by name",
    "zero_force_ds_cpu_optimizer": "the update on the host is native, and runs any element-wise optimizer",
}

_SECTIONS: dict[str, dict[str, str]] = {
    "optimizer": {"legacy_fusion": ""},
    "fp16": {
        "auto_cast": "cast the inputs in the training script",
        "fp16_master_weights_and_grads": "master weights are always fp32",
    },
    "bf16": {
        "bf16_master_weights_and_grads": "master weights are always fp32",
        "bf16_optimizer_states": "optimizer state is always fp32",
        "check_grad_overflow": "gradients are always checked",
        "check_overflow": "gradients are always checked",
        "immediate_grad_update": "",
    },
    "torch_autocast": {"lower_precision_safe_modules": "torch.autocast chooses by operation"},
    "data_types": {
        "keep_in_fp32_modules": "buffers keep their type unless data_types.buffer_dtype is set",
        "param_dtype": "enable fp16 or bf16",
    },
    "zero_optimization": {
        "allgather_partitions": "updated parameters are always gathered by all-gather",
        "compute_grad_norm": "the norm is a by-product of the overflow check",
        "cpu_offload": _OFFLOAD,
        "cpu_offload_param": _OFFLOAD,
        "cpu_offload_params": _OFFLOAD,
        "cpu_offload_use_pin_memory": _OFFLOAD,
        "elastic_checkpoint": "",
        "gather_16bit_weights_on_model_save": _SAVE,
        "enable_sanity_checks": "",
        "ignore_unused_parameters": "a parameter without gradient counts as zero",
        "legacy_stage1": "",
        "load_from_fp32_weights": "",
        "memory_efficient_linear": _STAGE_3,
        "mics_hierarchical_params_gather": _STAGE_3,
        "mics_shard_size": _STAGE_3,
        "override_module_apply": _STAGE_3,
        "parameter_alignment": "parameters always start on a 128-byte boundary",
        "pipeline_loading_checkpoint": "",
        "round_robin_gradients": "it served offloading",
        "save_muon_momentum_buffer_in_memory": "",
        "stage3_gather_16bit_weights_on_model_save": _SAVE,
        "stage3_gather_fp16_weights_on_model_save": _SAVE,
        "use_multi_rank_bucket_allreduce": "",
        "zenflow": "",
        "zero_hpz_partition_size": _STAGE_3,
        "zero_quantized_gradients": _QUANTIZED,
        "zero_quantized_nontrainable_weights": _QUANTIZED,
        "zero_quantized_weights": _QUANTIZED,
        "zeropp_loco_param": _QUANTIZED,
        **dict.fromkeys(
            [
                "allgather_sequential",
                "leaf_module",
                "log_trace_cache_warnings",
                "max_live_parameters",
                "max_reuse_distance",
                "model_persistence_threshold",
                "module_granularity_threshold",
                "param_persistence_threshold",
                "prefetch_bucket_size",
                "stage3_allgather_sequential",
                "stage3_max_reuse_distance",
                "stage3_model_persistence_threshold",
                "stage3_module_granularity_threshold",
                "stage3_use_all_reduce_for_fetch_params",
                "sub_group_size",
                "use_all_reduce_for_fetch_params",
            ],
            _STAGE_3,
        ),
    },
    "activation_checkpointing": {
        "contiguous_memory_optimization": "",
        "number_checkpoints": "name the layers in activation_checkpointing.classes",
        "partition_activations": "",
        "profile": "",
        "synchronize_checkpoint_boundary": "",
    },
    "zero_optimization.offload_optimizer": {
        "buffer_count": _NVME,
        "fast_init": _NVME,
        "nvme_path": _NVME,
        "pipeline_read": _NVME,
        "pipeline_write": _NVME,
        "super_offload": "",
        "cpuadam_cores_perc": "set OMP_NUM_THREADS",
    },
    "zero_optimization.offload_param": {
        "buffer_count": _NVME,
        "buffer_size": _NVME,
        "max_in_cpu": _NVME,
        "nvme_path": _NVME,
    },
}

DEEPSPEED_ONLY_KEYS: dict[str, str] = _TOP_LEVEL | {
    f"{section}.{key}": hint for section, keys in _SECTIONS.items() for key, hint in keys.items()
}
"""Dotted key -> hint."""
