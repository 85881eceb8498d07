"""The configuration: every error names the key and the remedy."""

from __future__ import annotations

import math
from typing import Any

import pytest
from config_messages import message_for, nested
from partita.config.checkpoint_keys import CheckpointConfig, EncryptionConfig
from partita.config.fields import OwnKey
from partita.config.monitor_keys import MonitorConfig
from partita.config.profile_keys import TraceConfig
from partita.config.sections import all_sections, join

CPU = {"device": "cpu"}

# Wrong values


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train_batch_size", 0, "an integer >= 1 or null"),
        ("train_batch_size", True, "an integer >= 1 or null"),
        ("train_micro_batch_size_per_gpu", "4", "an integer >= 1 or null"),
        ("train_micro_batch_size_per_gpu", 2.5, "an integer >= 1 or null"),
        ("gradient_accumulation_steps", -1, "an integer >= 1 or null"),
        ("optimizer", "AdamW", 'an object; write "optimizer": {"type": "AdamW", "params": {}}'),
        ("scheduler", "WarmupLR", 'an object; write "scheduler": {"type": "WarmupLR", "params": {}}'),
        ("bf16", True, 'an object; write "bf16": {"enabled": true}'),
        ("bf16", "auto", 'an object; write "bf16": {"enabled": "auto"}'),
        ("torch_autocast", False, 'an object; write "torch_autocast": {"enabled": false}'),
        ("optimizer.type", "", "a string that is not empty"),
        ("fp16", True, 'an object; write "fp16": {"enabled": true}'),
        ("fp16", 16, "an object"),
        ("fp16.enabled", 1, "true or false"),
        ("fp16.enabled", "true", "true or false"),
        ("fp16.loss_scale", -1.0, "a number >= 0"),
        ("fp16.loss_scale", True, "a number >= 0"),
        ("fp16.loss_scale", math.nan, "a number >= 0"),
        ("fp16.initial_scale_power", -1, "an integer from 0 to 24"),
        ("fp16.loss_scale_window", 0, "an integer >= 1"),
        ("fp16.hysteresis", 0, "an integer >= 1"),
        ("fp16.min_loss_scale", 0, "a number > 0"),
        ("bf16.enabled", None, "true or false"),
        ("torch_autocast.dtype", "fp32", 'one of "bfloat16", "float16", "bf16", "fp16"'),
        ("zero_optimization", 2, 'an object; write "zero_optimization": {"stage": 2}'),
        ("zero_optimization", True, 'an object; write "zero_optimization": {"stage": 1}'),
        ("zero_optimization.stage", 4, "an integer from 0 to 3"),
        ("zero_optimization.stage", True, "an integer from 0 to 3"),
        ("zero_optimization.stage", "2", "an integer from 0 to 3"),
        ("zero_optimization.unit_classes", "Block", "a list or null"),
        ("zero_optimization.stage3_prefetch_bucket_size", -1, "an integer >= 0"),
        ("zero_optimization.stage3_max_live_parameters", -1, "an integer >= 0"),
        ("zero_optimization.reduce_bucket_size", -1, "an integer >= 1"),
        ("fp16.initial_scale_power", 24.5, "an integer from 0 to 24"),
        ("zero_optimization.stage3_param_persistence_threshold", 1.5, "an integer >= 0"),
        ("zero_optimization.offload_optimizer", "cpu", 'an object; write "offload_optimizer": {"device": "cpu"}'),
        ("zero_optimization.offload_optimizer.device", None, 'one of "none", "cpu"'),
        ("zero_optimization.offload_optimizer.pin_memory", 1, "true or false"),
        ("zero_optimization.offload_optimizer.ratio", 1.01, "a number from 0 to 1"),
        ("zero_optimization.offload_optimizer.threads", 0, "an integer >= 1 or null"),
        ("zero_optimization.offload_optimizer.ratio", -0.1, "a number from 0 to 1"),
        ("zero_optimization.offload_optimizer.ratio", "1", "a number from 0 to 1"),
        ("zero_optimization.offload_param.device", "gpu", 'one of "none", "cpu"'),
        ("zero_optimization.offload_param.pin_memory", None, "true or false"),
        ("activation_checkpointing", True, 'an object; write "activation_checkpointing": {"enabled": true}'),
        ("comm", "torch", 'an object; write "comm": {"transport": "torch"}'),
        ("activation_checkpointing.enabled", "yes", "true or false"),
        ("activation_checkpointing.classes", "Block", "a list or null"),
        ("activation_checkpointing.cpu_checkpointing", 1, "true or false"),
        ("checkpoint", True, "an object"),
        ("checkpoint.dir", "", "a string that is not empty or null"),
        ("checkpoint.interval_steps", 0, "an integer >= 1 or null"),
        ("checkpoint.interval_minutes", 0, "a number > 0 or null"),
        ("checkpoint.keep_last", 0, "an integer >= 1 or null"),
        ("checkpoint.resume", 100, "a string that is not empty"),
        ("checkpoint.encryption", True, "an object"),
        ("pipeline", "1f1b", 'an object; write "pipeline": {"schedule": "1f1b"}'),
        ("pipeline.schedule", "", "a string that is not empty"),
        ("pipeline.schedule", None, "a string that is not empty"),
        ("pipeline.chunks", 0, "an integer >= 1 or null"),
        ("pipeline.chunks", True, "an integer >= 1 or null"),
        ("pipeline.activation_checkpoint_interval", -1, "an integer >= 0"),
        ("zero_optimization.reduce_bucket_size", 1.5, "an integer >= 1"),
        ("zero_optimization.allgather_bucket_size", math.inf, "an integer >= 1"),
        ("zero_optimization.allgather_bucket_size", "5e8", "an integer >= 1"),
        ("gradient_clipping", -0.5, "a number >= 0"),
        ("gradient_clipping", math.inf, "a number >= 0"),
        ("gradient_clipping", "1.0", "a number >= 0"),
        ("communication_data_type", "int8", 'one of "fp32", "fp16", "bf16"'),
        ("data_types.grad_accum_dtype", 32, 'one of "fp32", "fp16", "bf16"'),
        ("gradient_predivide_factor", 0.0, "a number > 0"),
        ("steps_per_print", -1, "an integer >= 0 or null"),
        ("seed", -1, "an integer >= 0"),
        ("max_consecutive_skipped_steps", 0, "an integer >= 1"),
    ],
)
def test_wrong_value_names_key_value_and_range(key: str, value: Any, expected: str) -> None:
    source = nested(key, value)
    if key.startswith("optimizer."):
        source["optimizer"] = {"params": {}, **source["optimizer"]}
    message = message_for(source)
    assert message.startswith("1 problem in the config:\n")
    assert f"\n  {key} = {value!r}: expected {expected}" in message


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            ["zero_optimization: offload_optimizer", "partitioned states", "use stage 1, 2 or 3"],
        ),
        *(
            (
                {"zero_optimization": {"stage": s, "offload_optimizer": CPU, "offload_param": CPU}},
                ["zero_optimization: offload_param", "partitioned parameters", "use stage 3"],
            )
            for s in (1, 2)
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {**CPU, "ratio": 0.9}, "offload_param": CPU}},
            ["zero_optimization: offload_param", "set offload_optimizer.ratio to 1"],
        ),
        (
            {"activation_checkpointing": {"classes": ["Block"]}},
            ["activation_checkpointing: ", "no effect while enabled is false", "set enabled to true"],
        ),
        ({"activation_checkpointing": {"enabled": True, "classes": ["a", 1]}}, ["activation_checkpointing.classes"]),
        ({"checkpoint": {"interval_steps": 5}}, ["checkpoint: interval_steps has no effect without dir; set dir"]),
        ({"checkpoint": {"keep_last": 2, "resume": "best"}}, ["checkpoint: keep_last and resume have no effect"]),
        (
            {"checkpoint": {"dir": "d", "fallback": True, "resume": "never"}},
            ['checkpoint: fallback has no effect while resume = "never"; set resume to "auto"'],
        ),
        ({"checkpoint": {"encryption": {}}}, ["checkpoint.encryption: the key is missing: give one of key_env, "]),
        (
            {"checkpoint": {"encryption": {"key_env": "A", "key_file": "b"}}},
            ["checkpoint.encryption: key_env and key_file exclude each other; leave one"],
        ),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, ["fp16.enabled and bf16.enabled exclude each other"]),
        (
            {"fp16": {"enabled": True}, "torch_autocast": {"enabled": True}},
            ["fp16.enabled and torch_autocast.enabled exclude each other"],
        ),
        (
            {"bf16": {"enabled": True}, "torch_autocast": {"enabled": True}},
            ["bf16.enabled and torch_autocast.enabled exclude each other"],
        ),
        (
            {"gradient_predivide_factor": 2.0},
            ["gradient_predivide_factor = 2", "set prescale_gradients to true"],
        ),
        (
            {"fp16": {"initial_scale_power": 4, "min_loss_scale": 17}},
            ["fp16: min_loss_scale = 17", "initial scale 16", "initial_scale_power = 4"],
        ),
        ({"optimizer": {}}, ["optimizer.type: missing; expected a string"]),
        ({"scheduler": {"params": {}}}, ["scheduler.type: missing; expected a string"]),
        ({"optimizer": {"type": "Adam", "params": {1: 2}}}, ["optimizer.params", "key 1", "not a string"]),
        ({"optimizer": {"type": "Adam", "params": None}}, ["optimizer.params = None: expected an object"]),
        ({"optimizer": {"type": "Adam", "params": {"lr": math.nan}}}, ["optimizer.params.lr = nan: expected a number"]),
        ({"optimizer": {"type": "SGD", "params": {"lr": math.nan}}}, ["optimizer.params", "lr = nan", "finite"]),
        ({"optimizer": {"type": "SGD", "params": {"a": [{1}]}}}, ["optimizer.params", "a[0] is of type set"]),
        ({1: 2}, ["1: Keys should be strings"]),
        (17, ["a config is a dict, the path of a JSON or YAML file, or a Config; got a int"]),
    ],
)
def test_rules_beyond_type_and_range(source: Any, named: list[str]) -> None:
    message = message_for(source)
    for text in named:
        assert text in message


