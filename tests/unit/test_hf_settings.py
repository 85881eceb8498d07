"""The engine's config from a config and from arguments of Hugging Face: what is filled in, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from partita.config import ConfigError, load_config
from partita.integrations import huggingface
from partita.integrations.huggingface.settings import Asked, Said, engine_config, precision_in, read_config


def asked(world: int = 2, precision: str | None = "no", **values: Any) -> Asked:
    """By a trainer: micro-batches of 4, accumulation of 3, a bound of 1, unless `values` say otherwise."""
    said = {
        name: None if value is None else Said(f"{name} of the program", value)
        for name, value in {"micro_batch": 4, "accumulation": 3, "clipping": 1.0, **values}.items()
    }
    return Asked(world, precision=None if precision is None else Said("precision of the program", precision), **said)


AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


@pytest.mark.parametrize("config", [{}, AUTO, {"train_batch_size": 24, "gradient_accumulation_steps": 3}])
def test_what_the_config_leaves_out_the_arguments_say(config):
    """The engine's step has one micro-batch; sums over micro-batches are fp32; the program's log is the only one."""
    made = engine_config(config, asked())
    assert made == {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 0,
    }
    load_config(made)


def test_what_the_config_says_stays():
    given = {
        "data_types": {"grad_accum_dtype": "bf16"},
        "steps_per_print": 5,
        "zero_optimization": {"stage": 3},
        "gradient_clipping": 0.5,
    }
    made = engine_config(given, asked(clipping=None))
    assert made == {**given, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}
    assert given == {key: made[key] for key in given}, "the program's dict is its own"
    assert "data_types" not in engine_config({}, asked(accumulation=1))


def test_a_whole_batch_is_divided():
    made = engine_config({"train_batch_size": 30}, asked(micro_batch=None))
    assert made["train_micro_batch_size_per_gpu"] == 5
    assert "train_micro_batch_size_per_gpu" not in engine_config({}, asked(micro_batch=None))


@pytest.mark.parametrize(
    ("config", "given", "names"),
    [
        ({"gradient_clipping": 0.5}, {}, ["gradient_clipping = 0.5", "clipping of the program = 1.0"]),
        (
            {"gradient_accumulation_steps": 2},
            {},
            ["gradient_accumulation_steps = 2", "accumulation of the program = 3"],
        ),
        ({"train_micro_batch_size_per_gpu": 2}, {}, ["per_gpu = 2", "micro_batch of the program = 4"]),
        ({"train_batch_size": 8}, {}, ["train_batch_size = 8", "micro_batch of the program", "2 ranks = 24"]),
        ({"train_batch_size": 8}, {"micro_batch": None}, ["train_batch_size = 8", "multiple of 6"]),
        ({"bf16": {"enabled": True}}, {}, ["bf16.enabled is true", "precision of the program = 'no'"]),
        ({"fp16": {"enabled": True}}, {"precision": "bf16"}, ["fp16.enabled is true", "'bf16'"]),
        ({"bf16": {"enabled": False}}, {"precision": "bf16"}, ["bf16.enabled is false", "'bf16'"]),
        ({}, {"precision": "fp8"}, ["precision of the program = 'fp8'", "fp32, fp16 and bf16"]),
        ({"checkpoint": {"dir": "runs"}}, {}, ["checkpoint.dir", "leave it out"]),
        ({"scheduler": {"type": "WarmupLR"}}, {}, ["scheduler is in the config"]),
    ],
)
def test_contradictions_name_both_sides(config, given, names):
    with pytest.raises(ConfigError) as raised:
        engine_config(config, asked(**given))
    for name in names:
        assert name in str(raised.value)


@pytest.mark.parametrize(
    ("config", "precision", "enabled"),
    [
        ({}, "bf16", "bf16"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, "bf16", "bf16"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, "no", None),
        ({"fp16": {"loss_scale": 8.0}}, "fp16", "fp16"),
        ({"bf16": {"enabled": True, "master_weights": "split"}}, None, "bf16"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "bf16", "torch_autocast"),
    ],
)
def test_the_precision_is_the_programs_by_the_way_that_the_config_names(config, precision, enabled):
    made = load_config(engine_config(config, asked(precision=precision)))
    names = ("fp16", "bf16", "torch_autocast")
    assert [name for name in names if getattr(made, name).enabled] == ([] if enabled is None else [enabled])
    assert made.fp16.loss_scale == config.get("fp16", {}).get("loss_scale", 0.0)
    if enabled is not None and precision is not None:
        assert precision_in(engine_config(config, asked(precision=precision))) == precision


def test_a_config_may_be_a_file_or_a_checked_one(tmp_path: Path):
    config = {"zero_optimization": {"stage": 2}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path / "config.json") == read_config(config) == config
    assert read_config(load_config(config)) == config
    assert read_config(None) == {}
    with pytest.raises(ConfigError, match="got a int"):
        read_config(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["PartitaAccelerator", "PartitaTrainer", "PartitaMixin"])
def test_a_missing_library_is_named_with_what_installs_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=f"{name} needs accelerate: pip install accelerate"):
        getattr(huggingface, name)
