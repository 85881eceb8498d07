"""DeepSpeed's files that are damaged, missing, not read, or meant to run something: one clear line each."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed_run import new_model, optimizer_of, tokens_of
from deepspeed_writer import Trained, deepspeed_names, of_optimizer, write, write_universal
from partita.checkpoint import find
from partita.cli.commands import app
from typer.testing import CliRunner, Result

MODEL, OPTIMIZER = "mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def run_import(folder: Path, *arguments: Any) -> Result:
    """Imports from `from` to `to` in a folder."""
    return CliRunner().invoke(app, ["checkpoint", "import", str(folder / "from"), str(folder / "to"), *arguments])


@pytest.fixture(scope="module")
def run() -> Trained:
    """One step of a run."""
    model = new_model()
    optimizer = optimizer_of("AdamW", model)
    model(tokens_of(0, 0)).backward()
    optimizer.step()
    return of_optimizer(model, optimizer, steps=1)


@pytest.fixture
def source(run: Trained, tmp_path: Path) -> Path:
    """A checkpoint of stage 2 and two ranks."""
    return write(tmp_path / "from", run, 2, 2)


def assert_refused(done: Result, folder: Path, *words: str) -> None:
    """One line on the output, and nothing of a checkpoint."""
    assert done.exit_code == 1, done.output
    assert len(done.output.strip().splitlines()) == 1, done.output
    for word in words:
        assert word in done.output
    left = sorted(path.name for path in (folder / "to").iterdir()) if (folder / "to").exists() else []
    assert left == []


# -- what wants to run


class Evil:
    """Runs a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def evils(trace: Path) -> list[Evil]:
    """What would leave a trace."""
    command = f"touch '{trace}'"
    return [
        Evil(os.system, command),
        Evil(subprocess.getoutput, command),
        Evil(eval, f"open({str(trace)!r}, 'w').close()"),
        Evil(torch.save, 1, str(trace)),
    ]


@pytest.mark.parametrize("number", range(4))
def test_the_evil_ones_would_leave_a_trace(tmp_path, number):
    torch.save({"evil": evils(tmp_path / "trace")[number]}, tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "trace").exists()