def test_all_problems_are_listed_at_once() -> None:
    message = message_for({"sed": 1, "fp16": {"hysteresis": 0, "window": 5}, "gradient_clipping": "a"})
    assert message.startswith("4 problems in the config:\n")
    for start in ("sed: ", "fp16.hysteresis = 0: ", "fp16.window: ", "gradient_clipping = 'a': "):
        assert f"\n  {start}" in message


# Unknown keys


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("zero_optimization.stge", "unknown key; did you mean 'stage'?"),
        ("zero_optimization.offload_optimiser", "unknown key; did you mean 'offload_optimizer'?"),
        ("zero_optimization.offload_optimizer.devise", "unknown key; did you mean 'device'?"),
        ("zero_optimization.offload_param.zzz", "unknown key; valid keys of zero_optimization.offload_param are dev"),
        ("activation_checkpointing.clases", "unknown key; did you mean 'classes'?"),
        ("offload_param", "unknown key here; did you mean 'zero_optimization.offload_param'?"),
        ("zero_optimisation", "unknown key; did you mean 'zero_optimization'?"),
        ("Train_Batch_Size", "unknown key; did you mean 'train_batch_size'?"),
        ("fp16.loss_scale_windw", "unknown key; did you mean 'loss_scale_window'?"),
        ("data_types.grad_acum_dtype", "unknown key; did you mean 'grad_accum_dtype'?"),
        ("stage", "unknown key here; did you mean 'zero_optimization.stage'?"),
        ("fp16.gradient_clipping", "unknown key here; did you mean 'gradient_clipping'?"),
        ("bf16.zzz", "unknown key; valid keys of bf16 are enabled"),
        ("zzz", "unknown key; valid keys here are train_batch_size, "),
    ],
)
def test_unknown_key_names_the_nearest_or_all(key: str, answer: str) -> None:
    message = message_for(nested(key, 1))
    assert message.startswith("1 problem")
    assert f"\n  {key}: {answer}" in message


