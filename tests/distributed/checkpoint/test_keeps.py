"""A run saves on its own, removes what is old, and goes on from the newest sound checkpoint."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import partita
import pytest
from partita.checkpoint import CheckpointError, checkpoints, latest_tag, newest_tag, verify_together
from partita.comm import SingleProcess
from resumed import Numbers, config_for, engine_for, take_steps
from torch import nn

STEPS = 7


def config_of(folder: Path | str, ranks: int = 2, precision: str = "fp32", **keeps: Any) -> dict[str, Any]:
    return config_for(ranks, 2, precision, checkpoint={"dir": str(folder), **keeps})


def _run(config: dict[str, Any], steps: int, seed: int = 1) -> tuple[int, dict[str, Any], str, dict[str, Any]]:
    """Where a run begins, the client state that it finds, from where it goes on, and what is seen of its steps."""
    engine = engine_for(config, seed=seed, noise=True)
    begin, mine, path = engine.global_steps, dict(engine.client_state), str(engine.resumed_from or "")
    found: list[dict[str, Any]] = []
    for _ in range(steps):
        engine.client_state["steps"] = engine.global_steps + 1
        found.append(take_steps(engine, 1))
    engine.destroy()
    return begin, mine, path, {"steps": found}


def tags(folder: Path) -> dict[str, int]:
    return {found.tag: found.manifest.step for found in checkpoints(folder)}


@pytest.mark.parametrize(
    ("keeps", "kept"),
    [
        ({}, []),
        ({"interval_steps": 3}, [3, 6]),
        ({"interval_steps": 1, "keep_last": 2, "verify": True}, [6, 7]),
        ({"interval_minutes": 1e-9}, [1, 2, 3, 4, 5, 6, 7]),
        ({"interval_minutes": 1e9, "interval_steps": 7}, [7]),
    ],
)
def test_saves_by_itself(ranks, tmp_path, keeps, kept):
    ranks(2).run(_run, config_of(tmp_path, **keeps), STEPS)
    assert tags(tmp_path) == {f"global_step{step}": step for step in reversed(kept)}
    assert not kept or latest_tag(tmp_path) == f"global_step{kept[-1]}"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_skipped_step_is_saved_too(ranks, tmp_path):
    """Steps are counted, whether the gradients were finite or not."""
    config = config_of(tmp_path, precision="fp16", interval_steps=1) | {
        "fp16": {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}
    }
    ranks(2).run(_run, config, 2)
    assert tags(tmp_path) == {"global_step2": 2, "global_step1": 1}
    (skipped, _) = ranks(2).run(_skipped_steps, config)
    assert skipped > 0


def _skipped_steps(config: dict[str, Any]) -> int:
    engine = engine_for(config, seed=2)
    skipped = engine.skipped_steps
    engine.destroy()
    return skipped


def _run_with_tags(config: dict[str, Any], folder: str) -> None:
    engine = engine_for(config, seed=1)
    take_steps(engine, 1)
    engine.save_checkpoint(folder, "best", {"mine": 1})
    take_steps(engine, 4)
    engine.destroy()


def test_checkpoints_with_names_of_the_program_stay(ranks, tmp_path):
    ranks(2).run(_run_with_tags, config_of(tmp_path, interval_steps=1, keep_last=1), str(tmp_path))
    assert tags(tmp_path) == {"global_step5": 5, "best": 1}


@pytest.mark.parametrize("precision", ["fp32", "split"])
def test_goes_on_bit_for_bit(ranks, tmp_path, precision):
    config = config_of(tmp_path / "new" / "folder", precision=precision, interval_steps=2)
    whole = ranks(2).run(_run, config_for(2, 2, precision), STEPS)
    first = ranks(2).run(_run, config, 5)
    second = ranks(2).run(_run, config, STEPS - 4, 2)
    for rank in (0, 1):
        assert first[rank][:3] == (0, {}, "")
        assert second[rank][:3] == (4, {"steps": 4}, str(tmp_path / "new" / "folder" / "global_step4"))
        assert first[rank][3]["steps"] + second[rank][3]["steps"][1:] == whole[rank][3]["steps"]
        assert second[rank][3]["steps"][0] == first[rank][3]["steps"][4]


def test_the_config_says_from_what(ranks, tmp_path):
    ranks(2).run(_run, config_of(tmp_path, interval_steps=2), 4)
    begin = {
        resume: ranks(2).run(_run, config_of(tmp_path, resume=resume), 0)[1][0]
        for resume in ("auto", "never", "global_step2")
    }
    assert begin == {"auto": 4, "never": 0, "global_step2": 2}


# -- refused


def _outcome(config: dict[str, Any], other_model: bool = False) -> tuple[int, list[str]]:
    """The step that a run begins with, or -1; and what the error or the log says."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("partita")
    logger.addHandler(handler)
    try:
        if other_model:
            engine = partita.Engine(nn.Linear(6, 1), train_data=Numbers(), config=config)
        else:
            engine = engine_for(config, seed=2)
    except CheckpointError as error:
        return -1, [str(error)]
    finally:
        logger.removeHandler(handler)
    step = engine.global_steps
    engine.destroy()
    return step, said