KINDS = {
    "model": (2, False, MODEL),
    "optimizer": (2, False, OPTIMIZER),
    "slices": (3, False, "zero_pp_rank_1_mp_rank_00_model_states.pt"),
    "parameter": (2, True, "zero/embed.weight/exp_avg.pt"),
    "count": (2, True, "zero/embed.weight/step.pt"),
    "common": (2, True, "zero/optimizer_state.pt"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", range(4))
def test_nothing_in_a_file_is_run(run, tmp_path, kind, number):
    stage, universal, name = KINDS[kind]
    path = (write_universal if universal else write)(tmp_path / "from", run, stage, 2) / name
    with deepspeed_names():
        content = torch.load(path, weights_only=False)
        evil = evils(tmp_path / "trace")[number]
        torch.save({**content, "evil": evil} if isinstance(content, dict) else [content, evil], path)
    assert_refused(run_import(tmp_path), tmp_path, str(path), "Nothing of it was run")
    run_import(tmp_path, "--any-objects")
    assert not (tmp_path / "trace").exists()


def test_objects_are_left_out_if_that_is_asked_for(source, tmp_path):
    content = torch.load(source / MODEL, weights_only=False)
    torch.save({**content, "evil": Evil(subprocess.getoutput, f"touch '{tmp_path / 'trace'}'")}, source / MODEL)
    done = run_import(tmp_path, "--any-objects")
    assert done.exit_code == 0, done.output
    assert "client_state['evil'] is left out" in done.output
    assert not (tmp_path / "trace").exists()


def test_what_a_program_trusts_is_not_trusted_here(source, tmp_path):
    content = torch.load(source / MODEL, weights_only=False)
    torch.save({**content, "evil": Evil(subprocess.getoutput, f"touch '{tmp_path / 'trace'}'")}, source / MODEL)
    with torch.serialization.safe_globals([subprocess.getoutput]):
        assert_refused(run_import(tmp_path), tmp_path, "getoutput")
        assert subprocess.getoutput in torch.serialization.get_safe_globals()
    assert not (tmp_path / "trace").exists()


def test_numbers_of_numpy_are_left_out(source, tmp_path):
    """Programs often save them beside."""
    content = torch.load(source / MODEL, weights_only=False)
    torch.save({**content, "best": np.float64(0.5), "epoch": 3}, source / MODEL)
    done = run_import(tmp_path)
    assert done.exit_code == 0, done.output
    assert "client_state['best'] is left out" in done.output


# -- damage


def flip(path: Path, place: float) -> None:
    """Changes one bit; `place` from 0 to 1."""
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
@pytest.mark.parametrize("place", [0.3, 0.5, 0.7])
def test_a_changed_bit_is_found(source, tmp_path, name, place):
    flip(source / name, place)
    assert_refused(run_import(tmp_path), tmp_path, str(source / name))


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_cut_file_is_found(source, tmp_path, name, size):
    os.truncate(source / name, size)
    assert_refused(run_import(tmp_path), tmp_path, str(source / name))


def test_any_bit_of_a_file_gives_a_sound_checkpoint_or_one_line(source, tmp_path):
    """Also where no check sum is, in the directory of the file."""
    whole = (source / OPTIMIZER).read_bytes()
    for seed in range(60):
        (source / OPTIMIZER).write_bytes(whole)
        flip(source / OPTIMIZER, float(np.random.default_rng(seed).random()))
        done = run_import(tmp_path)
        if done.exit_code:
            assert_refused(done, tmp_path, "was not imported")
        shutil.rmtree(tmp_path / "to", ignore_errors=True)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "has no 'zero_pp_rank_0_mp_rank_00_optim_states.pt'"),
        (OPTIMIZER, "optimizer states of 1 ranks, and 2 saved it"),
        (MODEL, "no *_model_states.pt"),
    ],
)
def test_a_missing_file_is_named(source, tmp_path, missing, said):
    (source / missing).unlink()
    assert_refused(run_import(tmp_path), tmp_path, said)


