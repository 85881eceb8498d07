"""`partita checkpoint import`: DeepSpeed's checkpoints of all stages go on as runs of Partita."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import partita
import pytest
import torch
from deepspeed_run import Gpt, config_of, new_model, optimizer_of, tokens_of
from deepspeed_writer import (
    DynamicLossScaler,
    LossScaler,
    Trained,
    ZeroStageEnum,
    deepspeed_names,
    of_optimizer,
    write,
    write_universal,
)
from partita.checkpoint import CheckpointError, DeepSpeedImport, new_key
from partita.cli.commands import app
from partita.compat.deepspeed.utils.zero_to_fp32 import (
    get_fp32_state_dict_from_zero_checkpoint,
    load_state_dict_from_zero_checkpoint,
)
from partita.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor
from typer.testing import CliRunner, Result


def run_import(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["checkpoint", "import", *map(str, arguments)])


def import_all(tmp_path: Path, **options: Any) -> list[str]:
    """Imports `from` to `to`; what was noted."""
    one = DeepSpeedImport(tmp_path / "from", tmp_path / "to", **options)
    assert sum(one.run()) > 0
    return one.notes


def torch_steps(model: Gpt, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Trains with torch alone, with the clipping of `config_of`; the loss of each step."""
    losses = []
    for step in steps:
        loss = model(tokens_of(step, 0))
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained(kind: str = "AdamW", precision: str = "fp32", **more: Any) -> tuple[Trained, torch.optim.Optimizer]:
    """Three steps of a run."""
    model = new_model()
    optimizer = optimizer_of(kind, model)
    torch_steps(model, optimizer, range(3))
    return of_optimizer(model, optimizer, precision=precision, **more), optimizer


def engine_for(stage: int, precision: str = "fp32", kind: str = "AdamW", **asked: Any) -> Any:
    """An engine over a model with other weights."""
    model = new_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
        model.seen += 50
    config = {**config_of({"stage": stage, "precision": precision, **asked}), "steps_per_print": 0}
    config.pop("zero_allow_untested_optimizer")
    engine, *_ = partita.initialize(model=model, optimizer=optimizer_of(kind, model), config=config)
    return engine


def assert_has(engine: Any, run: Trained) -> None:
    """Masters, states, buffers and frozen parameters of an engine are those of the run, bit for bit."""
    parameters = dict(engine.module.named_parameters())
    for name, master in run.masters.items():
        assert_equal(safe_get_full_fp32_param(parameters[name]), master, name)
        for key, states in run.states.items():
            assert_equal(safe_get_full_optimizer_state(parameters[name], key), states[name], f"{key} of {name}")
    state = engine.module_state_dict()
    for name, value in run.frozen.items():
        assert_equal(state[name], value, name)
    assert_equal(state["seen"], run.model.seen, "seen")
    assert state["head.weight"].equal(state["embed.weight"])


def assert_equal(found: Any, expected: Tensor, name: str) -> None:
    assert found is not None, name
    assert found.dtype == expected.dtype and found.equal(expected), name


# Every stage, one and several ranks, sizes that need padding, names of files that do not sort as their ranks do.
SAVED = [(0, 1, "fp32"), (0, 1, "bf16"), (1, 1, "fp32"), (1, 3, "bf16"), (2, 2, "bf16"), (2, 11, "fp32")]
SAVED += [(3, 1, "bf16"), (3, 2, "fp32"), (3, 11, "bf16")]


@pytest.mark.parametrize(("stage", "ranks", "precision"), SAVED)
def test_all_that_was_saved_comes_along(tmp_path, stage, ranks, precision):
    more = {"note": "hello", "numbers": [1, 2.5], "pair": (1, 2), "tensor": torch.arange(3)}
    run, _ = trained(precision=precision, more=more, lr_scheduler={"last_batch_iteration": 2})
    write(tmp_path / "from", run, stage, ranks)
    done = run_import(tmp_path / "from", tmp_path / "to")
    assert done.exit_code == 0, done.output
    assert "global_step3" in done.output and "begin anew" in done.output
    engine = engine_for((stage + 1) % 4, precision, schedule=True)
    path, client = engine.load_checkpoint(tmp_path / "to")
    assert path == tmp_path / "to" / "global_step3"
    assert client.pop("tensor").tolist() == [0, 1, 2]
    assert client == {"note": "hello", "numbers": [1, 2.5], "pair": (1, 2)}
    assert_has(engine, run)
    assert (engine.global_steps, engine.global_samples) == (3, 24)
    assert engine.lr_scheduler.last_batch_iteration == 2
    groups = engine.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert engine.train_state().take_sections()["step"]["loss_scale"]["applied_steps"] == 3
    engine.destroy()


