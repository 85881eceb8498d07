"""The answers to the keys of DeepSpeed's config that are no keys of `models`; zero_optimization has its own file."""

from __future__ import annotations

from partita.config.answers import (
    ANY,
    EMPTY,
    OFF,
    Rule,
    Values,
    noted,
    numbers,
    only,
    refused,
    written_as,
)
from partita.config.deepspeed_zero_keys import ZERO_RULES

_NOTHING = "asks for nothing"
_ALWAYS = "what Partita does anyway"
_REMOVED = "DeepSpeed 0.19 has removed it too; remove it"
_FP32 = "master weights, gradients of them and moments are fp32 here: remove it"
_TENSOR_PARALLEL = "it divides activations over tensor-parallel ranks, which are not there"
_CHECKPOINTED = "activation_checkpointing.enabled chooses the layers and what they keep"


def _off(remedy: str, off: Values = OFF) -> Rule:
    """A section that is noted while it is off."""
    return noted(_NOTHING, off), refused(remedy)


_AMP_O1 = Values(
    '`enabled: true` with `opt_level` "O1" or none',
    lambda value: isinstance(value, dict) and value.get("enabled") is True and value.get("opt_level", "O1") == "O1",
    ({"enabled": True}, {"enabled": True, "opt_level": "O1"}),
)
_ONE_WAY = Values(
    "`autotp_size` and `tp.tp_size` of at most 1",
    lambda value: (
        not value
        or (
            isinstance(value, dict)
            and value.get("autotp_size", 0) in (0, 1)
            and all((value.get(name) or {}).get("tp_size", 1) == 1 for name in ("tp", "tensor_parallel"))
        )
    ),
    ({}, {"autotp_size": 1}, {"autotp_size": 0, "tp": {"tp_size": 1}}),
)
_AT_MOST_1 = numbers("at most `1`", lambda value: value <= 1, 0, 1)

_TOP_LEVEL: dict[str, Rule] = {
    "aio": (noted("it tunes NVMe offload, which is not there"),),
    "allgather_size": (noted("DeepSpeed reads it for `zero_optimization: true` only; see allgather_bucket_size"),),
    "amp": (
        noted(_NOTHING, OFF),
        noted(
            "Apex's O1 is torch.autocast in float16 now, with fp16's loss scale: torch_autocast is enabled",
            _AMP_O1,
            "torch_autocast",
            lambda _: {"enabled": True, "dtype": "float16"},
        ),
        refused("use fp16 for Apex's O2, torch_autocast for O1, and neither for O0"),
    ),
    "autotuning": _off("set the batch sizes yourself and remove it"),
    "bfloat16": (written_as("bf16", Values("as there", lambda value: True, ({"enabled": True}, {"enabled": "auto"}))),),
    "comms_config": (noted("DeepSpeed does not read it either"),),
    "compile": (noted("pass a model that torch.compile() returned; DeepSpeed too compiles in engine.compile() only"),),
    "compression_training": _off(_REMOVED, EMPTY),
    "curriculum_learning": _off(_REMOVED),
    "data_efficiency": _off("order, select or crop the samples in the training script, and remove it"),
    "dataloader_drop_last": (
        noted("an incomplete last batch is always dropped", only(True, None)),
        refused("an incomplete last batch is always dropped: set it to true, or loop over a loader of your own"),
    ),
    "datastates_ckpt": _off("remove it", EMPTY),
    "ddp_bf16": (noted("DeepSpeed does not read it either"),),
    "disable_allgather": (noted("updated parameters are always gathered"),),
    "disable_python_gc": (noted("call gc.disable() in the training script"),),
    "eigenvalue": _off(_REMOVED),
    "elasticity": _off("set train_batch_size, the other sizes follow from the number of ranks; " + _REMOVED),
    "expert_parallel": _off("there is no expert parallelism; remove it to train all experts on every rank"),
    "fp32_allreduce": (noted(_NOTHING, only(False, None)), written_as("communication_data_type", only(True), "fp32")),
    "fp8": _off("there is no fp8 training: use bf16, and remove it"),
    "gradient_allreduce_op": (
        noted("gradients are always averaged", only("mean", "MEAN", "Mean", None)),
        refused("gradients are always averaged: multiply the loss by the number of ranks for their sum, and remove it"),
    ),
    "graph_harvesting": (noted("it tunes DeepSpeed's use of CUDA graphs"),),
    "hybrid_engine": _off("generate outside of the engine, and remove it"),
    "log": (noted("DeepSpeed does not read it either; steps_per_print stands at the top level"),),
    "log_level": (noted("set it with Python's logging, for the logger 'partita'"),),
    "managed_gradient_accumulation": (
        noted(_ALWAYS, only(True, None)),
        refused("decide with engine.set_gradient_accumulation_boundary() which steps update, and remove it"),
    ),
    "monitor_config": (noted("DeepSpeed does not read it either"),),
    "nebula": _off(_REMOVED, EMPTY),
    "progressive_layer_drop": _off(_REMOVED),
    "quantize_training": _off(_REMOVED, EMPTY),
    "seq_parallel_communication_data_type": (noted("there is no sequence parallelism that would use it"),),
    "sequence_parallel_size": (
        noted(_NOTHING, _AT_MOST_1),
        refused("there is no sequence parallelism: set it to 1 and shorten or checkpoint the sequences"),
    ),
    "sparse_attention": _off("use an attention that is sparse in the model; " + _REMOVED, EMPTY),
    "sparse_gradients": (noted("gradients travel whole, which gives the same sums"),),
    "tensor_parallel": (
        noted(_NOTHING, _ONE_WAY),
        refused("there is no tensor parallelism: set autotp_size to 1, and let stage 3 divide the parameters"),
    ),
    "timers": (noted("use wall_clock_breakdown"),),
    "use_data_before_expert_parallelism": (noted("there is no expert parallelism that would use it"),),
    "vocabulary_size": (noted("it only serves a warning in DeepSpeed"),),
    "weight_quantization": _off("weights are not quantized: remove it", EMPTY),
    "zero_allow_untested_optimizer": (noted("an optimizer that cannot be sharded is refused by name"),),
    "zero_force_ds_cpu_optimizer": (noted("any element-wise optimizer runs on the host"),),
}