def test_a_missing_slice_of_the_model_is_named(run, tmp_path):
    folder = write(tmp_path / "from", run, 3, 3)
    (folder / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    assert_refused(run_import(tmp_path), tmp_path, "has no 'zero_pp_rank_1_mp_rank_00_model_states.pt'")
    shutil.copy(folder / OPTIMIZER, folder / "zero_pp_rank_3_mp_rank_00_optim_states.pt")
    shutil.copy(
        folder / "zero_pp_rank_2_mp_rank_00_model_states.pt", folder / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    )
    assert_refused(run_import(tmp_path), tmp_path, "states of 4 ranks, and 3 saved it")


def test_a_missing_parameter_of_a_universal_checkpoint_is_named(run, tmp_path):
    folder = write_universal(tmp_path / "from", run, 2, 2)
    (folder / "zero" / "blocks.0.up.weight" / "fp32.pt").unlink()
    assert_refused(run_import(tmp_path), tmp_path, "blocks.0.up.weight/fp32.pt' is missing")


CHANGES: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "a partition too small": (
        OPTIMIZER,
        lambda c: c["optimizer_state_dict"]["single_partition_of_fp32_groups"].__setitem__(0, torch.zeros(5)),
        "elements",
    ),
    "a group too few": (
        OPTIMIZER,
        lambda c: c["optimizer_state_dict"]["single_partition_of_fp32_groups"].pop(),
        "1 groups of masters",
    ),
    "no shapes": (MODEL, lambda c: c.pop("param_shapes"), "param_shapes"),
    "shapes that are none": (MODEL, lambda c: c["param_shapes"][0].update({"embed.weight": (-1, 3)}), "(-1, 3)"),
    "a shape of too much": (MODEL, lambda c: c["param_shapes"][0].update({"embed.weight": (2**40,)}), "elements"),
    "no states": (OPTIMIZER, lambda c: c.pop("optimizer_state_dict"), "optimizer_state_dict"),
    "states of several parameters": (
        OPTIMIZER,
        lambda c: c["optimizer_state_dict"]["base_optimizer_state"]["state"][0].update(exp_avg=torch.zeros(3)),
        "--weights-only",
    ),
    "a tensor without its memory": (
        MODEL,
        lambda c: c["module"].update({"embed.weight": torch.zeros(1).bfloat16().expand(13, 10)}),
        "fewer values than its shape",
    ),
    "a dict that is a list": (MODEL, lambda c: c.update(module=[1]), "no dict 'module'"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_fit_together_is_refused(run, tmp_path, change):
    """Whole files, of other content."""
    file, act, said = CHANGES[change]
    run = Trained(**{**vars(run), "precision": "fp32" if file == OPTIMIZER else "bf16"})
    path = write(tmp_path / "from", run, 2, 2) / file
    with deepspeed_names():
        content = torch.load(path, weights_only=False)
        act(content)
        torch.save(content, path)
    assert_refused(run_import(tmp_path), tmp_path, said)


# -- other kinds, and places


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mp_rank_01_model_states.pt", "ds_to_universal.py"),
        ("layer_00-model_00-model_states.pt", "ds_to_universal.py"),
        ("layer_0_expert_1_mp_rank_00_model_states.pt", "ds_to_universal.py"),
        ("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "of two runs"),
    ],
)
def test_what_is_not_read_is_said(source, tmp_path, name, said):
    shutil.copy(source / OPTIMIZER, source / name)
    assert_refused(run_import(tmp_path), tmp_path, said)


def test_stage_0_whose_order_cannot_be_known_asks_for_another(run, tmp_path):
    """Two frozen parameters of the shape of others: the numbers could be any of them."""
    model = new_model()
    model.blocks[0].norm.bias.requires_grad_(False)
    optimizer = optimizer_of("AdamW", model)
    model(tokens_of(0, 0)).backward()
    optimizer.step()
    write(tmp_path / "from", of_optimizer(model, optimizer, steps=1), 0, 1)
    assert_refused(run_import(tmp_path), tmp_path, "more than one order", "--weights-only")
    assert run_import(tmp_path, "--weights-only").exit_code == 0


def test_places_that_would_be_written_over_are_refused(source, tmp_path):
    same = CliRunner().invoke(app, ["checkpoint", "import", str(tmp_path / "from"), str(tmp_path / "from")])
    assert same.exit_code == 1 and "give another folder" in same.output
    assert (tmp_path / "from" / "latest").read_text() == "global_step1"
    assert run_import(tmp_path).exit_code == 0
    again = run_import(tmp_path)
    assert again.exit_code == 1 and "--as-tag" in again.output
    assert run_import(tmp_path, "--as-tag", "moved", "--tag", "global_step1").exit_code == 0
    assert find(tmp_path / "to", None).tag == "moved"
    assert find(tmp_path / "to", "global_step1").manifest.step == 1
    for bad in ("../out", ".hidden", "latest"):
        done = run_import(tmp_path, "--as-tag", bad)
        assert done.exit_code == 1 and "cannot be the tag" in done.output


def test_where_there_is_nothing_is_said(source, tmp_path):
    for arguments, said in ((["--tag", "step9"], "is no folder"), (["--tag", "../from"], "latest_universal")):
        done = run_import(tmp_path, *arguments)
        assert done.exit_code == 1, said
    (tmp_path / "from" / "latest").write_text("../elsewhere")
    assert_refused(run_import(tmp_path), tmp_path, "give --tag")
    (tmp_path / "from" / "latest").unlink()
    assert_refused(run_import(tmp_path), tmp_path, "neither a file 'latest'")


def test_the_folder_of_the_checkpoint_itself_is_found(source, tmp_path):
    done = CliRunner().invoke(app, ["checkpoint", "import", str(source), str(tmp_path / "to")])
    assert done.exit_code == 0, done.output
    assert find(tmp_path / "to", None).tag == "global_step1"
