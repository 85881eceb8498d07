"""Peak resident memory per rank, each engine in processes of its own: side by side they could not be told apart.

The mean over ranks. A page that several of them have mapped counts in parts, so the figures add up to what is used.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import print_table, settings_of, write_json

# What torchrun tells its workers, which must not reach the runs started from one of them.
LAUNCHER_VARIABLES = ("RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_")


def print_memory(arguments: argparse.Namespace, script: str) -> None:
    """Run `script` once per engine and print each one's peak over that of a process that has only loaded torch."""
    results = {name: _run(arguments, script, name) for name in arguments.engines}
    rows = [[name, *_cells(name, result)] for name, result in results.items()]
    states_mib = next(iter(results.values()))["parameters"] * 4 / 2**20
    print(f"peak resident memory per rank over torch's own; the weights in fp32 are {states_mib:.0f} MiB\n")
    print_table(["engine", "peak MiB", "x weights", "note"], rows)
    write_json(arguments.json, {"arguments": settings_of(arguments), "memory": results})


def _cells(name: str, result: dict[str, Any]) -> list[str]:
    if name in result["missing"]:
        return ["-", "-", result["missing"][name]]
    peak_mib = result["peak_mib"]
    weights_mib = result["parameters"] * 4 / 2**20
    return [f"{peak_mib:.0f}", f"{peak_mib / weights_mib:.2f}", ""]


def _run(arguments: argparse.Namespace, script: str, name: str) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER_VARIABLES)}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "result.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(arguments.ranks), script]
        options = ["--engines", name, "--json", str(answer), "--no-check", "--rounds", "1"]
        for key in ("dtype", "model", "batch", "length", "clip", "steps", "warm_up", "deepspeed_adam"):
            options += [f"--{key.replace('_', '-')}", str(getattr(arguments, key))]
        run = subprocess.run([*launcher, *options], env=environment, capture_output=True, text=True)
        if run.returncode != 0:
            raise RuntimeError(f"the run of {name} failed:\n{run.stdout}{run.stderr}")
        result: dict[str, Any] = json.loads(answer.read_text())
        return result