@pytest.mark.parametrize("stage", [2, 3])
def test_a_universal_checkpoint_comes_along(tmp_path, stage):
    run, _ = trained(precision="bf16")
    write_universal(tmp_path / "from", run, stage, 2)
    assert run_import(tmp_path / "from", tmp_path / "to").exit_code == 0
    engine = engine_for(1, "bf16")
    engine.load_checkpoint(tmp_path / "to")
    assert_has(engine, run)
    assert engine.train_state().take_sections()["step"]["loss_scale"]["applied_steps"] == 3
    engine.destroy()


@pytest.mark.parametrize(("stage", "ranks", "kind"), [(0, 1, "AdamW"), (2, 3, "Adam"), (3, 2, "AdamW"), (1, 2, "SGD")])
@pytest.mark.parametrize("here", [1, 3])
def test_the_run_goes_on_as_it_would_have(tmp_path, stage, ranks, kind, here):
    """The losses are those of torch, which did not stop."""
    run, optimizer = trained(kind)
    write(tmp_path / "from", run, stage, ranks)
    import_all(tmp_path)
    expected = torch_steps(run.model, optimizer, range(3, 6))
    engine = engine_for(here, kind=kind)
    engine.load_checkpoint(tmp_path / "to")
    losses = []
    for step in range(3, 6):
        loss = engine(tokens_of(step, 0))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.destroy()
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[0] == expected[0]


def test_states_of_other_optimizers_come_along(tmp_path):
    """Momentum: a state of each element that is not Adam's, under a name of its own."""
    model = new_model()
    optimizer = torch.optim.Adagrad([p for p in model.parameters() if p.requires_grad], lr=0.01)
    torch_steps(model, optimizer, range(3))
    run = of_optimizer(model, optimizer)
    write(tmp_path / "from", run, 2, 3)
    import_all(tmp_path)
    other = new_model()
    config = {**config_of({"stage": 2, "precision": "fp32"}), "steps_per_print": 0}
    config.pop("zero_allow_untested_optimizer")
    mine = torch.optim.Adagrad([p for p in other.parameters() if p.requires_grad], lr=0.5)
    engine, *_ = partita.initialize(model=other, optimizer=mine, config=config)
    engine.load_checkpoint(tmp_path / "to")
    assert_has(engine, run)
    assert engine.optimizer.param_groups[0]["lr"] == 0.01
    engine.destroy()


# DeepSpeed's counts -> good steps, and whether the last step was skipped. The window is 4.
SCALES = [((3, -1), (3, 0)), ((7, 2), (4, 0)), ((8, 2), (1, 0)), ((11, 2), (4, 0)), ((3, 2), (0, 1)), ((0, -1), (0, 0))]


@pytest.mark.parametrize(("scale", "is_noted"), [(1.0, False), (256.0, True)])
def test_gradients_that_deepspeed_divides_too_often_are_noted(tmp_path, scale, is_noted):
    """In stage 0 and fp16."""
    run, _ = trained(precision="fp16", scaler=LossScaler(cur_scale=scale, dynamic=False))
    write(tmp_path / "from", run, 0, 1)
    assert any("does not scale fp16 losses" in note for note in import_all(tmp_path)) is is_noted


@pytest.mark.parametrize(("counts", "expected"), SCALES)
def test_the_loss_scale_goes_on_where_it_was(tmp_path, counts, expected):
    cur_iter, last = counts
    values = {"cur_scale": 512.0, "dynamic": True, "cur_iter": cur_iter, "last_overflow_iter": last}
    scaler = DynamicLossScaler(**values, scale_factor=2.0, scale_window=4, min_scale=1, cur_hysteresis=1)
    run, _ = trained(precision="fp16", scaler=scaler, skipped=1, steps=4)
    write(tmp_path / "from", run, 1, 2)
    import_all(tmp_path)
    engine = engine_for(2, "fp16", scale={"loss_scale_window": 4, "hysteresis": 2})
    engine.load_checkpoint(tmp_path / "to")
    step = engine.train_state().take_sections()["step"]
    scale = step["loss_scale"]
    assert (scale["scale"], scale["hysteresis"]) == (512.0, 1)
    assert (scale["good_steps"], scale["consecutive_skips"]) == expected
    assert (step["global_steps"], scale["applied_steps"], scale["skipped_steps"]) == (4, 3, 1)
    engine.destroy()


def test_steps_that_a_parameter_has_missed_are_known(tmp_path):
    """Adam's own count of a group, where it is behind that of the run."""
    run, _ = trained()
    folder = write(tmp_path / "from", run, 1, 1)
    path = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    with deepspeed_names():
        content = torch.load(path, weights_only=False)
        content["optimizer_state_dict"]["base_optimizer_state"]["state"][1]["step"] = torch.tensor(1.0)
        torch.save(content, path)
    import_all(tmp_path)
    state = json.loads((tmp_path / "to" / "global_step3" / "state.json").read_text())
    waited = state["ranks"][0]["optimizer_states"]["waited"]
    assert waited == dict.fromkeys(run.groups[1], 2)


