"""A program: saves, prunes and sweeps, each with a fault in each of the calls that change the folder, one at a time.

Runs below fault_shim.c (LD_PRELOAD). Arguments: an empty folder, and the name of a scenario. Prints JSON: the calls of
the scenario without a fault, how many cases there were of each kind, and a line for every case that went wrong.
"""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

# Hundreds of forks, each in milliseconds: a process without torch, which committing does not need. The modules are the
# real ones; what is left out is what their packages import.
for _name in ("partita", "partita.checkpoint"):
    _spec = importlib.util.find_spec(_name)
    assert _spec is not None
    sys.modules[_name] = ModuleType(_name)
    sys.modules[_name].__path__ = list(_spec.submodule_search_locations or [])

from checkpoints import save, version_of  # noqa: E402
from partita.checkpoint.commit import sweep  # noqa: E402
from partita.checkpoint.errors import CheckpointError  # noqa: E402
from partita.checkpoint.folder import checkpoints, find, prune  # noqa: E402
from partita.checkpoint.tags import parse_leftover  # noqa: E402
from power_loss import Unsafe, outcomes, unsafe_after  # noqa: E402

SHIM = ctypes.CDLL(None)
SHIM.fault_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_char_p]
NONE, FAIL, FAIL_FROM_HERE, SHORT, KILL_BEFORE, KILL_AFTER = range(6)

FAULTS: dict[str, tuple[int, int]] = {
    "EIO": (FAIL, errno.EIO),
    "ENOSPC": (FAIL, errno.ENOSPC),
    "EIO from here on": (FAIL_FROM_HERE, errno.EIO),
    "short": (SHORT, 0),
    "killed before": (KILL_BEFORE, 0),
    "killed after": (KILL_AFTER, 0),
}
_HEX = re.compile(r"(?<=-)[0-9a-f]{8}(?=/|$)")
REMOVALS = ("unlink", "rmdir")


@dataclass(frozen=True)
class Scenario:
    """before, action: on the folder of checkpoints. Each of `tags` has one of its versions at every moment (0: none).

    done: tag -> version once the action has returned; "" is what `latest` names. tells: an error in the action is
    raised (else it is a warning in the log).
    """

    before: Callable[[Path], object]
    action: Callable[[Path], object]
    tags: dict[str, set[int]]
    done: dict[str, int]
    exchange: bool = True
    tells: bool = True


def _set_aside(directory: Path) -> None:
    """`b` was set aside, without and with a whole successor under its hidden name; `c` has its successor already."""
    save(directory, "c", 5).rename(directory / ".c.old-00000001")
    save(directory, "c", 6)
    save(directory, "b", 1).rename(directory / ".b.old-00000002")
    save(directory, "b", 2).rename(directory / ".b.old-00000003")
    save(directory, "b", 3).rename(directory / ".b.partial-00000004")
    save(directory, "b", 4).rename(directory / ".b.old-00000005")
    (directory / ".b.old-00000005" / "state.json").unlink()
    (directory / ".latest.partial-00000006").write_text("")
    for number in (3, 6):
        (directory / f".lock-0000000{number}").write_text("")


def _three(directory: Path) -> None:
    for version in (1, 2, 3):
        save(directory, f"step{version}", version)


SCENARIOS = {
    "first": Scenario(lambda d: None, lambda d: save(d / "new" / "er", "a", 2), {}, {}),
    "another tag": Scenario(
        lambda d: save(d, "a", 1), lambda d: save(d, "b", 2), {"": {1, 2}, "a": {1}, "b": {0, 2}}, {"": 2, "b": 2}
    ),
    "the same tag": Scenario(
        lambda d: save(d, "a", 1), lambda d: save(d, "a", 2), {"": {1, 2}, "a": {1, 2}}, {"": 2, "a": 2}
    ),
    "the same tag without exchange": Scenario(
        lambda d: save(d, "a", 1), lambda d: save(d, "a", 2), {"": {1, 2}, "a": {1, 2}}, {"": 2, "a": 2}, exchange=False
    ),
    "prune": Scenario(
        _three,
        lambda d: prune(d, 1),
        {"": {3}, "step3": {3}, "step2": {0, 2}, "step1": {0, 1}},
        {},
        tells=False,
    ),
    "sweep": Scenario(_set_aside, sweep, {"": {2}, "b": {2}, "c": {6}}, {"": 2, "b": 2, "c": 6}, tells=False),
}


