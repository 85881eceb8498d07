"""The tests that need a GPU: the C++ ones, the same under compute-sanitizer, and pytest's; what came of each as JSON.

    python bench/gpu/checks.py [--parts tests,sanitize] [--json FILE]

The environment may say where GoogleTest lies (GOOGLETEST, a source folder; else CMake looks for it and fetches it), for
which GPUs to compile (CUDA_ARCHITECTURES) and which tests compute-sanitizer leaves out (SANITIZER_FILTER).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prelude import without_paths
from report import write_json

PROGRAM = "build/release/tests/cpp/partita_cuda_tests"
# Without billions of elements, and without thousands of small allocations, which take minutes under it.
SANITIZER_FILTER = "-*Large*:*VeryMany*"
RACECHECK_FILTER = "*Norm*:*Adam*-*Large*:*VeryMany*"  # the kernels with shared memory
NO_TESTS = {"pytest": 5}  # exit status of a test program that has found nothing to run
TAIL_LINES = 40


@dataclass(frozen=True)
class Check:
    """A command that should exit with 0; `needs` is a program or file without which it is left out."""

    name: str
    command: list[str]
    limit_s: float
    needs: str


def build_checks() -> list[Check]:
    configure = ["cmake", "--preset", "release", "-DPARTITA_CUDA=ON"]
    if os.environ.get("GOOGLETEST"):
        configure.append(f"-DFETCHCONTENT_SOURCE_DIR_GOOGLETEST={os.environ['GOOGLETEST']}")
    # Not for whom the preset compiles, but, unless told, for whom the package does: that code is tested. What another
    # compiler than that of CI makes of registers is no reason not to measure it.
    configure += [f"-DCMAKE_CUDA_ARCHITECTURES={os.environ.get('CUDA_ARCHITECTURES', '')}", "-DCMAKE_CUDA_FLAGS="]
    compile_ = ["cmake", "--build", "--preset", "release", "--target", "partita_cuda_tests"]
    compile_ += ["--parallel", str(len(os.sched_getaffinity(0)))]
    return [Check("configure", configure, 90, "cmake"), Check("compile", compile_, 300, "cmake")]


def test_checks() -> list[Check]:
    """The large tests take turns: two of them at once need not fit into the GPU's memory."""
    ctest = ["ctest", "--test-dir", "build/release", "--output-on-failure", "--no-tests=error"]
    small = [*ctest, "-R", r"^Cuda\.", "-E", "Large", "-j", os.environ.get("CTEST_PARALLEL_LEVEL", "8")]
    large = [*ctest, "-R", r"^Cuda\..*Large", "-j", "1"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--continue-on-collection-errors", "tests"]
    return [
        Check("ctest", small, 200, "ctest"),
        Check("ctest, large", large, 120, "ctest"),
        Check("pytest", pytest, 200, "tests"),
    ]


def sanitizer_checks() -> list[Check]:
    # Tests of the error paths make calls that fail on purpose.
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--report-api-errors", "no"]
    filters = {"memcheck": SANITIZER_FILTER, "racecheck": RACECHECK_FILTER}
    return [
        Check(
            tool,
            [
                *sanitizer,
                *("--tool", tool, PROGRAM),
                *(f"--gtest_filter={os.environ.get('SANITIZER_FILTER', tests)}", "--gtest_brief=1"),
            ],
            220,
            "compute-sanitizer",
        )
        for tool, tests in filters.items()
    ]


PARTS = {"tests": test_checks, "sanitize": sanitizer_checks}


def run(check: Check, limit_s: float) -> dict[str, Any]:
    """Outcome ("passed", "failed", "left out"), seconds and the end of the output."""
    if shutil.which(check.needs) is None and not Path(check.needs).exists():
        return {"outcome": "left out", "why": f"there is no {check.needs}"}
    if limit_s <= 1:
        return {"outcome": "left out", "why": "no time was left for it"}
    begin = time.monotonic()
    process = subprocess.Popen(
        check.command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        status = str(process.returncode)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = f"ended after {limit_s:.0f} s"
    lines = without_paths(output).splitlines()
    result = {"outcome": "passed" if status == "0" else "failed", "status": status}
    if status == str(NO_TESTS.get(check.name)):
        result = {"outcome": "left out", "why": "no test is marked for it"}
    result["command"] = without_paths(" ".join(check.command))
    return result | {"seconds": time.monotonic() - begin, "summary": summary_of(lines), "tail": lines[-TAIL_LINES:]}


def summary_of(lines: list[str]) -> str:
    """The line in which a test program counts its tests; else the last one."""
    signs = ("ERROR SUMMARY", "RACECHECK SUMMARY", "tests passed", " passed", " failed", "[  PASSED  ]", "deselected")
    found = [line for line in lines if any(sign in line for sign in signs)]
    return (found or lines or [""])[-1].strip("= ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--budget-s", type=float, default=460)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    begin = time.monotonic()
    results: dict[str, dict[str, Any]] = {}
    for check in build_checks() + [check for part in arguments.parts for check in PARTS[part]()]:
        left_s = arguments.budget_s - (time.monotonic() - begin)
        results[check.name] = result = run(check, min(check.limit_s, left_s))
        print(f"  {check.name}: {result['outcome']}; {result.get('why', result.get('summary', ''))}", flush=True)
        if result["outcome"] == "failed":
            print("\n".join(f"    {line}" for line in result["tail"]), flush=True)
        write_json(arguments.json, {"checks": results})
    sys.exit(any(result["outcome"] == "failed" for result in results.values()))


if __name__ == "__main__":
    main()