@pytest.mark.parametrize("by_name", [False, True], ids=["by value", "by name"])
def test_members_of_enums_are_read_as_any_python_saves_them(tmp_path, monkeypatch, by_name):
    """Python 3.11.2 saves getattr(class, name), 3.11.7 class(value): both stay inert."""

    def reduced(member: ZeroStageEnum, _protocol: int) -> tuple[Any, ...]:
        return (getattr, (type(member), member.name)) if by_name else (type(member), (member.value,))

    monkeypatch.setattr(ZeroStageEnum, "__reduce_ex__", reduced)
    run, _ = trained()
    write(tmp_path / "from", run, 2, 2)
    import_all(tmp_path)
    engine = engine_for(2)
    engine.load_checkpoint(tmp_path / "to")
    assert_has(engine, run)


def test_weights_only_leaves_the_optimizer_out(tmp_path):
    run, _ = trained(precision="bf16")
    write(tmp_path / "from", run, 2, 2)
    notes = import_all(tmp_path, weights_only=True)
    assert any("load_optimizer_states=False" in note for note in notes)
    engine = engine_for(1, "bf16")
    engine.load_checkpoint(tmp_path / "to", load_optimizer_states=False)
    run.states.clear()
    assert_has(engine, run)
    engine.destroy()


def test_data_and_schedules_that_deepspeed_knows_nothing_of(tmp_path, caplog):
    """The place in the data begins anew, and the log says so; a schedule that the run did not have is missed."""
    run, _ = trained()
    write(tmp_path / "from", run, 1, 2)
    import_all(tmp_path)
    config = {**config_of({"stage": 1, "precision": "fp32"}), "steps_per_print": 0}
    config.pop("zero_allow_untested_optimizer")
    model = new_model()
    data = [tokens_of(0, 0)[0] for _ in range(8)]
    engine, *_ = partita.initialize(
        model=model, optimizer=optimizer_of("AdamW", model), config=config, training_data=data
    )
    with caplog.at_level("INFO", logger="partita"):
        engine.load_checkpoint(tmp_path / "to")
    assert "nothing of data, random" in caplog.text
    assert engine.global_steps == 3
    engine.destroy()
    engine = engine_for(1, schedule=True)
    with pytest.raises(CheckpointError, match="no state of 'lr_scheduler'"):
        engine.load_checkpoint(tmp_path / "to")
    engine.destroy()


def test_an_import_with_a_key_is_encrypted(tmp_path, monkeypatch):
    """The audit log has a line of it, and the weights are the same."""
    monkeypatch.setenv("A_KEY", new_key())
    write(tmp_path / "from", trained()[0], 2, 2)
    assert run_import(tmp_path / "from", tmp_path / "plain").exit_code == 0
    assert run_import(tmp_path / "from", tmp_path / "to", "--key-env", "A_KEY").exit_code == 0
    assert [(line["what"], line["tag"]) for line in told(tmp_path / "to")] == [("imported", "global_step3")]
    for command in (["audit", "verify"], ["checkpoint", "verify"]):
        assert CliRunner().invoke(app, [*command, str(tmp_path / "to"), "--key-env", "A_KEY"]).exit_code == 0
    exported = []
    for name, key in (("plain", []), ("to", ["--key-env", "A_KEY"])):
        path = tmp_path / f"{name}.safetensors"
        assert CliRunner().invoke(app, ["checkpoint", "export", str(tmp_path / name), str(path), *key]).exit_code == 0
        exported.append(path.read_bytes())
    assert exported[0] == exported[1]


def told(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("stage", "ranks", "precision"), [(0, 1, "fp32"), (1, 2, "bf16"), (3, 2, "bf16")])
def test_zero_to_fp32_reads_deepspeeds_checkpoints(tmp_path, stage: int, ranks: int, precision: str):
    """DeepSpeed's own function, under its name: the float32 weights, and a model with them."""
    run, _ = trained(precision=precision)
    folder = write(tmp_path / "from", run, stage, ranks)
    state = get_fp32_state_dict_from_zero_checkpoint(tmp_path / "from")
    masters = run.masters
    assert state.keys() >= masters.keys() and all(torch.equal(state[name], masters[name]) for name in masters)
    other = load_state_dict_from_zero_checkpoint(new_model(), tmp_path / "from", tag=folder.name)
    assert all(torch.equal(p, masters[name]) for name, p in other.named_parameters() if name in masters)
