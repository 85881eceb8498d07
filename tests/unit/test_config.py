"""The configuration: its surface, what it accepts, the files that it is read from and the documents made from it."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import partita.config
import pytest
from config_messages import message_for
from partita.config import Config, default_config, load_config, save_config
from partita.config.document import MARKDOWN_NAME, SCHEMA_NAME, config_markdown, write_documents
from partita.config.sections import all_sections, join
from pydantic import ValidationError

REPOSITORY = Path(__file__).parents[2]

DEFAULTS: dict[str, Any] = {
    "train_batch_size": None,
    "train_micro_batch_size_per_gpu": None,
    "gradient_accumulation_steps": None,
    "optimizer": None,
    "scheduler": None,
    "fp16": {
        "enabled": False,
        "loss_scale": 0.0,
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "consecutive_hysteresis": False,
        "min_loss_scale": 1.0,
    },
    "bf16": {"enabled": False, "master_weights": "fp32"},
    "torch_autocast": {"enabled": False, "dtype": "bfloat16"},
    "zero_optimization": {
        "stage": 0,
        "unit_classes": None,
        "stage3_prefetch_bucket_size": 8_388_608,
        "stage3_param_persistence_threshold": 10_000,
        "stage3_max_live_parameters": 1_000_000_000,
        "reduce_bucket_size": None,
        "allgather_bucket_size": None,
        "overlap_comm": True,
        "overlap_gather": False,
        "reduce_scatter": True,
        "offload_optimizer": {"device": "none", "pin_memory": True, "ratio": 1.0, "threads": None},
        "offload_param": {"device": "none", "pin_memory": True},
        "contiguous_gradients": True,
    },
    "activation_checkpointing": {"enabled": False, "classes": None, "cpu_checkpointing": False},
    "checkpoint": {
        "dir": None,
        "interval_steps": None,
        "interval_minutes": None,
        "keep_last": None,
        "async_save": False,
        "resume": "auto",
        "fallback": False,
        "verify": False,
        "encryption": None,
        "group_access": False,
    },
    "pipeline": {"schedule": "1f1b", "chunks": None, "activation_checkpoint_interval": 0},
    "monitor": {
        "dir": None,
        "interval_steps": 1,
        "progress": "auto",
        "tokens_per_sample": None,
        "flops": True,
        "peak_tflops": None,
    },
    "tensorboard": {"enabled": False, "output_path": "", "job_name": "DeepSpeedJobName"},
    "csv_monitor": {"enabled": False, "output_path": "", "job_name": "DeepSpeedJobName"},
    "wandb": {"enabled": False, "group": None, "team": None, "project": "deepspeed"},
    "comet": {
        "enabled": False,
        "samples_log_interval": 100,
        "project": None,
        "workspace": None,
        "api_key": None,
        "experiment_name": None,
        "experiment_key": None,
        "online": None,
        "mode": None,
    },
    "gradient_clipping": 0.0,
    "communication_data_type": None,
    "comm": {"transport": "auto", "timeout_seconds": 600.0},
    "data_types": {"grad_accum_dtype": None, "buffer_dtype": None},
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "steps_per_print": 10,
    "wall_clock_breakdown": False,
    "memory_breakdown": False,
    "flops_profiler": {
        "enabled": False,
        "profile_step": 1,
        "module_depth": -1,
        "top_modules": 1,
        "detailed": True,
        "output_file": None,
        "recompute_fwd_factor": 0.0,
    },
    "comms_logger": {"enabled": False, "verbose": False, "prof_all": True, "prof_ops": [], "debug": False},
    "trace": None,
    "sync_buffers": True,
    "dump_state": False,
    "seed": 1234,
    "max_consecutive_skipped_steps": 100,
}

CPU = {"device": "cpu"}

FULL: dict[str, Any] = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}},
    "fp16": {"enabled": True, "initial_scale_power": 24, "min_loss_scale": 0.5},
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": 5e8,
        "unit_classes": ["Block"],
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 1e5,
        "offload_optimizer": {"device": "cpu", "pin_memory": False, "ratio": 1, "threads": 8},
        "offload_param": {"device": "cpu"},
    },
    "activation_checkpointing": {"enabled": True, "classes": ["Block", "Head"], "cpu_checkpointing": True},
    "checkpoint": {
        "dir": "runs/one",
        "interval_steps": 1e3,
        "interval_minutes": 30,
        "keep_last": 3,
        "resume": "best",
        "fallback": True,
        "encryption": {"key_file": "key"},
    },
    "pipeline": {"schedule": "interleaved", "chunks": 2, "activation_checkpoint_interval": 1.0},
    "monitor": {"dir": "runs/one", "interval_steps": 5, "progress": "lines", "peak_tflops": 989},
    "tensorboard": {"enabled": True, "output_path": "logs"},
    "csv_monitor": {"enabled": True, "job_name": "one"},
    "wandb": {"enabled": True, "group": "g", "team": "t"},
    "comet": {"enabled": True, "mode": "create", "online": False},
    "flops_profiler": {"enabled": True, "profile_step": 5.0, "output_file": "flops.txt", "recompute_fwd_factor": 1},
    "comms_logger": {"enabled": True, "prof_all": False, "prof_ops": ["all_reduce"]},
    "memory_breakdown": True,
    "trace": {"steps": [10, 12], "path": "trace.json"},
    "gradient_clipping": 1,
    "communication_data_type": "float32",
    "data_types": {"grad_accum_dtype": "bfloat16"},
    "prescale_gradients": True,
    "gradient_predivide_factor": 2.0,
    "steps_per_print": None,
}

# Surface


def test_defaults_are_frozen_by_this_table() -> None:
    assert default_config() == DEFAULTS
    assert load_config(None) == load_config({}) == load_config(DEFAULTS) == Config()


def test_default_config_belongs_to_the_caller() -> None:
    default_config()["fp16"]["enabled"] = True
    assert default_config() == DEFAULTS


def test_config_cannot_be_changed() -> None:
    config = load_config(None)
    with pytest.raises(ValidationError):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        config.fp16.enabled = True  # type: ignore[misc]


def test_config_does_not_follow_later_changes_of_its_source() -> None:
    source = {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}}
    config = load_config(source)
    source["optimizer"]["params"]["betas"][0] = 0.0  # type: ignore[index]
    assert config.optimizer is not None
    assert config.optimizer.params == {"betas": [0.9, 0.95]}


def test_every_key_has_a_description() -> None:
    for path, section in all_sections():
        for key, field in section.model_fields.items():
            assert field.description, join(path, key)


def test_package_imports_neither_torch_nor_the_rest_of_partita() -> None:
    folder = Path(partita.config.__file__).parent
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file.name}: relative import"
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] != "torch", file.name
                assert not name.startswith("partita") or name.startswith(("partita.config", "partita.files")), name


# Accepted


def test_spellings_and_number_forms_are_normalised() -> None:
    config = load_config(FULL)
    assert config.zero_optimization.reduce_bucket_size == 500_000_000
    assert isinstance(config.zero_optimization.reduce_bucket_size, int)
    assert isinstance(config.gradient_clipping, float)
    assert (config.communication_data_type, config.data_types.grad_accum_dtype) == ("fp32", "bf16")
    assert load_config({"torch_autocast": {"dtype": "fp16"}}).torch_autocast.dtype == "float16"


def test_config_is_returned_as_it_is() -> None:
    config = load_config(FULL)
    assert load_config(config) is config


@pytest.mark.parametrize("source", [{}, FULL], ids=["defaults", "full"])
def test_saved_config_loads_to_an_equal_one(tmp_path: Path, source: dict[str, Any]) -> None:
    config = load_config(source)
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config
    assert load_config(str(tmp_path / "config.json")) == config
    assert json.loads((tmp_path / "config.json").read_text()).keys() == DEFAULTS.keys()


@pytest.mark.parametrize(
    "source",
    [
        {"fp16": {"enabled": True}, "bf16": {"enabled": False}},
        {"fp16": {"loss_scale": 128, "min_loss_scale": 1e9}},  # a fixed scale has no minimum
        {"fp16": {"initial_scale_power": 0, "min_loss_scale": 1}},
        {"steps_per_print": 0},
        {"prescale_gradients": True, "gradient_predivide_factor": 0.5},
        *({"zero_optimization": {"stage": s, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}} for s in (1, 2, 3)),
        {"zero_optimization": {"offload_optimizer": {"device": "none", "ratio": 0.5, "pin_memory": False}}},
        {"activation_checkpointing": {"enabled": True, "classes": []}},
        {"activation_checkpointing": {"enabled": False, "classes": None}},
        {"checkpoint": {"resume": "never", "async_save": True, "verify": True, "group_access": True}},
        {"checkpoint": {"dir": "d"}},  # saved when a signal asks for it
        {"checkpoint": {"encryption": {"key_env": "KEY"}}},
    ],
)
def test_valid_combinations(source: dict[str, Any]) -> None:
    load_config(source)


# Files


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'{\n  "seed": 1,,\n}', ["not valid JSON at line 3, column 1"]),
        (b"", ["not valid JSON at line 1, column 1"]),
        (b"[1, 2]", ["the top level is a list; expected an object"]),
        (b"null", ["the top level is a NoneType; expected an object"]),
        (b'{"seed": 1, "seed": 2}', ["written more than once: seed"]),
        (b'{"fp16": {"enabled": true, "enabled": true}}', ["written more than once: fp16.enabled"]),
        (b'{"gradient_clipping": NaN}', ["NaN is not a JSON number"]),
        (b'{"gradient_clipping": -Infinity}', ["-Infinity is not a JSON number"]),
        (b'{"gradient_clipping": 1e999}', ["gradient_clipping = inf: expected a number >= 0"]),
        (b'{"sed": 1}', ["1 problem in", "sed: unknown key; did you mean 'seed'?"]),
        (b"\xff\xfe", ["not a text file in UTF-8"]),
        (b"[" * 100_000, ["not usable as JSON"]),
        (b'{"seed": ' + b"9" * 10_000 + b"}", ["not usable as JSON"]),
    ],
)
def test_bad_file_is_named_with_the_reason(tmp_path: Path, content: bytes, named: list[str]) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(content)
    message = message_for(path)
    for text in [str(path), *named]:
        assert text in message


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    assert "none.json: there is no such config file" in message_for(tmp_path / "none.json")
    assert str(tmp_path) in message_for(tmp_path)
    assert "cannot be read" in message_for("a\0b")


def test_file_with_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(b'\xef\xbb\xbf{"seed": 7}')
    assert load_config(path).seed == 7


# Documents


@pytest.mark.parametrize("name", [MARKDOWN_NAME, SCHEMA_NAME])
def test_committed_documents_are_current(tmp_path: Path, name: str) -> None:
    write_documents(tmp_path)
    committed = (REPOSITORY / "docs" / name).read_text(encoding="utf-8")
    assert committed == (tmp_path / name).read_text(encoding="utf-8"), "run: python -m partita.config.document docs"


def test_links_in_the_document_lead_to_its_headings() -> None:
    """GitHub's anchors: lower case, blanks to dashes, without punctuation."""
    text = config_markdown()
    anchors = {re.sub(r"[^\w-]", "", h.lower().replace(" ", "-")) for h in re.findall(r"^## (.*)$", text, re.MULTILINE)}
    links = re.findall(r"\]\(#([^)]*)\)", text)
    assert "zero_optimizationoffload_param" in links
    assert not set(links) - anchors