@dataclass
class Trial:
    """One scenario in one folder: every case begins with a copy of the same state."""

    scenario: Scenario
    root: Path
    cases: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    judged: set[object] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.arm(self.root)  # without a fault: no fsync takes time
        self.work, self.copy, self.log = self.root / "work", self.root / "copy", self.root / "log"
        self.start = self.root / "start"
        self.start.mkdir()
        self.scenario.before(self.start)
        self.files = {path.name: path.read_bytes() for path in self.start.iterdir() if path.is_file()}

    def run(self) -> list[str]:
        """All cases. Returns the calls without a fault."""
        self.case("none", 0, NONE, 0, "")
        calls = [line.split("\t")[0] for line in self.log.read_text().splitlines()]
        for name, (kind, error) in FAULTS.items():
            for number, call in enumerate(calls, 1):
                if kind != SHORT or call == "write":
                    self.case(name, number, kind, error, call)
        return calls

    def case(self, name: str, number: int, kind: int, error: int, call: str) -> None:
        """One fault, and everything that may be left of it: as it is, after a power failure, after sweep() and one."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.start, self.work)
        self.log.unlink(missing_ok=True)
        killed, message = self.child(self.scenario.action, number, kind, error)
        self.cases[name] += 1
        where = f"{name}, call {number} ({call})"
        returned = not killed and not message.startswith("raised")
        if killed != (kind in (KILL_BEFORE, KILL_AFTER)):
            self.wrong.append(f"{where}: killed is {killed}")
        if problem := self.message_problem(message, call, kind, error):
            self.wrong.append(f"{where}: {problem}")
        if self.scenario.tells and kind == FAIL:
            places = [self.work / tag for tag, versions in self.scenario.tags.items() if tag and 0 not in versions]
            self.wrong += [f"{where}: nothing is at {place}" for place in places if not place.is_dir()]
        self.consequences(where, returned)
        if killed:  # the next process sweeps first
            self.child(lambda directory: sweep(directory), 0, NONE, 0)
            self.consequences(f"{where}, then sweep()", returned=False)

    def message_problem(self, message: str, call: str, kind: int, error: int) -> str:
        """What is wrong with what the program was told."""
        if kind not in (FAIL, FAIL_FROM_HERE):
            return f"said: {message}" if message else ""
        if not message:
            return "" if call in REMOVALS and self.scenario.tells else "nothing was said"
        if self.scenario.tells and not message.startswith("raised OSError"):
            return f"said: {message}"
        lacks = [part for part in (os.strerror(error), str(self.work)) if part not in message]
        return f"{lacks} not in: {message}" if lacks else ""

    def consequences(self, where: str, returned: bool) -> None:
        unsafe: Unsafe = unsafe_after(self.log.read_text() if self.log.exists() else "", self.work)
        self.wrong += [f"{where}: {violation}" for violation in unsafe.violations]
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.work, self.copy)
        self.judge(where, returned)
        for words in outcomes(self.work, self.copy, unsafe, self.files):
            self.judge(f"{where}, power failure: {words}", returned)

    def judge(self, where: str, returned: bool) -> None:
        """Looks at self.copy, and goes on with it. Most faults lead to a state that another one has led to."""
        state = (returned, *sorted((_HEX.sub("", str(path)), bytes_of(path)) for path in self.copy.rglob("*")))
        if state in self.judged:
            return
        self.judged.add(state)
        try:
            self.look(returned)
            self.go_on()
        except Exception as error:
            tree = sorted(str(path.relative_to(self.copy)) for path in self.copy.rglob("*"))
            self.wrong.append(f"{where}: {type(error).__name__}: {error} {tree}")

    def look(self, returned: bool) -> None:
        for tag, possible in self.scenario.tags.items():
            version = version_at(self.copy, tag)
            expected = {self.scenario.done[tag]} if returned and tag in self.scenario.done else possible
            assert version in expected, f"'{tag}' is version {version}, not of {expected}"
        for found in checkpoints(self.copy):
            version_of(found)
        below = self.copy / "new" / "er"
        if not self.scenario.tags and (returned or below.exists()):
            assert version_at(below, "") in ({2} if returned else {0, 2})
            assert version_at(below, "a") in ({2} if returned else {0, 2})

    def go_on(self) -> None:
        """sweep() leaves nothing hidden and nothing half, and changes nothing that counts; saving works."""
        directory = self.copy if self.scenario.tags else self.copy / "new" / "er"
        before = {tag: version_at(directory, tag) for tag in self.scenario.tags}
        sweep(directory)
        hidden = [path.name for path in directory.iterdir() if path.name.startswith(".")] if directory.exists() else []
        assert not hidden, f"sweep() leaves {hidden}"
        assert before == {tag: version_at(directory, tag) for tag in self.scenario.tags}, "sweep() changes"
        folders = {path.name for path in directory.iterdir() if path.is_dir()} if directory.exists() else set()
        assert folders == {found.tag for found in checkpoints(directory)}, "a folder is no checkpoint"
        for tag, version in (("a", 90), ("next", 91)):
            save(directory, tag, version)
            assert version_at(directory, "") == version_at(directory, tag) == version
        assert not any(parse_leftover(path.name) for path in directory.iterdir())

    def child(self, action: Callable[[Path], object], number: int, kind: int, error: int) -> tuple[bool, str]:
        """Runs the action in a process of its own: whether it was killed, and what was raised or logged."""
        told = self.root / "told"
        told.write_text("")
        pid = os.fork()
        if not pid:
            try:
                handler = logging.FileHandler(told)
                logging.getLogger("partita").addHandler(handler)
                self.arm(self.work, number, kind, error, self.log)
                action(self.work)
            except BaseException as raised:
                kinds = "OSError" if isinstance(raised, OSError) else type(raised).__name__
                told.write_text(f"raised {kinds} {raised}")
            finally:
                os._exit(0)
        status = os.waitpid(pid, 0)[1]
        return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, told.read_text()

    def arm(self, folder: Path, number: int = 0, kind: int = NONE, error: int = 0, log: Path | None = None) -> None:
        no_exchange = not self.scenario.exchange
        SHIM.fault_arm(os.fsencode(folder), number, kind, error, no_exchange, os.fsencode(log) if log else None)


def version_at(directory: Path, tag: str) -> int:
    """The version of a tag ("": of the latest), 0 if there is none; an AssertionError for a mixture."""
    try:
        return version_of(find(directory, tag or None))
    except CheckpointError:
        return 0


def bytes_of(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b"a folder"


def main() -> None:
    trial = Trial(SCENARIOS[sys.argv[2]], Path(sys.argv[1]))
    calls = trial.run()
    print(json.dumps({"calls": calls, "cases": trial.cases, "states": len(trial.judged), "wrong": trial.wrong}))


if __name__ == "__main__":
    main()
