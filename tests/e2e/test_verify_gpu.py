"""bench/gpu/verify.sh: sections that hang or fail take nothing from the others, and what a GPU's machine is asked to do
is done here on a CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench" / "gpu"


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with little grace."""
    monkeypatch.syspath_prepend(str(BENCH))
    import verify as module

    monkeypatch.setattr(module, "GRACE_S", 0.1)
    return module


def shell(verify: Any, name: str, script: str, limit_s: float = 30) -> Any:
    return verify.Section(name, ["sh", "-c", script], limit_s)


def outcomes(verification: Any) -> dict[str, str]:
    return {ended.name: ended.outcome for ended in verification.ended}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_section_that_hangs_is_ended_with_all_its_processes_and_the_others_run(verify, tmp_path):
    """Those of benchmarks' cases are in sessions of their own."""
    hangs = f"setsid sleep 1000 & echo $! > {tmp_path}/pid; echo hanging; exec sleep 1000"
    verification = verify.Verification(tmp_path, 60)
    verification.run(
        [
            [shell(verify, "hangs", hangs, limit_s=1), shell(verify, "beside", "echo fine")],
            [shell(verify, "after", 'test "$SECTION_SECONDS" = 29'), shell(verify, "fails", "echo why; exit 3")],
        ]
    )
    expected = {"beside": "passed", "hangs": "ended after 1 s", "after": "passed", "fails": "exit status 3"}
    assert outcomes(verification) == expected
    assert not is_alive(int((tmp_path / "pid").read_text()))
    shown, is_well = verify.report(tmp_path, verification.ended)
    assert not is_well
    assert "-- hangs: ended after 1 s\nhanging" in shown and "-- fails: exit status 3\nwhy" in shown


def test_what_comes_after_the_time_is_left_out(verify, tmp_path):
    verification = verify.Verification(tmp_path, 1.5)
    verification.run([[shell(verify, "long", "sleep 1000")], [shell(verify, "late", "true")]])
    seen = outcomes(verification)
    assert seen["long"].startswith("ended after") and seen["late"] == "no time was left for it"


def test_without_a_build_nothing_is_tried(verify, tmp_path):
    verification = verify.Verification(tmp_path, 60)
    verification.run(
        [[shell(verify, "build", "exit 1"), shell(verify, "cpp", "true")], [shell(verify, "more", "true")]]
    )
    assert outcomes(verification) == {"build": "exit status 1", "cpp": "passed"}


def test_what_is_said_fits_a_terminal_whatever_failed(verify, tmp_path):
    log = tmp_path / "x.log"
    log.write_text("words " * 1000)
    checks = {f"check {i}": {"outcome": "failed", "summary": "words " * 50} for i in range(200)}
    (tmp_path / "pytest.json").write_text(json.dumps({"checks": checks}))
    ended = [verify.Ended(f"section {i}", "exit status 1", 1.0, log) for i in range(20)]
    assert 8000 < len(verify.report(tmp_path, ended)[0]) < 11_500


HOST = {"steps": 20, "watched": True, "raised": None, "skipped_steps": 0, "where": []}
CHECK = {"summary": "", "seconds": 1.0}


@pytest.mark.parametrize(
    "name, result, is_well",
    [
        ("pytest", {"checks": {"pytest": {"outcome": "passed", **CHECK}}}, True),
        ("pytest", {"checks": {"pytest": {"outcome": "failed", **CHECK}}}, False),
        ("racecheck", {"checks": {"racecheck": {"outcome": "left out", "why": "there is none"}}}, True),
        ("host_sync", {"cases": {"sync fp16 0": [{**HOST, "synchronisations": 0}]}}, True),
        ("host_sync", {"cases": {"sync fp16 0": [{**HOST, "synchronisations": 1}]}}, False),
        ("host_sync", {"cases": {"sync fp16 0": [{"error": "no time was left for it"}]}}, False),
        ("host", {"cases": {"time fp32 partita0": [{"median_ms": 9.0, "parameters": 1000}]}}, True),
    ],
)
def test_what_is_wrong_is_no_matter_of_speed(verify, tmp_path, name, result, is_well):
    (tmp_path / f"{name}.json").write_text(json.dumps(result))
    passed = verify.Ended(name, "passed", 1.0, tmp_path / "log")
    text, seen = verify.report(tmp_path, [passed])
    assert seen == is_well, text


