"""C2: the commit protocol: a fault in every call of a save, a prune and a sweep never costs a checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parents[1] / "harness"
# What each scenario consists of, so that none of it is left out by mistake: calls, in their number at least.
SCENARIOS = {
    "first": {"mkdir": 3, "create": 7, "write": 5, "fsync": 11, "rename": 2, "unlink": 1},
    "another tag": {"mkdir": 1, "create": 7, "write": 5, "fsync": 9, "rename": 2, "unlink": 1},
    "the same tag": {"create": 7, "link": 2, "fsync": 9, "exchange": 1, "rename": 1, "unlink": 8, "rmdir": 1},
    "the same tag without exchange": {"create": 7, "fsync": 9, "rename": 3, "unlink": 6, "rmdir": 1},
    "prune": {"create": 1, "rename": 4, "fsync": 2, "unlink": 11, "rmdir": 2},
    "sweep": {"rename": 1, "fsync": 1, "unlink": 22, "rmdir": 4},
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_fault_in_any_call_leaves_the_old_checkpoint_or_the_new_one(fault_shim, tmp_path, scenario):
    """EIO, ENOSPC, a short write, SIGKILL before and after; then a power failure that loses all that is not synced."""
    command = [sys.executable, HARNESS / "commit_faults.py", tmp_path, scenario]
    paths = os.pathsep.join([str(HARNESS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "LD_PRELOAD": str(fault_shim), "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    print(scenario, report["cases"])
    assert report["wrong"] == []
    calls = report["calls"]
    assert {name: calls.count(name) for name in SCENARIOS[scenario]} == SCENARIOS[scenario]
    writes = calls.count("write")
    assert report["cases"] == {
        "none": 1,
        **dict.fromkeys(("EIO", "ENOSPC", "EIO from here on", "killed before", "killed after"), len(calls)),
        **({"short": writes} if writes else {}),
    }
