"""The configuration: what it is read from (dict, JSON with comments, YAML, base64), and "auto" in it."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from config_messages import message_for, nested
from partita.config import Config, Given, load_config, resolve_auto

CONTENT: dict[str, Any] = {
    "train_batch_size": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.95]}},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 500_000_000},
    "bf16": {"enabled": True},
}

WITH_COMMENTS = """// for 8 GPUs
{
  "train_batch_size": 8,  # over all ranks
  /* "train_batch_size": 16,
     "sed": 1, */
  "optimizer": {
    "type": "AdamW",
    "params": {"lr": 3e-4, "betas": [0.9, 0.95,], },
  },
  "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8},
  "bf16": {"enabled": true},
}
# the end, without a line break"""

YAML = """\
# for 8 GPUs
train_batch_size: 8
optimizer:
  type: AdamW
  params: {lr: 3e-4, betas: [0.9, 0.95]}
zero_optimization:
  stage: 2
  reduce_bucket_size: 5e8
bf16:
  enabled: true
"""


def in_base64(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(CONTENT)),
        ("a.json", WITH_COMMENTS),
        ("a.hjson", WITH_COMMENTS),
        ("a", WITH_COMMENTS),
        ("a.yaml", YAML),
        ("a.YML", YAML),
        ("a.yml", json.dumps(CONTENT)),
    ],
)
def test_a_file_may_be_json_with_comments_or_yaml(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert load_config(tmp_path / name) == load_config(CONTENT)
    assert load_config(str(tmp_path / name)) == load_config(CONTENT)


@pytest.mark.parametrize("text", [json.dumps(CONTENT), WITH_COMMENTS.partition("\n")[2], "\n" + json.dumps(CONTENT)])
@pytest.mark.parametrize("padded", [True, False])
def test_a_config_may_be_base64(text: str, padded: bool) -> None:
    """As DeepSpeed's launcher passes it, and as shells shorten it."""
    encoded = in_base64(text)
    assert load_config(encoded if padded else encoded.rstrip("=")) == load_config(CONTENT)


def test_url_safe_letters_are_read() -> None:
    text = json.dumps({"_comment": "\u00fb\u00ff?>~\u00bf"}, ensure_ascii=False)
    assert set("-_") & set(in_base64(text))
    assert load_config(in_base64(text)).ignored[0].value == "\u00fb\u00ff?>~\u00bf"


def test_an_error_in_base64_names_the_key_and_not_the_text() -> None:
    encoded = in_base64('{"sed": 1}')
    message = message_for(encoded)
    assert "1 problem in the config in base64" in message
    assert encoded not in message
    assert "written more than once: seed" in message_for(in_base64('{"seed": 1, "seed": 2}'))
    assert "the config in base64: not valid JSON" in message_for(in_base64('{"seed": }'))


def test_a_file_comes_before_base64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = in_base64('{"seed": 1}')
    Path(name).write_text('{"seed": 2}')
    assert load_config(name).seed == 2


@pytest.mark.parametrize("name", ["config", "configs/zero2", "x" * 5000, "abcd", in_base64("[1]")])
def test_what_is_neither_a_file_nor_base64_is_a_missing_file(name: str) -> None:
    message = message_for(name)
    assert "there is no such config file" in message or "cannot be read as a config file" in message


@pytest.mark.parametrize(
    "text", ['{"a": "// no comment"}', '{"a": "# none, }"}', r'{"a": "\" /* none */"}', '{"a": ",]"}']
)
def test_strings_keep_what_looks_like_a_comment(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"_comment": json.loads(text)["a"]}))
    assert load_config(tmp_path / "a.json").ignored[0].value == json.loads(text)["a"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", '{"seed": 1, // "\n "seed": 2}', "written more than once: seed"),
        ("a.json", '{\n// x\n"seed" 1}', "not valid JSON at line 3, column 8"),
        ("a.json", '{"seed": 1 /* open', "not valid JSON at line 1, column 12"),
        ("a.yaml", "seed: 1\nseed: 2\n", "written more than once: seed"),
        ("a.yaml", "fp16: {enabled: true, enabled: true}", "written more than once: fp16.enabled"),
        ("a.yaml", "seed: [", "not valid YAML"),
        ("a.yaml", "- 1", "the top level is a list"),
        ("a.yaml", "? [1, 2]\n: 3", "a key is a list or an object"),
        ("a.yaml", "seed: .nan", "seed = nan: expected an integer >= 0"),
        ("a.yaml", "a: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_a_bad_file_is_named_with_the_reason(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    message = message_for(tmp_path / name)
    assert str(tmp_path / name) in message
    assert words in message


def test_without_pyyaml_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.yaml").write_text(YAML)
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert "pip install 'partita[yaml]'" in message_for(tmp_path / "a.yaml")


# "auto"

AUTO_KEYS = {
    "gradient_clipping": "is 0.0, the default",
    "zero_optimization.reduce_bucket_size": "is null, the default: the size follows the kind of device",
    "zero_optimization.stage3_prefetch_bucket_size": "is 8388608, the default",
    "zero_optimization.stage3_max_live_parameters": "is 1000000000, the default",
    "zero_optimization.offload_optimizer.device": "is 'none', the default",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "always write whole weights",
    "zero_optimization.sub_group_size": "needs no tiles",
    "fp16.loss_scale": "is 0.0, the default",
    "communication_data_type": "is None, the default",
}


@pytest.mark.parametrize("key", AUTO_KEYS)
def test_auto_is_the_default_and_noted(key: str) -> None:
    config = load_config(nested(key, "auto"))
    assert config.model_dump() == Config().model_dump()
    (note,) = config.ignored
    assert (note.key, note.value) == (key, "auto")
    assert AUTO_KEYS[key] in note.reason


def test_auto_names_nothing() -> None:
    assert "optimizer.type = 'auto': write a name: AdamW, Adam" in message_for({"optimizer": {"type": "auto"}})
    assert "scheduler.type = 'auto': write a name: WarmupLR" in message_for({"scheduler": {"type": "auto"}})
    assert "zero_quantized: unknown key" in message_for({"zero_quantized": "auto"})


def reasons(config: Config) -> dict[str, str]:
    return {note.key: note.reason for note in config.ignored}


@pytest.mark.parametrize("compute", ["fp16", "bf16", None])
@pytest.mark.parametrize("given", ["fp16", "bf16", "both"])
def test_precision_follows_the_model(compute: str | None, given: str) -> None:
    names = ["fp16", "bf16"] if given == "both" else [given]
    config = resolve_auto(load_config({name: {"enabled": "auto"} for name in names}), Given(compute=compute))
    assert {name for name in ("fp16", "bf16") if getattr(config, name).enabled} == set(names) & {compute}
    for name in names:
        assert reasons(config)[f"{name}.enabled"].startswith("is true" if name == compute else "is false")
    assert not config.open_keys


@pytest.mark.parametrize(
    "other", [{"bf16": {"enabled": True}}, {"torch_autocast": {"enabled": True}}], ids=["bf16", "autocast"]
)
def test_a_type_that_the_config_enables_leaves_nothing_to_the_model(other: dict[str, Any]) -> None:
    config = resolve_auto(load_config({"fp16": {"enabled": "auto"}, **other}), Given(compute="fp16"))
    assert not config.fp16.enabled
    assert reasons(config)["fp16.enabled"].endswith(" is enabled")


SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@pytest.mark.parametrize(
    ("sizes", "micro_batch", "expected"),
    [
        (("auto", "auto", "auto"), None, (None, None, None)),
        (("auto", "auto", "auto"), 4, (None, 4, None)),
        (("auto", "auto", 2), 4, (None, 4, 2)),
        ((16, "auto", "auto"), 4, (16, 4, None)),
        ((16, "auto", 2), 4, (16, None, 2)),  # nothing is left to the loader
        (("auto", 3, "auto"), 4, (None, 3, None)),
    ],
)
def test_batch_sizes_follow_from_the_data_loader(sizes: Any, micro_batch: int | None, expected: Any) -> None:
    config = resolve_auto(load_config(dict(zip(SIZES, sizes, strict=True))), Given(micro_batch=micro_batch))
    assert tuple(getattr(config, name) for name in SIZES) == expected
    assert reasons(config).keys() == {name for name, size in zip(SIZES, sizes, strict=True) if size == "auto"}


def test_a_batch_size_that_stays_open_says_so() -> None:
    config = resolve_auto(load_config(dict.fromkeys(SIZES, "auto")), Given())
    assert reasons(config)["train_micro_batch_size_per_gpu"].startswith("is 1: nothing says how many samples")


def test_what_the_program_gives_takes_the_place_of_the_configs() -> None:
    source = {
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "fused": True}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}},
    }
    config = resolve_auto(load_config(source), Given(optimizer="a SGD", scheduler="a function that makes one"))
    assert reasons(config) == {
        "optimizer": "the program gives a SGD, which is taken",
        "scheduler": "the program gives a function that makes one, which is taken",
    }
    assert not any(note.warns for note in config.ignored)
