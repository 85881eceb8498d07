"""The tests that need a GPU: the C++ ones, the same under compute-sanitizer, and pytest's; what came of each as JSON.

    python bench/gpu/checks.py [--parts tests,sanitize] [--json FILE]
    python bench/gpu/checks.py --program FILE --parts cpp,pytest,rehearsal,queue,memcheck,racecheck [--json FILE]

With --program, the C++ tests are that program, built before; each part then is one that verify.sh has beside others.
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
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prelude import without_paths
from report import write_json

PROGRAM = "build/release/tests/cpp/partita_cuda_tests"
# Without billions of elements, and without thousands of small allocations, which take minutes under it.
SANITIZER_FILTER = "-*Large*:*VeryMany*:*Unpack*"
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
    environment: Mapping[str, str] = field(default_factory=dict)


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
    return [Check("ctest", small, 200, "ctest"), Check("ctest, large", large, 120, "ctest"), *pytest_checks("tests")]


def pytest_checks(*where: str) -> list[Check]:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--maxfail", "15"]
    return [Check("pytest", [*command, "--continue-on-collection-errors", *where], 200, "tests")]


def program_checks(program: str) -> list[Check]:
    return [
        Check("C++ tests", [program, "--gtest_filter=-*Large*", "--gtest_brief=1"], 120, program),
        Check("C++ tests, large", [program, "--gtest_filter=*Large*", "--gtest_brief=1"], 60, program),
    ]


def rehearsal_checks(device: str, name: str, *precisions: str, **variables: str) -> list[Check]:
    environment = {"PYTHONPATH": os.pathsep.join(["examples", "tests/harness", os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "tests/gpu/rehearsal.py", device, *precisions]
    return [Check(name, command, 240, "tests/gpu", environment | variables)]


def sanitizer_checks(tool: str, program: str = PROGRAM) -> list[Check]:
    # Tests of the error paths make calls that fail on purpose.
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--report-api-errors", "no", "--tool", tool]
    tests = os.environ.get("SANITIZER_FILTER", {"memcheck": SANITIZER_FILTER, "racecheck": RACECHECK_FILTER}[tool])
    return [Check(tool, [*sanitizer, program, f"--gtest_filter={tests}", "--gtest_brief=1"], 220, "compute-sanitizer")]


def parts(program: str | None, device: str) -> dict[str, list[Check]]:
    if program is None:
        both = [*sanitizer_checks("memcheck"), *sanitizer_checks("racecheck")]
        return {"tests": [*build_checks(), *test_checks()], "sanitize": [*build_checks(), *both]}
    small = ["bf16"] if device == "cpu" else []
    return {
        "cpp": program_checks(program),
        "pytest": pytest_checks("tests/gpu", "--ignore", "tests/gpu/test_rehearsal.py"),
        "rehearsal": rehearsal_checks(device, "rehearsal", *small),
        "queue": rehearsal_checks(device, "rehearsal, one queue", "bf16", CUDA_DEVICE_MAX_CONNECTIONS="1"),
        "memcheck": sanitizer_checks("memcheck", program),
        "racecheck": sanitizer_checks("racecheck", program),
    }


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
        env={**os.environ, **check.environment},
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
    signs += ("rehearsal:",)
    found = [line for line in lines if any(sign in line for sign in signs)]
    return (found or lines or [""])[-1].strip("= ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=["tests", "sanitize"])
    parser.add_argument("--program", help="the C++ tests, built before")
    parser.add_argument("--device", default="cuda", help="of the rehearsal")
    parser.add_argument("--budget-s", type=float, default=460)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    begin = time.monotonic()
    results: dict[str, dict[str, Any]] = {}
    known = parts(arguments.program, arguments.device)
    for check in [check for part in arguments.parts for check in known[part]]:
        if check.name in results:  # both parts need the build
            continue
        left_s = arguments.budget_s - (time.monotonic() - begin)
        results[check.name] = result = run(check, min(check.limit_s, left_s))
        print(f"  {check.name}: {result['outcome']}; {result.get('why', result.get('summary', ''))}", flush=True)
        if result["outcome"] == "failed":
            print("\n".join(f"    {line}" for line in result["tail"]), flush=True)
        write_json(arguments.json, {"checks": results})
    sys.exit(any(result["outcome"] == "failed" for result in results.values()))


if __name__ == "__main__":
    main()
