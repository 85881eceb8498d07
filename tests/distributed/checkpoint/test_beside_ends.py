"""C10: programs that end while they save beside training: the checkpoint is finished, or nothing of it is left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import saves_beside
from partita.checkpoint import find, verify
from warm_python import WarmPython


def run(python: WarmPython, folder: Path, how: str, shim: Path) -> subprocess.CompletedProcess[str]:
    """The program under torchrun. Its ranks are below the shim, so they start cold."""
    command = python.torchrun("--standalone", "--nproc-per-node", "2", ranks=[sys.executable])
    environment = {**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(saves_beside.__file__).parent), *sys.path])
    program = [saves_beside.__file__, str(folder), how]
    return subprocess.run([*command, *program], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "how", ["drop", *(pytest.param(how, marks=pytest.mark.slow) for how in ("return", "destroy", "leave groups"))]
)
def test_the_end_of_a_program_waits_for_its_save(tmp_path, python, fault_shim, how):
    """It returns, destroys the engine, has lost the engine, or has ended torch's process groups."""
    done = run(python, tmp_path / "checkpoints", how, fault_shim)
    assert done.returncode == 0, done.stderr
    found = find(tmp_path / "checkpoints", None)
    assert [chunk.problem for chunk in verify(found.path, found.manifest) if chunk.problem] == []
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "tag"]


def test_an_error_of_one_rank_ends_the_save(tmp_path, python, fault_shim):
    """No rank waits without end, each says which checkpoint is not there, and none is."""
    done = run(python, tmp_path / "checkpoints", "raise", fault_shim)
    assert done.returncode == 1
    assert done.stderr.count(f"the checkpoint '{tmp_path / 'checkpoints' / 'tag'}' was not finished") == 2, done.stderr
    assert "rank 1 has had enough" in done.stderr
    assert list((tmp_path / "checkpoints").iterdir()) == []
