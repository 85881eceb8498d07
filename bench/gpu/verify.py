"""The two calls of verify.sh, each within a time limit: sections with limits of their own, one tar of results."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import FrameType

ROOT = Path(__file__).resolve().parents[2]
HERE = "bench/gpu"
SITE = ROOT / "build/gpu/site"  # where run.sh installs the package
# What is printed last fits into 12,000 characters: the ends of logs of what failed, and the table.
FAILURES_CHARACTERS, TABLE_CHARACTERS = 3500, 7500
TAIL_LINES, TAIL_CHARACTERS = 8, 700  # of a section that failed
GRACE_S = 5.0  # between the end of a section's own budget and that of its processes


@dataclass(frozen=True)
class Section:
    """A command that ends within a limit, or is ended."""

    name: str
    command: list[str]
    limit_s: float

    def within(self, limit_s: float) -> dict[str, str]:
        """Environment that tells the command its budget."""
        return {**os.environ, "SECTION_SECONDS": str(max(1, int(limit_s - 2 * GRACE_S)))}


@dataclass(frozen=True)
class Ended:
    """What came of a section."""

    name: str
    outcome: str  # "passed", or why not
    seconds: float
    log: Path

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


@dataclass(frozen=True)
class Setting:
    """Where things are, and how much is done."""

    folder: Path  # what `prepare` has made
    results: Path
    device: str
    small: bool
    installed: bool  # the package that Python has is verified; else the tree's is built
    patience: float = 1.0  # times the limits of the sections

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def build(self, limit_s: float) -> Section:
        return Section("build", [*self._run("none"), *self._sizes()], self.patience * limit_s)

    def benchmark(self, section: str, limit_s: float) -> Section:
        which = "--installed" if self.installed else "--no-build"
        return Section(section, [*self._run(section), which, *self._sizes()], self.patience * limit_s)

    def check(self, part: str, limit_s: float) -> Section:
        limit_s *= self.patience
        program = str(self.folder / "partita_cuda_tests")
        command = [sys.executable, f"{HERE}/checks.py", "--parts", part, "--program", program, "--device", self.device]
        command += ["--budget-s", str(limit_s - GRACE_S), "--json", str(self.results / f"{part}.json")]
        return Section(part, command, limit_s)

    def _run(self, section: str) -> list[str]:
        command = ["sh", f"{HERE}/run.sh", "--only", section, "--results", str(self.results), "--no-table"]
        return [*command, "--device", self.device]

    def _sizes(self) -> list[str]:
        return ["--small"] if self.small else ["--quick"]


# A phase is what runs side by side; nothing is timed beside anything else.
Phase = Sequence[Section]


def checking(setting: Setting) -> list[Phase]:
    """What is right or wrong, then the timings that matter most."""
    parts = ["pytest", "rehearsal", "queue", "memcheck", "racecheck"] if setting.on_gpu else ["rehearsal"]
    build = [] if setting.installed else [setting.build(120)]
    return [
        [*build, setting.check("cpp", 120)],
        [*(setting.check(part, 165) for part in parts), setting.benchmark("sync", 165)],
        [setting.benchmark("kernels", 75)],
        [setting.benchmark("step", 65)],
        [setting.benchmark("time", 50)],
    ]


def measuring(setting: Setting) -> list[Phase]:
    """Whole models, and offload with all cores. The machine may be another one than that of the check."""
    build = [] if setting.installed or (SITE / "partita").exists() else [[setting.build(100)]]
    return [*build, [setting.benchmark("gpt2", 130)], [setting.benchmark("offload", 95)]]


CALLS = {"check": (checking, 490.0), "measure": (measuring, 235.0)}


class Verification:
    """Runs phases until the time is over, and keeps what came of each section.

    Attributes:
        ended: the sections, in the order in which they ended.
    """

    def __init__(self, results: Path, seconds: float) -> None:
        self._results = results
        self._begin = time.monotonic()
        self._deadline = self._begin + seconds
        self._starting = Lock()  # a process that begins, or the end of all
        self._is_over = False
        self._processes: list[subprocess.Popen[bytes]] = []
        self.ended: list[Ended] = []

    def run(self, phases: Sequence[Phase]) -> None:
        for phase in phases:
            with ThreadPoolExecutor(len(phase)) as pool:
                list(pool.map(self._section, phase))
            if any(ended.name == "build" and not ended.passed for ended in self.ended):
                self._say("the build has failed: nothing else can be done")
                return

    def end(self) -> None:
        """No process of a section goes on, and none begins."""
        with self._starting:
            self._is_over = True
        for process in self._processes:
            _kill(process)

    def _section(self, section: Section) -> None:
        begin, log = time.monotonic(), self._results / f"{section.name}.log"
        limit_s = min(section.limit_s, self._deadline - begin)
        if limit_s <= 2 * GRACE_S:
            log.write_text("")
            outcome = "no time was left for it"
        else:
            outcome = self._watched(section, limit_s, log)
        self.ended.append(Ended(section.name, outcome, time.monotonic() - begin, log))
        self._say(f"{section.name}: {outcome}, {time.monotonic() - begin:.0f} s")

    def _watched(self, section: Section, limit_s: float, log: Path) -> str:
        with log.open("wb") as output, self._starting:
            if self._is_over:
                return "interrupted"
            process = subprocess.Popen(
                section.command,
                env=section.within(limit_s),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=ROOT,
            )
            self._processes.append(process)
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            _kill(process)
            return f"ended after {limit_s:.0f} s"
        return "passed" if status == 0 else f"exit status {status}"

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._begin:4.0f} s  {text}", flush=True)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started, also sessions of their own that its benchmarks' cases have."""
    for pid in [*_descendants(process.pid), process.pid]:
        try:
            os.killpg(os.getpgid(pid), signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
    process.wait()


def _descendants(parent: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, _, rest = stat.read_text().rpartition(")")
        except OSError:
            continue
        children.setdefault(int(rest.split()[1]), []).append(int(stat.parent.name))
    found, open_ = [], [parent]
    while open_:
        new = children.get(open_.pop(), [])
        found += new
        open_ += new
    return found


def architecture_here() -> str:
    """That of the first GPU, for the compiler; "" where nobody knows."""
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f"{said[0].replace('.', '')}-real" if said and said[0].replace(".", "").isdigit() else ""


def packed(results: Path, out: Path) -> Path:
    """One file with all results."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for file in sorted(results.iterdir()):
            tar.add(file, file.name)
    return path


def report(results: Path, ended: Sequence[Ended]) -> tuple[str, bool]:
    """The ends of the logs of what failed, then the table, within what a terminal keeps; and whether all is well."""
    failures = []
    for section in ended:
        if not section.passed:
            tail = section.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
            failures += [f"-- {section.name}: {section.outcome}", "\n".join(tail)[-TAIL_CHARACTERS:]]
    command = [sys.executable, f"{HERE}/summary.py", str(results), "--markdown", str(results / "summary.md")]
    table = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    shown = (table.stdout + table.stderr)[-TABLE_CHARACTERS:]
    text = "\n".join(failures)[:FAILURES_CHARACTERS] + shown
    return text, table.returncode == 0 and all(section.passed for section in ended)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("call", choices=CALLS)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(".gpu"))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "build/gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--installed", action="store_true")
    parser.add_argument("--seconds", type=float, help="in all; each section's limit is in proportion")
    arguments = parser.parse_args()
    phases_of, usual_seconds = CALLS[arguments.call]
    seconds = arguments.seconds or usual_seconds
    results = arguments.out.resolve() / "results" if arguments.device == "cpu" else ROOT / "build/gpu/results"
    results.mkdir(parents=True, exist_ok=True)
    patience = seconds / usual_seconds
    folder = arguments.folder.resolve()
    setting = Setting(folder, results, arguments.device, arguments.small, arguments.installed, patience)
    if setting.on_gpu and (architecture := architecture_here()):
        os.environ.setdefault("CUDA_ARCHITECTURES", architecture)
    os.environ.update(PYTHONUNBUFFERED="1", PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
    if (setting.folder / "wheels").exists():
        os.environ["WHEELS"] = str(setting.folder / "wheels")
    site = "" if arguments.installed else str(SITE)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))
    verification = Verification(results, seconds)

    def interrupted(number: int, frame: FrameType | None) -> None:
        verification.end()  # else the threads would wait for their sections
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, interrupted)
    try:
        verification.run(phases_of(setting))
        text, is_well = report(results, verification.ended)
        print(text, flush=True)
    finally:
        verification.end()
        print(packed(results, arguments.out), flush=True)
    sys.exit(not is_well)


if __name__ == "__main__":
    main()
