"""How long `import deepspeed` and `import partita` take on top of `import torch`: fresh processes, taken in turns.

python bench/peers/import_time.py [--rounds 10] [--json FILE]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from report import print_table, spread, write_json

STATEMENTS = {
    "torch": "import torch",
    "deepspeed": "import torch, deepspeed",
    "partita": "import torch, partita",
}


def import_ms(statement: str) -> float | None:
    """Wall time of a fresh interpreter that runs `statement`; None when it fails."""
    environment = {"DS_ACCELERATOR": "cpu", **os.environ}
    start = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", statement], env=environment, capture_output=True)
    elapsed_ms = (time.perf_counter() - start) * 1e3
    return elapsed_ms if run.returncode == 0 else None


def measure(rounds: int) -> dict[str, list[float]]:
    """Times in ms by library; one round before the first fills the file cache and drops what cannot be imported."""
    names = [name for name, statement in STATEMENTS.items() if import_ms(statement) is not None]
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            elapsed_ms = import_ms(STATEMENTS[name])
            if elapsed_ms is None:
                raise RuntimeError(f"{STATEMENTS[name]!r} ran once and then failed")
            times[name].append(elapsed_ms)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    times = measure(arguments.rounds)
    if "torch" not in times:
        sys.exit("torch cannot be imported by this interpreter")
    rows = []
    for name, statement in STATEMENTS.items():
        if name in times:
            extra_ms = median(value - base for value, base in zip(times[name], times["torch"], strict=True))
            rows.append([statement, f"{median(times[name]):.0f}", spread(times[name]), f"{extra_ms:+.0f}"])
        else:
            rows.append([statement, "-", "-", "not installed, or its import fails"])
    print_table(["statement", "ms", "range", "ms over torch"], rows)
    write_json(arguments.json, {"ms": times})


if __name__ == "__main__":
    main()
