"""The config's flops_profiler: a table of modules, from one step and the next, whatever computes layers again."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import partita
import pytest
import small_models
import torch
from late_streams import on_late_streams
from partita.monitor.module_table import ModuleCosts, ProfiledStep, inclusive, scaled, summary_text, tree_text
from torch import Tensor, nn

WIDTH, SAMPLES = 4, 2
BLOCK_MACS = SAMPLES * 2 * WIDTH * WIDTH


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return (x @ torch.ones(WIDTH, 1)).mean()


def _train(steps: int, make: Any = Blocks, micro_batches: int = 1, **changes: Any) -> None:
    config = small_models.config(gradient_accumulation_steps=micro_batches, **changes)
    engine, *_ = partita.initialize(model=small_models.seeded(make), config=config)
    for step in range(steps):
        for _ in range(micro_batches):
            engine.backward(engine(small_models.inputs(step, SAMPLES)))
            engine.step()
        with torch.no_grad():
            engine(small_models.inputs(step, 5))  # is no part of any step
    assert not any(m._forward_hooks for m in engine.module.modules() if isinstance(m, nn.Linear))
    engine.destroy()


def _rows(text: str) -> dict[str, list[str]]:
    """The tree: cells by the name of a module, which is unique here or the last one counts."""
    tree = text.partition("\n\n")[2]
    return {line.split()[0]: line.split()[1:] for line in tree.splitlines()}


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_table_has_parameters_macs_and_times(tmp_path, stage, checkpointed):
    path = tmp_path / "new" / "flops.txt"
    _train(
        3,
        flops_profiler={"enabled": True, "profile_step": 2, "output_file": str(path), "recompute_fwd_factor": 1.0},
        activation_checkpointing={"enabled": checkpointed, "classes": ["Block"]} if checkpointed else {},
        zero_optimization={"stage": stage},
    )
    text = path.read_text()
    rows = _rows(text)
    whole = 2 * BLOCK_MACS + SAMPLES * WIDTH
    assert rows["model"][:4] == ["Blocks", "84", "100.0%", str(whole)]
    assert rows["0"][:2] == ["Block", "36"] and rows["1"][3] == str(BLOCK_MACS)
    assert rows["up"][1:4] == ["20", "23.8%", str(BLOCK_MACS // 2)]
    assert rows["unused"][1:4] == ["12", "14.3%", "0"]
    assert rows["model"][6] == "100.0%" and float(rows["0"][5]) > 0.0
    assert float(rows["blocks"][5]) == pytest.approx(float(rows["0"][5]) + float(rows["1"][5]), abs=2e-3)
    assert f"forward {whole} MACs = {2 * whole} FLOPs, backward {6 * whole} FLOPs" in text
    assert "in step 2" in text and "in step 3" in text


def test_only_the_first_micro_batch_counts(tmp_path):
    path = tmp_path / "flops.txt"
    _train(2, micro_batches=3, flops_profiler={"enabled": True, "profile_step": 0, "output_file": str(path)})
    assert _rows(path.read_text())["model"][3] == str(2 * BLOCK_MACS + SAMPLES * WIDTH)


def test_nobody_waits_for_the_times_of_modules(tmp_path):
    """LateStreams refuses times that the device has not come to: the table comes with a later step."""
    path = tmp_path / "flops.txt"
    settings = {"enabled": True, "output_file": str(path)}
    with on_late_streams():
        engine, *_ = partita.initialize(
            model=small_models.seeded(Blocks), config=small_models.config(flops_profiler=settings)
        )
        told = []
        for step in range(4):
            engine.backward(engine(small_models.inputs(step, SAMPLES)))
            engine.step()
            told.append(path.exists())
        engine.destroy()
    assert told == [False, False, True, True]
    assert float(_rows(path.read_text())["0"][5]) > 0.0


def test_a_run_that_ends_early_has_no_times(tmp_path):
    path = tmp_path / "flops.txt"
    _train(1, flops_profiler={"enabled": True, "output_file": str(path)})
    assert _rows(path.read_text())["model"][5:] == ["-", "-", "-"]
    assert not (tmp_path / ".flops.txt.new").exists()


def test_without_a_file_the_table_is_in_the_log(caplog):
    with caplog.at_level(logging.INFO, "partita"):
        _train(2, flops_profiler={"enabled": True, "detailed": False, "top_modules": 2})
    (text,) = [r.getMessage() for r in caplog.records if "FLOPs in step" in r.getMessage()]
    assert "depth 3: most MACs Linear 128" in text and "forward ms" not in text


@pytest.mark.parametrize("bad", ["", "folder"])
def test_a_file_that_cannot_be_written_is_an_error_before_a_step(tmp_path, bad):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "x.txt" if bad else tmp_path
    with pytest.raises(ValueError, match=r"flops_profiler\.output_file = .* cannot be written"):
        _train(1, flops_profiler={"enabled": True, "output_file": str(path)})


# -- the text


def _costs(name: str, flops: float, seconds: float | None = 0.5) -> ModuleCosts:
    return ModuleCosts(name, f"Kind{name.count('.')}", 10, flops, seconds)


def test_the_tree_ends_at_its_depth():
    rows = [_costs("", 8.0), _costs("a", 6.0), _costs("a.b", 4.0), _costs("c", 2.0, None)]
    assert [line.split()[0] for line in tree_text(rows, 1).splitlines()] == ["module", "model", "a", "c"]
    assert len(tree_text(rows, -1).splitlines()) == 5
    assert tree_text(rows, -1).splitlines()[-1].split()[-3:] == ["-", "-", "-"]


def test_the_summary_names_the_largest_classes():
    rows = [_costs("", 8.0), _costs("a", 6.0), _costs("a.b", 4.0)]
    text = summary_text(rows, ProfiledStep(4, 2), top=1)
    assert "of one micro-batch of 2 samples" in text
    assert "depth 1: most MACs Kind0 3; most parameters Kind0 10" in text


def test_what_a_module_has_includes_what_is_in_it():
    assert inclusive({"a": 1.0, "a.b": 2.0, "ab": 4.0, "": 8.0}, ["", "a", "a.b", "ab"]) == {
        "": 15.0,
        "a": 3.0,
        "a.b": 2.0,
        "ab": 4.0,
    }


@pytest.mark.parametrize(("value", "text"), [(0, "0 "), (999, "999 "), (1234567, "1.235 M"), (2e15, "2 P")])
def test_numbers_are_short(value, text):
    assert scaled(value) == text


def test_the_table_goes_where_a_link_leads(tmp_path: Path):
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    _train(1, flops_profiler={"enabled": True, "output_file": str(tmp_path / "link.txt")})
    assert (tmp_path / "link.txt").is_symlink() and "FLOPs" in (tmp_path / "real.txt").read_text()
