"""Starts that fail on two ranks end with the error, and not in a thread of gloo; a rank that is missing is named."""

from __future__ import annotations

import os
import signal
import socket
import subprocess

from failing_starts import failing_starts

JOBS = 6


def test_failing_starts_end_with_their_error(python):
    """Before, about a quarter of them aborted. `tests/harness/failing_starts.py 100` runs more of them."""
    assert failing_starts(JOBS, python.command) == {"error": 2 * JOBS}


def test_a_missing_rank_is_named_and_a_signal_ends_the_wait(python):
    """One rank of two is started: after 15 s it says who is waited for and where."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [*python.command, "-c", "import partita; partita.init_distributed('gloo')"]
    process = subprocess.Popen(command, env={**os.environ, **place}, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("rank 0 of 2 has waited 15 s for rank 1 to join at 127.0.0.1:" + port), line
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in process.communicate(timeout=60)[1]
    finally:
        process.kill()
