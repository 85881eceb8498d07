"""The memory that an import of DeepSpeed's checkpoints takes, beside its mapped files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deepspeed_writer import of_optimizer, write
from memory import peak_without_files
from partita.checkpoint import DeepSpeedImport
from torch import nn

MIB = 2**20
LIMIT = 64 * MIB
NUMEL = 48 * MIB  # 192 MiB of masters in one parameter, and twice as many of moments


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks", "precision"), [(0, 1, "fp32"), (2, 2, "bf16"), (3, 2, "bf16")])
def test_an_import_holds_some_runs_of_elements(tmp_path, stage, ranks, precision):
    """And not a tensor: those are views of the mapped files."""
    _write(tmp_path / "from", stage, ranks, precision)
    with peak_without_files() as peak:
        assert sum(DeepSpeedImport(tmp_path / "from", tmp_path / "to").run()) > 0
    assert peak[0] < LIMIT, f"{peak[0] / MIB:.0f} MiB"


def _write(folder: Path, stage: int, ranks: int, precision: str) -> None:
    model = nn.Linear(NUMEL // 4096, 4096, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    write(folder, of_optimizer(model, optimizer, precision=precision), stage, ranks)