def test_limits_add_up_to_less_than_a_call_may_take(verify, tmp_path):
    """So that every section gets its own, whatever the others do."""
    setting = verify.Setting(tmp_path, tmp_path, "cuda", small=False, installed=False)
    for phases_of, seconds in verify.CALLS.values():
        phases = phases_of(setting)
        slowest = sum(max(section.limit_s for section in phase) for phase in phases if phase[0].name != "build")
        assert slowest <= seconds <= 490
        names = [section.name for phase in phases for section in phase]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("said, expected", [("9.0\n", "90-real"), ("12.1\n8.6\n", "121-real"), ("No devices\n", "")])
def test_the_build_is_for_the_gpu_that_is_there(verify, tmp_path, monkeypatch, said, expected):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{said}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert verify.architecture_here() == expected


def test_an_interrupted_call_leaves_its_results(tmp_path):
    """SIGTERM, as `timeout` sends it."""
    command = ["bash", str(BENCH / "verify.sh"), "measure", "--installed", "--device", "cpu", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    log = tmp_path / "results" / "gpt2.log"
    until = time.monotonic() + 60
    while not log.exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said
    with tarfile.open(tmp_path / "results.tgz") as tar:
        assert "gpt2.log" in tar.getnames()


def test_what_is_brought_is_what_the_package_needs(monkeypatch):
    """Beside torch, and what comes with it."""
    monkeypatch.syspath_prepend(str(BENCH))
    import requirements
    from packaging.requirements import Requirement

    project = {
        "project": {
            "dependencies": ["torch>=2", "numpy", "needed>=3"],
            "optional-dependencies": {"test": ["pytest>=8", "transformers"]},
        },
        "build-system": {"requires": ["builder>=1"]},
    }
    names = [Requirement(text).name for text in requirements.to_bring(project)]
    assert names == ["needed", "builder", "pytest", "packaging"]


# -- the calls themselves


def call(what: str, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(BENCH / "verify.sh"), what, "--installed", "--device", "cpu", "--out", str(out), *options]
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, capture_output=True, text=True, timeout=1300, env=environment)


@pytest.mark.slow
@pytest.mark.timeout(1400)
@pytest.mark.parametrize(
    "what, files",
    [
        ("check", ["cpp", "rehearsal", "host_sync", "adam", "optimizer_step", "host"]),
        ("measure", ["gpt2", "offload"]),
    ],
)
def test_both_calls_on_a_cpu(tmp_path, what, files):
    """Everything that needs no GPU, with small sizes."""
    done = call(what, tmp_path, "--small", "--seconds", "1200")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "error" not in done.stdout  # targets of speed are for a GPU
    assert len(done.stdout) < 12_000
    with tarfile.open(tmp_path / "results.tgz") as tar:
        names = tar.getnames()
        assert {f"{file}.json" for file in files} <= set(names)
        assert "summary.md" in names
        for file in files:
            written = json.load(tar.extractfile(f"{file}.json"))
            assert written["setting"]["versions"]["torch"]
            assert str(ROOT) not in json.dumps(written)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["--quick", "--small", None])
def test_every_section_knows_its_options(tmp_path, size):
    """With no time for any case: the arguments are read, and the results are files of their own."""
    sections = ["kernels", "step", "sync", "time", "gpt2", "compile", "largest", "offload"]
    command = [
        "sh",
        str(BENCH / "run.sh"),
        "--installed",
        "--device",
        "cpu",
        "--results",
        str(tmp_path),
        *filter(None, [size]),
    ]
    environment = {**os.environ, "PYTHON": sys.executable, "SECTION_SECONDS": "1"}
    done = subprocess.run(
        [*command, "--only", ",".join(sections)], capture_output=True, text=True, timeout=590, env=environment
    )
    assert "usage" not in done.stderr and "unrecognized" not in done.stderr, done.stderr
    assert len(list(tmp_path.glob("*.json"))) == len(sections), done.stdout + done.stderr