def outcome(ranks: Any, config: dict[str, Any], *arguments: Any) -> tuple[int, str]:
    (step, said), (other_step, other_said) = ranks(2).run(_outcome, config, *arguments)
    assert step == other_step
    assert step >= 0 or said == other_said
    return step, "\n".join(said)


@pytest.fixture(scope="module")
def three(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("three")
    ranks(2).run(_run, config_of(folder, interval_steps=1), 3)
    return folder


@pytest.fixture
def folder(three: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(three, tmp_path / "copy"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def damage(folder: Path, how: str) -> None:
    file = next(folder.glob("model*.safetensors"))
    if how == "flipped":
        flip(file)
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-9])
    elif how == "no file":
        file.unlink()
    else:
        (folder / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("flipped", ["model.safetensors", "bytes"]),
        ("truncated", ["model.safetensors", "bytes"]),
        ("no file", ["model.safetensors"]),
        ("manifest", ["manifest.json"]),
    ],
)
def test_a_damaged_newest_one_is_refused_or_replaced(ranks, folder, how, words):
    damage(folder / "global_step3", how)
    step, said = outcome(ranks, config_of(folder))
    assert step == -1
    assert [word for word in [*words, "global_step3"] if word not in said] == [], said
    assert "\n" not in said
    step, said = outcome(ranks, config_of(folder, fallback=True))
    assert step == 2
    assert [word for word in [*words, "falling back"] if word not in said] == [], said


def test_falls_back_as_far_as_it_must(ranks, folder):
    for tag in ("global_step3", "global_step2"):
        damage(folder / tag, "flipped")
    assert outcome(ranks, config_of(folder, fallback=True))[0] == 1
    assert outcome(ranks, config_of(folder, fallback=True, resume="global_step2"))[0] == 1
    damage(folder / "global_step1", "flipped")
    step, said = outcome(ranks, config_of(folder, fallback=True))
    assert (step, "no checkpoint before it is sound" in said) == (-1, True)


def test_what_is_sound_and_does_not_fit_is_no_reason_to_fall_back(ranks, folder):
    config = config_of(folder, fallback=True)
    step, said = outcome(ranks, config, True)
    assert step == -1
    assert "global_step3" in said
    step, said = outcome(ranks, config_of(folder, fallback=True, resume="global_step9"))
    assert step == -1
    assert "global_step9" in said and "'global_step3', 'global_step2', 'global_step1'" in said


def test_a_folder_that_cannot_be_used_is_refused_at_the_start(ranks, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        step, said = outcome(ranks, config_of(path))
        assert (step, "\n" in said) == (-1, False)
        assert str(tmp_path / "file") in said and "no checkpoint can be saved in" in said


def _load(config: dict[str, Any], folder: str) -> tuple[str, dict[str, Any]]:
    engine = engine_for(config, seed=2)
    path, mine = engine.load_checkpoint(folder, fallback=True)
    engine.destroy()
    return path.name, mine


def test_load_checkpoint_falls_back_too(ranks, folder):
    damage(folder / "global_step3", "flipped")
    assert ranks(2).run(_load, config_for(2, 2, "fp32"), str(folder)) == [("global_step2", {"steps": 2})] * 2


# -- which one is the newest


def test_reading_back_finds_damage(folder):
    verify_together(SingleProcess(), folder / "global_step3")
    flip(folder / "global_step3" / "state.json")
    with pytest.raises(CheckpointError, match=r"state\.json', bytes"):
        verify_together(SingleProcess(), folder / "global_step3")


def test_latest_says_which_is_the_newest(folder):
    """A clock that goes backwards, or a run that went back, gives a newer checkpoint an older time or step."""
    (folder / "latest").write_text("global_step2")
    assert newest_tag(folder) == "global_step2"
    shutil.rmtree(folder / "global_step2")
    assert newest_tag(folder) == "global_step3"
    (folder / "latest").unlink()
    assert newest_tag(folder) == "global_step3"


def test_a_save_that_died_before_latest_counts(folder):
    """Its checkpoint has its name, and what `latest` was to be is in a hidden file."""
    (folder / "latest").write_text("global_step2")
    (folder / ".latest.partial-0123abcd").write_text("global_step3")
    assert newest_tag(folder) == "global_step3"
    (folder / ".latest.partial-0123abcd").write_text("global_step1")  # it was to replace that one
    assert newest_tag(folder) == "global_step2"
    (folder / ".latest.partial-0123abcd").write_text("global_step7")  # it had not come so far
    assert newest_tag(folder) == "global_step2"


def test_no_run_begins_anew_over_damaged_ones(folder):
    for found in checkpoints(folder):
        damage(found.path, "truncated")
    assert newest_tag(folder) == "global_step3"
    (folder / "latest").unlink()
    assert newest_tag(folder) is not None
    assert newest_tag(folder / "nowhere") is None
