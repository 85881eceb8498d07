"""Forty wrong configs and calls on 2 ranks: the last ten lines of the output name the thing and the way out."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import partita
import pytest
from mistakes import JOBS, MISTAKES, PRELUDE
from ranks import RankPool
from warm_python import WarmPython

LAST = 10
END = "=" * 60  # the last line of torchrun's report of an error, which has the traceback before it


def last_lines(text: str) -> str:
    return "\n".join(text.rstrip().splitlines()[-LAST:])


def _what_ranks_see(codes: list[str]) -> list[str]:
    """For each mistake: the warnings, and the traceback as torchrun shows it; '' if there is neither."""
    return [_what_is_seen(code) for code in codes]


def _what_is_seen(code: str) -> str:
    output = io.StringIO()
    handler = logging.StreamHandler(output)
    handler.setLevel(logging.WARNING)
    logger = logging.getLogger("partita")
    logger.addHandler(handler)
    names: dict[str, Any] = {}
    try:
        exec(PRELUDE, names)
        exec(code, names)
    except Exception:
        output.write(f"{traceback.format_exc()}{END}\n")
    finally:
        logger.removeHandler(handler)
        for engine in [value for value in names.values() if isinstance(value, partita.Engine)]:
            with contextlib.suppress(Exception):
                engine.destroy()
    return output.getvalue()


@pytest.fixture(scope="module")
def seen(ranks: Callable[[int], RankPool]) -> dict[str, list[str]]:
    """By mistake, what each of two ranks shows. All mistakes are made by the same two processes."""
    by_rank = ranks(2).run(_what_ranks_see, [mistake.code for mistake in MISTAKES.values()])
    return {name: [texts[i] for texts in by_rank] for i, name in enumerate(MISTAKES)}


def test_there_are_forty():
    assert len(MISTAKES) >= 40


@pytest.mark.parametrize("name", MISTAKES)
def test_the_last_ten_lines_name_the_thing_and_the_way_out(seen, name):
    """Promise 7. Every rank that fails says it, as torchrun shows the one that failed first."""
    shown = [last_lines(text) for text in seen[name] if text]
    assert shown, "no rank says anything"
    for text in shown:
        missing = [word for word in MISTAKES[name].words if word not in text]
        assert not missing, f"{missing} not in the last {LAST} lines:\n{text}"


def run_as_job(code: str, folder: Path, python: WarmPython) -> str:
    """The output of a job of two ranks under torchrun, whose program uses torch's `record`."""
    lines = [*PRELUDE.splitlines(), *code.splitlines()]
    body = "\n".join(f"    {line}" for line in lines)
    record = "from torch.distributed.elastic.multiprocessing.errors import record"
    (folder / "program.py").write_text(f"{record}\n\n@record\ndef main():\n{body}\n\nmain()\n")
    job = python.torchrun("--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [*job, str(folder / "program.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode != 0
    return done.stdout


@pytest.mark.parametrize("name", JOBS)
def test_a_job_ends_with_the_message(tmp_path, python, name):
    text = last_lines(run_as_job(JOBS[name].code, tmp_path, python))
    missing = [word for word in JOBS[name].words if word not in text]
    assert not missing, f"{missing} not in the last {LAST} lines:\n{text}"
    assert text.endswith(END)
