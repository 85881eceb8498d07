"""`python` for programs of tests, without the seconds of an import of torch: forked from a process that has it.

A command that begins with `WarmPython.command` is a program as with `sys.executable`: its arguments, environment,
folder, standard streams and signals, its exit code, and the end of its interpreter. What it does not show is a first
import of torch, and what acts before that, like LD_PRELOAD. Some tests start real ones.
"""

from __future__ import annotations

import array
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType

CLIENT = Path(__file__).with_name("warm_client.py")
IMPORTED = ("matplotlib.figure", "pydantic", "safetensors.torch", "torch.distributed.launcher.api", "torch._dynamo")
LONGEST_REQUEST = 1 << 20  # bytes


class WarmPython:
    """The process that programs are forked from. It ends with the block, or with this process."""

    def __init__(self, folder: Path) -> None:
        address = str(folder / "socket")
        self.command = [sys.executable, "-I", "-S", str(CLIENT), address]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        program = (
            f"import sys; sys.path[0] = {str(CLIENT.parent)!r}; import warm_python; warm_python.serve({address!r})"
        )
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(64)
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-c", program],
                stdin=subprocess.PIPE,
                env=environment | {"OMP_NUM_THREADS": "1", "LISTENER": str(listener.fileno())},
                pass_fds=[listener.fileno()],
            )

    def torchrun(self, *options: str, ranks: list[str] | None = None) -> list[str]:
        """A launcher whose ranks are forked like it, or started by this command. A script and its arguments follow."""
        return [*self.command, "-m", "torch.distributed.run", *options, "--no-python", *(ranks or self.command)]

    def __enter__(self) -> WarmPython:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(address: str) -> None:
    """Answers clients until standard input ends. Returns in each program's process when the program is over."""
    for name in IMPORTED:
        __import__(name)
    gc.collect()
    gc.freeze()
    del sys.path[0]
    listener = socket.socket(fileno=int(os.environ["LISTENER"]))
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            os.unlink(address)
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return _answer(connection)
        connection.close()
        with contextlib.suppress(ChildProcessError):  # their times then count as this process's
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _answer(connection: socket.socket) -> None:
    """Forks the program, and waits for its end or the client's."""
    text, streams = _request(connection)
    program = os.fork()
    if program == 0:
        connection.close()
        return _become(json.loads(text), streams)
    for stream in streams:
        os.close(stream)
    connection.sendall(f"{program}\n".encode())
    ended = os.pidfd_open(program)
    ready, _, _ = select.select([ended, connection], [], [])
    if ended not in ready:
        os.kill(program, signal.SIGKILL)
    _, status = os.waitpid(program, 0)
    if ended in ready:
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _request(connection: socket.socket) -> tuple[str, list[int]]:
    """One message in a line of JSON, with the client's standard streams."""
    streams = array.array("i")
    data, more, _, _ = connection.recvmsg(LONGEST_REQUEST, socket.CMSG_SPACE(3 * streams.itemsize))
    streams.frombytes(more[0][2])
    while not data.endswith(b"\n"):
        data += connection.recv(LONGEST_REQUEST)
    return data.decode(), list(streams)


def _become(request: dict[str, object], streams: list[int]) -> None:
    """Runs the program as Python's `__main__`."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])  # type: ignore[call-overload]
    os.chdir(str(request["folder"]))
    os.umask(int(request["umask"]))  # type: ignore[call-overload]
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    first, *rest = request["arguments"]  # type: ignore[misc]
    main = sys.modules["__main__"].__dict__
    for name in set(main) - {"__name__", "__builtins__", "__spec__", "__loader__", "__package__", "__doc__"}:
        del main[name]
    if first == "-m":
        sys.argv, sys.path[:0] = rest, [os.getcwd()]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv, sys.path[:0] = ["-c", *rest[1:]], [""]
        exec(compile(rest[0], "<string>", "exec"), main)
    else:
        sys.argv, sys.path[:0] = [first, *rest], [str(Path(first).parent.resolve())]
        main["__file__"] = first
        exec(compile(Path(first).read_text(), first, "exec"), main)
