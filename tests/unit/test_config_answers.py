"""The configuration: the three answers (works, noted, refused), one for every key and value of DeepSpeed's."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from config_messages import message_for, nested
from partita.config import Answer, answers_to, clean_form, load_config
from partita.config.answers import Case
from partita.config.deepspeed_keys import RULES, rule_of
from partita.config.document import config_markdown
from partita.config.parameters import OPTIMIZERS, REFUSED_OPTIMIZERS
from partita.config.sections import all_sections, join
from partita.config.sort_out import case_of

# Facts: the keys that DeepSpeed 0.19.8 reads, in all sections.
DEEPSPEED_KEYS = (Path(__file__).parent / "deepspeed-0.19.8-keys.txt").read_text(encoding="utf-8").split()
OWN_KEYS = {join(path, key) for path, section in all_sections() for key in section.model_fields}
PARAMETERS = {
    f"optimizer.params.{key}" for native in OPTIMIZERS.values() for key in {**native.parameters, **native.rules}
}

# With these beside it, the value of a key is valid.
COMPANIONS: dict[str, dict[str, Any]] = {
    "zero_optimization.offload_param": {"stage": 3},
    "zero_optimization.offload_optimizer": {"stage": 2},
    "zero_optimization.cpu_offload": {"stage": 2},
    "zero_optimization.cpu_offload_param": {"stage": 3},
}


def config_with(key: str, value: Any) -> dict[str, Any]:
    """A config that is valid but for this key."""
    source = nested(key, value)
    for start, companions in COMPANIONS.items():
        if key.startswith(start):
            source["zero_optimization"] |= companions
    if key.startswith("optimizer."):
        source["optimizer"] = {"type": "AdamW", **source["optimizer"]}
    return source


def test_there_are_keys_of_deepspeed_to_look_at() -> None:
    assert len(DEEPSPEED_KEYS) == len(set(DEEPSPEED_KEYS)) > 350


@pytest.mark.parametrize("key", DEEPSPEED_KEYS)
def test_every_key_of_deepspeed_has_an_answer(key: str) -> None:
    is_section = any(rule.startswith(f"{key}.") for rule in RULES)
    assert key in OWN_KEYS or key in PARAMETERS or rule_of(key) or is_section, key


def test_no_key_has_an_answer_that_deepspeed_and_its_users_never_write() -> None:
    """A rule for a key that is misspelled would answer nothing."""
    of_old_versions = {
        "bf16.check_overflow",
        "ddp_bf16",
        "zero_optimization.cpu_offload_params",
    }
    of_users = {"comms_config", "fp8", "log", "monitor_config", "fp32_allreduce"}
    assert set(RULES) - set(DEEPSPEED_KEYS) <= of_old_versions | of_users


CASES = [
    pytest.param(key, case, value, id=f"{key}={value!r}")
    for key, rule in RULES.items()
    for case in rule
    for value in case.values.examples
    if case_of(rule, value) is case  # a later case only gets what earlier ones leave
]


def test_every_case_has_an_example() -> None:
    shown = {(key, id(case)) for key, case, _ in (each.values for each in CASES)}
    assert shown == {(key, id(case)) for key, rule in RULES.items() for case in rule}


@pytest.mark.parametrize(("key", "case", "value"), CASES)
def test_a_value_gets_its_answer(key: str, case: Case, value: Any) -> None:
    """Noted: listed with the reason, and without an effect on other keys. Refused: names the way out."""
    source = config_with(key, value)
    if case.answer is Answer.REFUSED:
        assert f"{key} = {value!r}" in message_for(source)
        assert case.reason in message_for(source)
        return
    config = load_config(source)
    notes = {note.key: note for note in config.ignored}
    if case.answer is Answer.NOTED:
        assert (notes[key].value, notes[key].reason) == (value, case.reason)
        assert notes[key].reason
    else:
        assert key not in notes
    if not case.becomes:
        without = config_with(key, value)
        section = without
        *path, name = key.split(".")
        for part in path:
            section = section[part]
        del section[name]
        assert config.model_dump() == load_config(without).model_dump()


@pytest.mark.parametrize("name", REFUSED_OPTIMIZERS)
def test_an_optimizer_that_is_not_there_is_refused_by_name(name: str) -> None:
    message = message_for({"optimizer": {"type": name.title(), "params": {"lr": 1e-3, "freeze_step": 10}}})
    assert message.startswith("1 problem")
    assert f"optimizer.type = {name.title()!r}: {REFUSED_OPTIMIZERS[name]}" in message


# Other ways to write a key


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"bfloat16": {"enabled": True}}, {"bf16": {"enabled": True}}),
        ({"fp32_allreduce": True}, {"communication_data_type": "fp32"}),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload": True}},
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        ),
        (
            {"zero_optimization": {"stage": 3, "cpu_offload": True, "cpu_offload_param": True}},
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "cpu"},
                    "offload_param": {"device": "cpu"},
                }
            },
        ),
        (
            {"zero_optimization": {"stage": 3, "prefetch_bucket_size": 1e6, "max_live_parameters": 0}},
            {
                "zero_optimization": {
                    "stage": 3,
                    "stage3_prefetch_bucket_size": 1_000_000,
                    "stage3_max_live_parameters": 0,
                }
            },
        ),
        (
            {"zero_optimization": {"param_persistence_threshold": 5}},
            {"zero_optimization": {"stage3_param_persistence_threshold": 5}},
        ),
        (
            {"amp": {"enabled": True, "opt_level": "O1"}},
            {"torch_autocast": {"enabled": True, "dtype": "float16"}},
        ),
        (
            {"fp16": {"enabled": True, "initial_scale_power": 32}},
            {"fp16": {"enabled": True, "initial_scale_power": 24}},
        ),
        ({"steps_per_print": float("inf")}, {"steps_per_print": None}),
        ({"steps_per_print": 1e5, "seed": 2.0}, {"steps_per_print": 100_000, "seed": 2}),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "cpu"},
                    "offload_param": {"device": "cpu"},
                }
            },
        ),
    ],
)
def test_a_key_may_be_written_in_another_way(written: dict[str, Any], meant: dict[str, Any]) -> None:
    assert load_config(written).model_dump() == load_config(meant).model_dump()
    assert load_config(clean_form(written)).model_dump() == load_config(meant).model_dump()
    assert load_config(clean_form(written)).ignored == ()


@pytest.mark.parametrize(
    ("key", "value", "other", "other_value"),
    [
        ("bfloat16.enabled", True, "bf16.enabled", False),
        ("fp32_allreduce", True, "communication_data_type", "fp16"),
        ("zero_optimization.cpu_offload", True, "zero_optimization.offload_optimizer.device", "none"),
        ("zero_optimization.prefetch_bucket_size", 5, "zero_optimization.stage3_prefetch_bucket_size", 6),
    ],
)
@pytest.mark.parametrize("first", [0, 1])
def test_two_ways_that_contradict_each_other_are_refused(
    key: str, value: Any, other: str, other_value: Any, first: int
) -> None:
    parts = [nested(key, value), nested(other, other_value)]
    source: dict[str, Any] = {}
    for part in (parts[first], parts[1 - first]):
        for name, section in part.items():
            source[name] = {**source[name], **section} if isinstance(section, dict) and name in source else section
    assert "says something else; keep one of them" in message_for(source)


def test_the_same_twice_is_no_contradiction() -> None:
    assert load_config({"fp32_allreduce": True, "communication_data_type": "fp32"}).communication_data_type == "fp32"


# Comments, unknown keys


@pytest.mark.parametrize("key", ["_comment", "//", "#", "$schema", "comment", "Comments", "zero_optimization._why"])
def test_a_comment_is_noted(key: str) -> None:
    (note,) = load_config(nested(key, "see the wiki")).ignored
    assert (note.key, note.reason) == (key, "a comment")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("flops_profilr", "did you mean 'flops_profiler'?"),
        ("zero_optimization.subgroup_size", "did you mean 'sub_group_size'?"),
        ("checkpoint.tag_validatio", "did you mean 'tag_validation'?"),
        ("checkpoint.zzz", "unknown key; valid keys of checkpoint are "),
    ],
)
def test_a_misspelled_key_of_deepspeed_is_unknown(key: str, words: str) -> None:
    message = message_for(nested(key, 1))
    assert message.startswith("1 problem")
    assert f"{key}: unknown key; " in message
    assert words in message


# The answers to a whole config, and the clean form

MIXED: dict[str, Any] = {
    "_comment": "from an old run",
    "train_batch_size": "auto",
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "adamw", "params": {"lr": "auto", "eps": 1e-6, "torch_adam": True}},
    "zero_optimization": {
        "stage": 2,
        "cpu_offload": True,
        "reduce_bucket_size": 5e8,
        "sub_group_size": 1e9,
        "zero_quantized_gradients": True,
        "allgather_bucket_size": 0,
    },
    "autotuning": {"enabled": False, "fast": True},
}


def test_answers_to_a_config_come_in_its_order() -> None:
    found = [(finding.key, finding.answer.value) for finding in answers_to(MIXED)]
    assert found == [
        ("_comment", "noted"),
        ("train_batch_size", "noted"),
        ("bf16.enabled", "noted"),
        ("optimizer.type", "works"),
        ("optimizer.params.lr", "noted"),
        ("optimizer.params.eps", "works"),
        ("optimizer.params.torch_adam", "noted"),
        ("zero_optimization.stage", "works"),
        ("zero_optimization.cpu_offload", "works"),
        ("zero_optimization.reduce_bucket_size", "works"),
        ("zero_optimization.sub_group_size", "noted"),
        ("zero_optimization.zero_quantized_gradients", "refused"),
        ("zero_optimization.allgather_bucket_size", "noted"),
        ("autotuning", "noted"),
    ]
    assert all(finding.reason for finding in answers_to(MIXED))


def test_the_clean_form_has_own_keys_only_and_keeps_what_waits_for_a_model() -> None:
    source = {**MIXED, "zero_optimization": {**MIXED["zero_optimization"], "zero_quantized_gradients": False}}
    clean = clean_form(source)
    assert clean == {
        "train_batch_size": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "adamw", "params": {"eps": 1e-6}},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 500_000_000},
    }
    assert load_config(clean).model_dump() == load_config(source).model_dump()
    assert load_config(clean).open_keys == {"train_batch_size", "bf16.enabled"}


def test_the_source_stays_as_it_is() -> None:
    source = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {}}}
    load_config(source), clean_form(source)
    assert source == {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {}}}


# Documents


def test_the_document_lists_every_case() -> None:
    text = config_markdown()
    works, noted, refused = (text.index(f"\n### {name}\n") for name in ("Works", "Noted", "Refused"))
    parts = {Answer.WORKS: text[works:noted], Answer.NOTED: text[noted:refused], Answer.REFUSED: text[refused:]}
    for key, case in itertools.chain.from_iterable(((key, case) for case in rule) for key, rule in RULES.items()):
        assert f"| `{key}` | {case.values.words} | {case.reason} |" in parts[case.answer]
    for key in OWN_KEYS - {path for path, _ in all_sections()}:
        assert f"`{key}`" in parts[Answer.WORKS]
    for name in REFUSED_OPTIMIZERS:
        assert f"`{name}`" in parts[Answer.REFUSED]