@pytest.mark.parametrize("key", ["optimizer.parms", "scheduler.prams"])
def test_unknown_key_in_an_optional_section(key: str) -> None:
    section = key.split(".")[0]
    assert f"{key}: unknown key; did you mean 'params'?" in message_for({section: {"type": "A", key.split(".")[1]: {}}})


def test_own_keys_are_marked() -> None:
    own = {
        join(path, key)
        for path, section in all_sections()
        for key, field in section.model_fields.items()
        if any(isinstance(note, OwnKey) for note in field.metadata)
    }
    assert own == {
        "activation_checkpointing.classes",
        "activation_checkpointing.enabled",
        "bf16.master_weights",
        *(f"checkpoint.{key}" for key in CheckpointConfig.model_fields),
        *(f"checkpoint.encryption.{key}" for key in EncryptionConfig.model_fields),
        "comm",
        "max_consecutive_skipped_steps",
        "monitor",
        *(f"monitor.{key}" for key in MonitorConfig.model_fields),
        "pipeline.chunks",
        "pipeline.schedule",
        "seed",
        "trace",
        *(f"trace.{key}" for key in TraceConfig.model_fields),
        "zero_optimization.offload_optimizer.threads",
        "zero_optimization.overlap_gather",
        "zero_optimization.unit_classes",
    }
