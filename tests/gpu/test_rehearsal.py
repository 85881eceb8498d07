"""What several GPUs would do, rehearsed on one; and on a CPU, where collectives go over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import rehearsal
from on_gpu import needs_cuda

SCRIPT = str(Path(rehearsal.__file__))


def rehearse(command: list[str], *precisions: str, **variables: str) -> None:
    """Every row of the list ran, and has the plain engine's bits."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **variables}
    done = subprocess.run([*command, *precisions], capture_output=True, text=True, timeout=580, env=environment)
    said = done.stdout.splitlines()
    wrong = [line for line in said if not line.endswith(": the same bits")]
    assert done.returncode == 0, "\n".join([*wrong, done.stderr[-3000:]])
    expected = rehearsal.names(precisions or rehearsal.PRECISIONS)
    assert said == [*(f"{name}: the same bits" for name in expected), "rehearsal: ok"]


def test_one_process_rehearses_several_over_gloo(python):
    rehearse([*python.command, SCRIPT, "cpu"])


@needs_cuda
def test_one_process_rehearses_several_over_nccl():
    rehearse([sys.executable, SCRIPT, "cuda"])


@needs_cuda
def test_kernels_and_copies_that_share_one_queue_do_not_wait_for_each_other():
    """`CUDA_DEVICE_MAX_CONNECTIONS=1`, as other programs of the field set it."""
    rehearse([sys.executable, SCRIPT, "cuda"], "bf16", CUDA_DEVICE_MAX_CONNECTIONS="1")
