"""The `python` that tests start programs with is as the real one."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

import pytest

SHOWS = """
import atexit, os, sys
atexit.register(print, "at exit")
print(sys.argv, __name__, os.getcwd(), os.environ["MINE"], sys.path[0], os.umask(0), sys.stdin.read())
print("torch" in sys.modules, "partita" in sys.modules, file=sys.stderr)
sys.exit(3)
"""
ENDS = {"error": "1 / 0", "killed": "import os; os.kill(os.getpid(), 9)", "abort": "import os; os.abort()"}


def run(command: list[str], *arguments: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=120, **more)


@pytest.mark.parametrize("how", ["script", "code"])
def test_programs_see_the_same(python, tmp_path, how):
    """And begin with torch, but not with what is tested."""
    (tmp_path / "shows.py").write_text(SHOWS)
    program = [tmp_path / "shows.py", "a"] if how == "script" else ["-c", SHOWS, "a"]
    more: dict[str, Any] = {"cwd": tmp_path, "env": {"MINE": "1"}, "input": "in", "umask": 0o027}
    warm, real = run(python.command, *program, **more), run([sys.executable], *program, **more)
    assert (warm.returncode, warm.stdout) == (real.returncode, real.stdout)
    assert (warm.stderr, real.stderr) == ("True False\n", "False False\n")


@pytest.mark.parametrize("how", ENDS)
def test_programs_end_the_same(python, how):
    warm, real = run(python.command, "-c", ENDS[how]), run([sys.executable], "-c", ENDS[how])
    assert (warm.returncode, warm.stderr.splitlines()[-1:]) == (real.returncode, real.stderr.splitlines()[-1:])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_the_program(python, number):
    code = "import time; print('up', flush=True); time.sleep(600)"
    with subprocess.Popen([*python.command, "-c", code], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        process.send_signal(number)
        assert process.stdout.read() == ""  # so the program itself is gone
        assert process.wait(60) == -number
