"""The configuration: what optimizers and schedules take, checked when it is loaded, and the two meanings of Adam."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch
from config_messages import message_for
from partita.config import load_config
from partita.config.document import config_json_schema, config_markdown
from partita.config.parameters import OPTIMIZERS, REQUIRED, SCHEDULES, Factory
from partita.optim import FusedAdam, make_optimizer, make_scheduler
from partita.optim.schedules import LRRangeTest, OneCycle, WarmupCosineLR, WarmupDecayLR, WarmupLR
from torch import nn

CLASSES = {cls.__name__: cls for cls in (WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest)}


def signature_of(cls: type, *without: str) -> dict[str, Any]:
    """Parameter -> default, REQUIRED where there is none; tuples as JSON has them."""
    found = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if name not in without:
            default = parameter.default
            found[name] = (
                REQUIRED if default is parameter.empty else list(default) if type(default) is tuple else default
            )
    return found


def table_of(factory: Factory) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in factory.parameters.items()}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_table_of_a_schedule_is_its_signature(name: str) -> None:
    assert table_of(SCHEDULES[name]) == signature_of(CLASSES[name], "optimizer")
    assert SCHEDULES.keys() == CLASSES.keys()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_table_of_an_optimizer_is_its_signature(name: str) -> None:
    table = table_of(OPTIMIZERS[name])
    table.pop("adam_w_mode", None)
    assert table == signature_of(FusedAdam, "params", "decoupled_weight_decay")


VALUES: dict[str, tuple[list[Any], list[Any]]] = {
    # words -> values that are good, values that are not
    "a number >= 0": ([0, 1e-3, 2], [-1, "1", None, True, float("nan"), float("inf")]),
    "two numbers from 0, below 1": ([[0, 0.9], (0.5, 0.99)], [[0.9], [0.9, 1.0], 0.9, [0.9, "0.9"], None]),
    "true or false": ([True, False], [0, 1, "true", None]),
    "true or false, or null": ([True, False, None], [0, "true"]),
    "an integer >= 1": ([1, 1e3, 7.0], [0, 1.5, "1", True, None]),
    "an integer >= 0": ([0, 3], [-1, 0.5, True]),
    "an integer >= -1": ([-1, 5], [-2, None]),
    "an integer >= 0, or null": ([0, None], [-1, 0.5]),
    '"log" or "linear"': (["log", "linear"], ["Log", None, 1]),
    "a number from 0 to 1": ([0, 1, 0.5], [1.1, -0.1, True]),
    "a number >= 0, or a list with one for each param group": ([0.1, [0.1]], [[-1], "1", None]),
    "a number >= 0, or a list with one for each param group, or null": ([None, 0.1, [0.1]], [[None], -1]),
    "a number from 0, below 1, or a list with one for each param group": ([0.5, [0.5]], [1, [1.0]]),
}
PARAMETERS = [
    (section, name, key)
    for section, factories in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULES))
    for name, factory in factories.items()
    for key in factory.parameters
]


def named(section: str, name: str, **params: Any) -> dict[str, Any]:
    """A config that names an optimizer or a schedule; parameters that have no default have a good value."""
    factory = {"optimizer": OPTIMIZERS, "scheduler": SCHEDULES}[section][name]
    required = {k: VALUES[p.kind.words][0][-1] for k, p in factory.parameters.items() if p.default is REQUIRED}
    return {section: {"type": name, "params": {**required, **params}}}


@pytest.mark.parametrize(("section", "name", "key"), PARAMETERS)
def test_a_parameter_is_checked_when_the_config_is_loaded(section: str, name: str, key: str) -> None:
    kind = {"optimizer": OPTIMIZERS, "scheduler": SCHEDULES}[section][name].parameters[key].kind
    good, bad = VALUES[kind.words]
    mode = {"adam_w_mode": True} if (name, key) == ("Adam", "weight_decay") else {}
    for value in good:
        load_config(named(section, name, **{key: value, **mode}))
    for value in bad:
        message = message_for(named(section, name, **{key: value, **mode}))
        assert f"{section}.params.{key} = {value!r}: expected {kind.words}" in message


@pytest.mark.parametrize(("section", "name", "key"), PARAMETERS)
def test_a_good_value_builds(section: str, name: str, key: str) -> None:
    """What the check lets through, the classes take."""
    factory = {"optimizer": OPTIMIZERS, "scheduler": SCHEDULES}[section][name]
    params = named(section, name)[section]["params"]
    params[key] = VALUES[factory.parameters[key].kind.words][0][-1]
    parameters = [nn.Parameter(torch.zeros(3))]
    if section == "optimizer":
        make_optimizer(
            name, {"weight_decay": 0, **params, **({"adam_w_mode": False} if name == "Adam" else {})}, parameters
        )
    else:
        beside = {"warmup_num_steps": 1, "warmup_max_lr": 5.0, "cycle_min_mom": 0.5}  # so that a bound is above another
        params |= {k: v for k, v in beside.items() if k in factory.parameters and k != key}
        if "total_num_steps" in params:
            params["total_num_steps"] = 10_000
        optimizer = FusedAdam(parameters, lr=10.0)
        if key == "last_batch_iteration":
            optimizer.param_groups[0]["initial_lr"] = 10.0
        make_scheduler(name, params, optimizer)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"bias_corection": True}, ["bias_corection", "did you mean"]),
        ({"momentum": 0.9}, ["AdamW has no parameter 'momentum'"]),
        ({"amsgrad": True}, ["amsgrad = True", "torch.optim"]),
        ({"max_grad_norm": 1.0}, ["max_grad_norm = 1.0", "gradient_clipping"]),
        ({"freeze_step": 3}, ["freeze_step = 3", "remove it"]),
        ({"fp32_optimizer_states": False}, ["fp32_optimizer_states = False", "always fp32"]),
    ],
)
def test_a_parameter_that_is_not_there_is_refused_when_the_config_is_loaded(params: Any, words: list[str]) -> None:
    """F53."""
    message = message_for({"optimizer": {"type": "AdamW", "params": params}})
    assert message.startswith("1 problem")
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "params",
    [{"torch_adam": True}, {"fused": None}, {"foreach": False}, {"amsgrad": False}, {"adam_w_mode": True}],
    ids=str,
)
def test_a_parameter_that_only_chooses_an_implementation_is_noted(params: dict[str, Any]) -> None:
    config = load_config({"optimizer": {"type": "AdamW", "params": {"lr": 0.1, **params}}})
    assert config.optimizer is not None
    assert config.optimizer.params == {"lr": 0.1}
    assert [note.key for note in config.ignored] == [f"optimizer.params.{key}" for key in params]


def test_names_of_optimizers_have_any_case_and_those_of_schedules_their_own() -> None:
    assert "optimizer.params.l = 1" not in message_for({"optimizer": {"type": "adamw", "params": {"l": 1}}})
    assert "adamw has no parameter 'l'" in message_for({"optimizer": {"type": "adamw", "params": {"l": 1}}})
    load_config({"scheduler": {"type": "StepLR", "params": {"step_size": 3}}})  # torch's


# What is missing, and "auto"


@pytest.mark.parametrize(("name", "key"), [("WarmupDecayLR", "total_num_steps"), ("OneCycle", "cycle_max_lr")])
def test_a_missing_parameter_is_named(name: str, key: str) -> None:
    source = named("scheduler", name)
    del source["scheduler"]["params"][key]
    assert f"scheduler.params.{key}: {name} needs it" in message_for(source)


def test_auto_cannot_stand_for_what_has_no_default() -> None:
    for name, key in (("OneCycle", "cycle_max_lr"), ("WarmupCosineLR", "total_num_steps")):
        message = message_for(named("scheduler", name, **{key: "auto"}))
        assert message.startswith("1 problem")
        assert f"scheduler.params.{key} = 'auto': {name} needs it" in message


def test_a_decay_without_an_end_is_a_warm_up_with_a_warning() -> None:
    """Nothing else would train as the config says until somebody says how long."""
    params = {"total_num_steps": "auto", "warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": 20}
    config = load_config({"scheduler": {"type": "WarmupDecayLR", "params": params}})
    assert config.scheduler is not None
    assert config.scheduler.model_dump() == {
        "type": "WarmupLR",
        "params": {"warmup_max_lr": None, "warmup_num_steps": 20},
    }
    (warning,) = [note for note in config.ignored if note.warns]
    assert warning.key == "scheduler.params.total_num_steps"
    assert "stays where the warm-up ends" in warning.reason
    optimizer = FusedAdam([nn.Parameter(torch.zeros(3))], lr=0.25)
    schedule = make_scheduler(config.scheduler.type, config.scheduler.params, optimizer)
    schedule.step(10_000)
    assert optimizer.param_groups[0]["lr"] == 0.25


# Adam

MEANINGS = ["AdamW in DeepSpeed", "L2 in torch", 'type "AdamW"', '"adam_w_mode": false']


@pytest.mark.parametrize("name", ["Adam", "adam"])
def test_adam_with_a_decay_has_to_say_which(name: str) -> None:
    """F18."""
    message = message_for({"optimizer": {"type": name, "params": {"weight_decay": 0.01}}})
    assert message.startswith("1 problem")
    assert "optimizer.params.weight_decay = 0.01: " in message
    assert len(message.splitlines()) == 2
    for words in MEANINGS:
        assert words in message


@pytest.mark.parametrize("params", [{}, {"weight_decay": 0}, {"weight_decay": 0.0}, {"weight_decay": "auto"}], ids=str)
def test_adam_without_a_decay_has_one_meaning(params: dict[str, Any]) -> None:
    load_config({"optimizer": {"type": "Adam", "params": params}})


def decay_of(name: str, **params: Any) -> bool:
    """Whether the decay of an optimizer of a config is decoupled."""
    config = load_config({"optimizer": {"type": name, "params": {"weight_decay": 0.5, **params}}})
    assert config.optimizer is not None
    made = make_optimizer(config.optimizer.type, config.optimizer.params, [nn.Parameter(torch.ones(3))])
    return bool(made.param_groups[0]["decoupled_weight_decay"])


def test_adam_w_mode_is_obeyed_and_the_name_adamw_says_it() -> None:
    """F18."""
    assert decay_of("Adam", adam_w_mode=True)
    assert not decay_of("Adam", adam_w_mode=False)
    assert decay_of("AdamW")
    assert decay_of("AdamW", adam_w_mode=False)  # as in DeepSpeed


@pytest.mark.parametrize("params", [{}, {"weight_decay": 0.0}, {"adam_w_mode": None}], ids=str)
def test_adam_with_a_decay_in_a_param_group_has_to_say_which(params: dict[str, Any]) -> None:
    """F18: the decay may come from the program's groups."""
    groups = [{"params": [nn.Parameter(torch.zeros(3))], "weight_decay": decay} for decay in (0.0, 0.1)]
    with pytest.raises(ValueError, match=r"model_parameters: weight_decay = 0\.1 in param group 1") as raised:
        make_optimizer("Adam", params, groups)
    for words in MEANINGS:
        assert words in str(raised.value)
    make_optimizer("Adam", {**params, "adam_w_mode": False}, groups)
    make_optimizer("AdamW", {}, groups)


# Documents


def test_documents_have_every_parameter() -> None:
    text, schema = config_markdown(), json.loads(config_json_schema())
    for kind, factories in (("OptimizerConfig", OPTIMIZERS), ("SchedulerConfig", SCHEDULES)):
        cases = {case["if"]["properties"]["type"]["const"]: case["then"] for case in schema["$defs"][kind]["allOf"]}
        assert cases.keys() == factories.keys()
        for name, factory in factories.items():
            assert f"### {name}\n" in text
            for key, parameter in factory.parameters.items():
                assert f"| `{key}` | {parameter.kind.words} | {parameter.default_words} | {parameter.meaning} |" in text
                assert key in cases[name]["properties"]["params"]["properties"]
