"""`partita run`: a program has what it has under `python`, and `import deepspeed` means Partita."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from partita.cli.program import run
from partita.compat.deepspeed.launcher import runner
from surface import exercises

SAYS = """
import os, pickle, sys
from helper import NUMBER

class Thing:
    number = NUMBER

def main():
    spec = None if __spec__ is None else (__spec__.name, __spec__.origin)
    print(sys.argv, sys.path[0], __file__, spec, __package__, __name__, __doc__)
    print(sys.modules["__main__"].__dict__ is globals(), pickle.loads(pickle.dumps(Thing())).number, Thing.__module__)
    print([name for name in ("typer", "rich") if name in sys.modules])
    if "fail" in sys.argv:
        raise ValueError("a program's own error")
    if "leave" in sys.argv:
        sys.exit(5)

if __name__ == "__main__":
    main()
"""

SPAWNS = """
import multiprocessing
import deepspeed

def work(number):
    return number, __name__, deepspeed.__name__

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(work, [4]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("NUMBER = 3\n")
    (tmp_path / "package").mkdir()
    for name in ("program.py", "package/part.py", "package/__main__.py"):
        (tmp_path / name).write_text(SAYS)
    (tmp_path / "broken.py").write_text("print('before')\nif True\n")
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "spawns.py").write_text(SPAWNS)
    return tmp_path


def outcome(command: list[str], folder: Path) -> tuple[int, str, str]:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stderr.splitlines(True) if '"<frozen runpy>"' not in line]  # frames of `python -m`
    return done.returncode, done.stdout, "".join(lines)


@pytest.mark.parametrize(
    "program",
    [
        ["program.py", "-m", "--help", "a b"],
        ["program.py", "fail"],
        ["./package/../program.py", "leave"],
        ["-m", "package.part", "-x"],
        ["-m", "package", "fail"],
        ["broken.py"],
    ],
    ids=" ".join,
)
def test_a_program_has_what_python_gives_it(python, folder, program):
    """Arguments, paths, names, what is printed, and the exit code; of an error the same lines."""
    ours = outcome([*python.command, "-m", "partita", "run", *program], folder)
    assert ours == outcome([sys.executable, *program], folder)


def test_what_cannot_be_run_is_said(python, folder, capsys):
    for words in ([], ["-x", "program.py"]):
        with pytest.raises(SystemExit) as left:
            run(words)
        assert left.value.code == 2 and "Usage: partita run SCRIPT" in capsys.readouterr().err
    run(["--help"])
    assert "Usage: partita run SCRIPT" in capsys.readouterr().out
    for words, code, said in (
        (["nothing.py"], 2, "can't open file"),
        (["-m", "nothing"], 1, "no module named 'nothing' that can be run"),
        (["-m", "no.such.thing"], 1, "no module named 'no.such.thing' that can be run"),
    ):
        got, _, err = outcome([*python.command, "-m", "partita", "run", *words], folder)
        assert got == code and said in err


def test_spawned_processes_have_the_alias_too(folder):
    """They import the program's main module before they get work."""
    code, out, err = outcome([sys.executable, "-m", "partita", "run", "spawns.py"], folder)
    assert (code, out) == (0, "[(4, '__mp_main__', 'partita.compat.deepspeed')]\n"), err


def test_under_torchrun(python, folder):
    (folder / "ranks.py").write_text(
        "import deepspeed, sys\n"
        "deepspeed.init_distributed()\n"
        "print(f'rank {deepspeed.comm.get_rank()} of {deepspeed.comm.get_world_size()}: {sys.argv}\\n', end='')\n"
    )
    launcher = python.torchrun("--standalone", "--nproc-per-node", "2")
    code, out, err = outcome([*launcher, "-m", "partita", "run", "ranks.py", "--lr", "1"], folder)
    assert code == 0, err
    assert sorted(out.splitlines()) == [f"rank {rank} of 2: ['ranks.py', '--lr', '1']" for rank in range(2)]


ACCELERATED = """
import torch
from accelerate import Accelerator
from accelerate.state import PartialState

PartialState(cpu=True)
accelerator = Accelerator()
model = torch.nn.Linear(4, 4)
loader = torch.utils.data.DataLoader(torch.randn(16, 4), batch_size=2)
model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader)
for x in loader:
    accelerator.backward(model(x).square().mean())
    optimizer.step()
print(f"{type(model).__module__} {model.zero_optimization_stage()} {model.global_steps}\\n", end="")
"""


@pytest.mark.slow
@exercises("launcher.runner.", "DEEPSPEED_ENVIRONMENT_NAME")
def test_under_accelerate_launch(folder):
    """The launcher looks for DeepSpeed, too; `-m partita run` gives the alias to its ranks."""
    pytest.importorskip("accelerate")
    assert runner.DEEPSPEED_ENVIRONMENT_NAME  # what it looks for
    (folder / "accelerated.py").write_text(ACCELERATED)
    options = ["--use_deepspeed", "--zero_stage", "2", "--num_processes", "2", "--num_machines", "1"]
    options += ["--machine_rank", "0", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    launcher = [sys.executable, "-m", "partita", "run", "-m", "accelerate.commands.launch", *options]
    code, out, err = outcome([*launcher, "-m", "partita", "run", "accelerated.py"], folder)
    assert code == 0, err
    assert out.splitlines() == ["partita.compat.deepspeed.engine 2 4"] * 2