_OTHER_SECTIONS: dict[str, Rule] = {
    "activation_checkpointing.contiguous_memory_optimization": (noted(_CHECKPOINTED),),
    "activation_checkpointing.number_checkpoints": (noted(_CHECKPOINTED),),
    "activation_checkpointing.partition_activations": (noted(_CHECKPOINTED),),
    "activation_checkpointing.profile": (noted(_CHECKPOINTED),),
    "activation_checkpointing.synchronize_checkpoint_boundary": (noted(_CHECKPOINTED),),
    "bf16.bf16_master_weights_and_grads": (noted(_NOTHING, only(False, None)), refused(_FP32)),
    "bf16.bf16_optimizer_states": (noted(_NOTHING, only(False, None)), refused(_FP32)),
    "bf16.check_grad_overflow": (noted("gradients are always checked, and a step that is not finite is skipped"),),
    "bf16.check_overflow": (noted("gradients are always checked, and a step that is not finite is skipped"),),
    "bf16.immediate_grad_update": (noted("it says when DeepSpeed copies gradients"),),
    "checkpoint.checkpoint_serialization": (noted("it tunes DeepSpeed's writer"),),
    "checkpoint.load_universal": (noted("every checkpoint is one that any ranks, stage and precision load"),),
    "checkpoint.parallel_write": (noted("it tunes DeepSpeed's writer"),),
    "checkpoint.tag_validation": (noted("it checks names of DeepSpeed's checkpoints"),),
    "checkpoint.use_node_local_storage": (
        noted(_NOTHING, only(False, None)),
        refused("all ranks save into one folder: give one that all hosts see, and remove the key"),
    ),
    "checkpoint.writer": (noted("it tunes DeepSpeed's writer"),),
    "data_types.keep_in_fp32_modules": (
        noted("buffers keep their type unless data_types.buffer_dtype is set", only("auto", None)),
        refused("buffers keep their type unless data_types.buffer_dtype is set: remove it"),
    ),
    "data_types.param_dtype": (noted(_NOTHING, only(None)), refused("enable fp16 or bf16, and remove it")),
    "fp16.auto_cast": (
        noted(_NOTHING, only(False, None)),
        noted("inputs are not cast: floating-point inputs have to be float16, others need nothing", only(True)),
    ),
    "fp16.fp16_master_weights_and_grads": (noted(_NOTHING, only(False, None)), refused(_FP32)),
    "fp16.initial_scale_power": (
        noted(
            "the loss scale starts at 2 to the power 24, its largest value",
            numbers("above `24`", lambda value: 24 < value < 1000 and value == int(value), 25, 32),
            "fp16.initial_scale_power",
            lambda _: 24,
        ),
    ),
    "optimizer.legacy_fusion": (noted("it tunes DeepSpeed's fp16 optimizer"),),
    "pipeline.grad_partitioned": (noted(_TENSOR_PARALLEL),),
    "pipeline.partition": (noted("DeepSpeed does not use it either: PipelineModule has partition_method"),),
    "pipeline.pipe_partitioned": (noted(_TENSOR_PARALLEL),),
    "pipeline.seed_layers": (noted("DeepSpeed does not use it either: PipelineModule has seed_layers"),),
    "pipeline.stages": (noted("DeepSpeed does not use it either: PipelineModule has num_stages"),),
    "pipeline.use_reentrant": (
        noted("layers are recomputed without reentering autograd, which gives the same values"),
    ),
    "steps_per_print": (
        noted(
            "no progress line is printed",
            Values("infinity", lambda value: value == float("inf"), (float("inf"),)),
            "steps_per_print",
            lambda _: None,
        ),
    ),
    "torch_autocast.lower_precision_safe_modules": (
        noted(_NOTHING, only(None)),
        refused("torch.autocast chooses by operation: remove it"),
    ),
}

RULES: dict[str, Rule] = _TOP_LEVEL | _OTHER_SECTIONS | ZERO_RULES
"""Dotted key -> its cases. A key of a section that stands here as a whole has none of its own."""

COMMENT = noted("a comment", ANY)
"""What keys get that only hold text for people, see `is_comment`."""


def is_comment(key: str) -> bool:
    """Whether a key is one of those that people write comments into."""
    return key.startswith(("_", "//", "#", "$")) or key.lower() in ("comment", "comments", "description")


def rule_of(key: str) -> Rule:
    """The cases of a dotted key, or of the section that it is in; none: DeepSpeed 0.19 has no such key."""
    while key:
        if key in RULES:
            return RULES[key]
        key = key.rpartition(".")[0]
    return ()
