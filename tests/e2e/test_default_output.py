"""F6: what a job prints when nobody asks for more, and what it prints when somebody does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from warm_python import WarmPython

PROGRAM = """
import sys
import torch
import partita

def mark(text):
    print("-- " + text, file=sys.stderr, flush=True)

def run(name, steps, **changes):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW"},
              "scheduler": {"type": "WarmupLR"}, "zero_optimization": {"stage": 2}, **changes}
    mark(name)
    engine, *_ = partita.initialize(model, config=config)
    for step in range(steps):
        loss = engine(torch.ones(2, 4).to(model[0].weight.dtype)).mean()
        engine.backward(loss)
        engine.step()
        if step == 0:
            mark(name + " after step 1")
    engine.destroy()
    mark("end")

run("default", 20)
run("silent", 3, steps_per_print=0)
run("every second", 4, steps_per_print=2, gradient_clipping=0.5)
run("timed", 2, steps_per_print=2, wall_clock_breakdown=True)
run("dumped", 1, dump_state=True)
run("overflow", 1, steps_per_print=0, fp16={"enabled": True, "loss_scale": 1e30})
run("fp16", 1, steps_per_print=1, fp16={"enabled": True, "loss_scale": 8})
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, python: WarmPython) -> dict[str, str]:
    """'0/stdout', ...: what each of two ranks printed."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "program.py").write_text(PROGRAM)
    options = ["--standalone", "--nproc-per-node", "2", "--redirects", "3", "--log-dir", str(folder / "logs")]
    subprocess.run(
        [*python.torchrun(*options), str(folder / "program.py")],
        check=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    files = (folder / "logs").glob("**/std*.log")
    return {f"{path.parent.name}/{path.stem}": path.read_text() for path in files}


def lines_of(outputs: dict[str, str], name: str) -> list[str]:
    """What rank 0 wrote to stderr during one of the runs."""
    text = outputs["0/stderr"].split(f"-- {name}\n", 1)[1]
    return text[: text.index("-- end\n")].splitlines()


def test_ranks_other_than_0_print_nothing(outputs):
    assert len(outputs) == 4
    assert [line for line in outputs["1/stderr"].splitlines() if not line.startswith("-- ")] == []
    assert outputs["1/stdout"] == ""


def test_standard_output_belongs_to_the_program(outputs):
    assert outputs["0/stdout"] == ""


def test_at_most_three_lines_before_step_1_and_they_say_what_runs(outputs):
    """Stage, ranks, precision, optimizer, parameters, clipping and batch sizes."""
    lines = lines_of(outputs, "default")
    before = lines[: lines.index("-- default after step 1")]
    assert 1 <= len(before) <= 3
    for word in ("stage 2", "2 ranks", "fp32", "FusedAdam", "25 parameters", "batch 4 = 2 x 1", "x 2 ranks"):
        assert word in before[0], word
    assert "gradients not clipped" in before[0]
    assert "gradients clipped at norm 0.5" in lines_of(outputs, "every second")[0]


def test_by_default_every_tenth_step_has_one_line(outputs):
    lines = [line for line in lines_of(outputs, "default") if "ms/step" in line]
    assert [int(re.search(r"step (\d+)", line).group(1)) for line in lines] == [10, 20]


def test_a_second_engine_in_the_process_prints_its_lines_once(outputs):
    assert len([line for line in lines_of(outputs, "silent") if not line.startswith("-- ")]) == 1


def test_steps_per_print_says_when_and_what(outputs):
    """steps_per_print: loss, learning rate, norm, skipped steps, samples per second, time; outside fp16 no scale."""
    lines = [line for line in lines_of(outputs, "every second") if "ms/step" in line]
    assert len(lines) == 2
    for line, step in zip(lines, (2, 4), strict=True):
        for word in (f"step {step} ", "lr ", "grad norm ", "skipped 0"):
            assert word in line, word
        assert "forward" not in line
        assert "loss scale" not in line
        assert re.search(r"  loss -?\d+\.\d{4}  ", line)
        rate, ms = (
            float(re.search(rf"([\d.,]+) {unit}", line).group(1).replace(",", "")) for unit in ("samples/s", "ms/step")
        )
        assert rate * ms / 1e3 == pytest.approx(4, abs=(0.06 * rate + 0.6 * ms) / 1e3)  # both are rounded


def test_the_loss_scale_is_reported_where_there_is_one(outputs):
    (line,) = (line for line in lines_of(outputs, "fp16") if "ms/step" in line)
    assert "loss scale 8 " in line


def test_wall_clock_breakdown_adds_the_phases(outputs):
    (line,) = (line for line in lines_of(outputs, "timed") if "ms/step" in line)
    assert re.search(r"\(forward [\d.]+, backward [\d.]+, step [\d.]+ ms\)", line)


def test_dump_state_prints_the_whole_config_as_json(outputs):
    text = "\n".join(lines_of(outputs, "dumped"))
    text = text[: text.index("\n-- dumped after")]
    config = json.loads(text[text.index("config: ") + len("config: ") :])
    assert config["dump_state"] is True
    assert config["train_batch_size"] == 4
    assert config["zero_optimization"]["stage"] == 2


def test_a_skipped_step_has_a_line_even_when_silent(outputs):
    """N2."""
    assert [line for line in lines_of(outputs, "overflow") if "step 1 skipped" in line and "not finite" in line]


def test_a_program_that_set_up_logging_gets_the_lines_in_its_own_way(tmp_path: Path):
    """No second handler, so no line twice."""
    program = (
        "import logging, sys, torch, partita\n"
        "logging.basicConfig(stream=sys.stdout, level=logging.INFO, format='mine %(message)s')\n"
        "partita.Engine(torch.nn.Linear(2, 2), config={'optimizer': {'type': 'AdamW'}})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert len([line for line in done.stdout.splitlines() if line.startswith("mine ZeRO stage 0")]) == 1
    assert "partita" not in done.stderr
