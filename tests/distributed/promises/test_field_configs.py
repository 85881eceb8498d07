"""Configs as the field writes them train as they are on two ranks, with the bits of their clean form."""

from __future__ import annotations

import math
from typing import Any

import partita
import pytest
import torch
from blocks_model import make_blocks, take_step
from partita.config import clean_form, load_config

SIZES = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
TYPES = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 32, "hysteresis": 2, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
}
CPU = {"device": "cpu", "pin_memory": True, "nvme_path": None, "buffer_count": 4}
NO_LIMITS = {"stage3_max_reuse_distance": 1e9, "sub_group_size": 1e14, "stage3_module_granularity_threshold": 0}
AUTO_SIZES_3 = dict.fromkeys(
    ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), "auto"
)
WARMUP = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")
ADAMW = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}

FIELD: dict[str, dict[str, Any]] = {
    "a trainer's, stage 2, everything left open": {
        **SIZES,
        **TYPES,
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True, "adam_w_mode": True}},
        "scheduler": {"type": "WarmupLR", "params": WARMUP},
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "allgather_partitions": True,
        },
        "gradient_clipping": "auto",
        "steps_per_print": 1e5,
        "wall_clock_breakdown": False,
    },
    "a trainer's, stage 3, all on the host, a decay without an end": {
        **SIZES,
        **TYPES,
        "_comment": "from the wiki",
        "optimizer": ADAMW,
        "scheduler": {"type": "WarmupDecayLR", "params": {**WARMUP, "total_num_steps": "auto"}},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": CPU,
            "offload_param": {**CPU, "max_in_cpu": 1e9},
            "stage3_gather_16bit_weights_on_model_save": "auto",
            **AUTO_SIZES_3,
            **NO_LIMITS,
        },
    },
    "names of earlier versions": {
        "train_batch_size": 4.0,
        "bfloat16": {"enabled": True, "check_overflow": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 3,
            "cpu_offload": True,
            "cpu_offload_params": True,
            "cpu_offload_use_pin_memory": True,
            "max_live_parameters": 0,
            "max_reuse_distance": 0,
            "prefetch_bucket_size": 0,
            "param_persistence_threshold": 10,
            "stage3_gather_fp16_weights_on_model_save": True,
            "reduce_bucket_size": 0,
            "contiguous_gradients": False,
            "legacy_stage1": False,
            "elastic_checkpoint": False,
        },
    },
    "sections that are off": {
        "train_micro_batch_size_per_gpu": 2,
        "amp": {"enabled": False},
        "wandb": {"enabled": False},
        "tensorboard": {"enabled": False, "output_path": "runs"},
        "csv_monitor": {},
        "autotuning": {"enabled": False, "fast": True},
        "data_efficiency": {"enabled": False},
        "tensor_parallel": {"autotp_size": 1},
        "sequence_parallel_size": 1,
        "sparse_attention": None,
        "fp16": {"enabled": False, "initial_scale_power": 32, "auto_cast": False},
        "data_types": {"keep_in_fp32_modules": "auto", "param_dtype": None},
        "checkpoint": {"tag_validation": "Warn", "load_universal": False},
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "amsgrad": False, "weight_decay": 0.0}},
        "zero_optimization": {
            "stage": 1,
            "zero_quantized_weights": False,
            "zero_hpz_partition_size": 1,
            "offload_optimizer": {"device": "none"},
            "offload_param": None,
            "overlap_comm": None,
        },
    },
    "sums in fp32, and Apex": {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_allreduce_op": "mean",
        "managed_gradient_accumulation": True,
        "fp32_allreduce": True,
        "amp": {"enabled": True, "opt_level": "O1"},
        "optimizer": {"type": "Adam", "params": {"lr": 3e-5, "weight_decay": 0.01, "adam_w_mode": True}},
        "log": {"steps_per_print": 50},
        "activation_checkpointing": {"partition_activations": True, "cpu_checkpointing": True, "number_checkpoints": 4},
        "zero_optimization": {"stage": 0, "round_robin_gradients": True, "ignore_unused_parameters": True},
    },
}


def _two_steps(config: dict[str, Any]) -> tuple[dict[str, Any], int, set[str]]:
    """Weights after two steps that were not skipped, how many there were, the keys that were noted."""
    model = make_blocks()
    given = None if "optimizer" in config else torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine = partita.initialize(model=model, optimizer=given, config=config)[0]
    while engine.global_steps - engine.skipped_steps < 2:
        for _ in range(engine.gradient_accumulation_steps()):
            assert math.isfinite(take_step(engine, engine.micro_steps))
    result = engine.module_state_dict(), engine.global_steps, {note.key for note in engine.config.ignored}
    engine.destroy()
    return result


def _as_it_is_and_clean(config: dict[str, Any]) -> tuple[Any, Any]:
    return _two_steps(config), _two_steps(clean_form(config))


@pytest.mark.parametrize("name", FIELD)
def test_a_config_of_the_field_trains_with_the_bits_of_its_clean_form(ranks, name):
    """What is noted has no effect, and other spellings have the effect of the keys that they stand for."""
    noted = {note.key for note in load_config(FIELD[name]).ignored}
    assert noted
    for (weights, steps, listed), (clean, clean_steps, _) in ranks(2).run(_as_it_is_and_clean, FIELD[name]):
        assert steps == clean_steps
        assert listed == noted
        for key, value in weights.items():
            assert torch.equal(value, clean[key]), key
