"""A benchmark is a list of cases, each measured by a process of its own: one that fails takes no other along.

The script that calls `run` starts itself again for each case with `--case NAME --answer FILE`, and `run` then calls its
`measure` instead. What a case answers, or why it did not, goes to the JSON file after every case.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from device import describe
from prelude import without_paths
from report import settings_of, write_json

Answer = dict[str, Any]
LOG_LINES = 25
DESCRIBE = "the device"
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def new_parser(about: str | None) -> argparse.ArgumentParser:
    """A parser of the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget-s", type=float, default=450, help="cases that come later than this are left out")
    parser.add_argument("--case-s", type=float, default=180, help="a case that takes longer is ended")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    return parser


def names(text: str) -> list[str]:
    """`a,b` as a list; an empty text as an empty list."""
    return [name for name in text.split(",") if name]


@dataclass
class Runner:
    """Starts cases, keeps to the time budget and writes down what they answer."""

    arguments: argparse.Namespace
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    # Found out by another process: this one must hold no memory of the device.
    device: Answer = field(default_factory=lambda: _in_a_process(DESCRIBE, 60))
    _begin: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        """What is left of the budget."""
        return float(self.arguments.budget_s) - (time.monotonic() - self._begin)

    def run(self, case: str) -> Answer:
        """One more answer of a case."""
        begin = time.monotonic()
        limit_s = min(float(self.arguments.case_s), self.left_s)
        answer = _in_a_process(case, limit_s) if limit_s > 1 else {"error": "no time was left for it"}
        self.answers.setdefault(case, []).append(answer)
        outcome = str(answer.get("error", "done")).partition("\n")[0]
        print(f"  {Path(sys.argv[0]).stem} {case}: {outcome}, {time.monotonic() - begin:.0f} s", flush=True)
        self.write()
        return answer

    def take_turns(self, cases: Sequence[str], rounds: int) -> None:
        """A B C, A B C, ...; a case that failed is not tried again."""
        for _ in range(rounds):
            for case in cases:
                if not any("error" in answer for answer in self.answers.get(case, [])):
                    self.run(case)

    def write(self) -> None:
        shown = {name: value for name, value in settings_of(self.arguments).items() if name not in ("case", "answer")}
        result = {"device": self.device, "arguments": shown, "cases": self.answers, **self.extra}
        write_json(self.arguments.json, result)


def run(arguments: argparse.Namespace, measure: Callable[[str], Answer], drive: Callable[[Runner], None]) -> None:
    """As a case: measures it. Otherwise: `drive` decides which cases are run."""
    if arguments.case is None:
        runner = Runner(arguments)
        runner.write()
        drive(runner)
        return
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        answer = describe(arguments.device) if arguments.case == DESCRIBE else measure(arguments.case)
    except Exception as error:
        traceback.print_exc()
        answer = {"error": f"{type(error).__name__}: {str(error)[:600]}"}
    give(arguments, answer)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of a failed engine, or a broken context, must not keep the process


def give(arguments: argparse.Namespace, answer: Mapping[str, Any]) -> None:
    """What a case answers so far; a later answer takes its place."""
    written = arguments.answer.with_suffix(".part")
    written.write_text(json.dumps(answer, default=str))
    written.rename(arguments.answer)


def _in_a_process(case: str, limit_s: float) -> Answer:
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder) / "answer.json", Path(folder) / "log"
        command = [sys.executable, *sys.argv, "--case", case, "--answer", str(path)]
        with log.open("w") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
            failure = _wait(process, limit_s)
        answer: Answer = json.loads(path.read_text()) if path.exists() else {}
        if failure:
            answer.setdefault("error", failure)
        if "error" in answer:
            answer["error"] = without_paths(answer["error"])
            answer["log"] = without_paths(log.read_text(errors="replace")).splitlines()[-LOG_LINES:]
        return answer


def _wait(process: subprocess.Popen[bytes], limit_s: float) -> str | None:
    """Why the process did not end well, if it did not."""
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"ended after {limit_s:.0f} s"
    return f"exit status {code}" if code else None
