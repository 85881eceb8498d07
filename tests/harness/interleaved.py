"""A program: two calls that change a folder of checkpoints, in every order of their steps with two changes of turn.

The first call runs up to one of its steps, the second up to one of its own, the first to its end, the second to its
end. A step is a call of the system that Python tells of (sys.audit) with a name in the folder. Runs below fault_shim.c
(LD_PRELOAD). Arguments: an empty folder, the name of a scenario, and N, to try every Nth order. Prints JSON: how many
orders were tried, and a line for every one that went wrong.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread, current_thread
from types import ModuleType

# The real modules, without what their packages import: a process without torch.
for _name in ("partita", "partita.checkpoint"):
    _spec = importlib.util.find_spec(_name)
    assert _spec is not None
    sys.modules[_name] = ModuleType(_name)
    sys.modules[_name].__path__ = list(_spec.submodule_search_locations or [])

from checkpoints import FOREIGN, add_foreign, save, version_of  # noqa: E402
from partita.checkpoint.commit import sweep  # noqa: E402
from partita.checkpoint.folder import find, prune  # noqa: E402

SHIM = ctypes.CDLL(None)
SHIM.fault_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_char_p]
STEPS = ("open", "os.listdir", "os.scandir", "os.rename", "os.remove", "os.rmdir", "os.link", "ctypes.dlsym")

Action = Callable[[Path], object]


def _old(directory: Path) -> None:
    add_foreign(save(directory, "a", 1, "2026-01-01T12:00:00Z"))


def _with_leftover(directory: Path) -> None:
    """A save that died behind its second step has left version 1, and its successor is version 2."""
    add_foreign(save(directory, "a", 1, "2026-01-01T12:00:00Z"))
    (directory / "a").rename(directory / ".a.old-00000001")
    add_foreign(save(directory, "a", 2, "2026-01-02T12:00:00Z"))


def _two(directory: Path) -> None:
    save(directory, "b", 9, "2026-01-03T12:00:00Z")
    _old(directory)
    (directory / "latest").write_text("b")


def _save(version: int) -> Action:
    return lambda directory: save(directory, "a", version, f"2026-02-0{version}T12:00:00Z")


@dataclass(frozen=True)
class Scenario:
    """possible: versions of the tag `a` while the calls are under way. done: those when both have ended."""

    before: Action
    first: Action
    second: Action
    possible: set[int]
    done: set[int]
    exchange: bool = True
    foreign: bool = True


SCENARIOS = {
    "two saves": Scenario(_old, _save(3), _save(4), {1, 3, 4}, {3, 4}),
    "two saves without exchange": Scenario(_old, _save(3), _save(4), {1, 3, 4}, {3, 4}, exchange=False),
    "save and sweep": Scenario(_with_leftover, _save(3), sweep, {2, 3}, {3}, exchange=False),
    "sweep and save": Scenario(_with_leftover, sweep, _save(3), {2, 3}, {3}, exchange=False),
    "save and prune": Scenario(_two, _save(3), lambda d: prune(d, 1), {0, 1, 3}, {3}, exchange=False, foreign=False),
    "prune and save": Scenario(_two, lambda d: prune(d, 1), _save(3), {0, 1, 3}, {3}, exchange=False, foreign=False),
    "save and find": Scenario(_old, _save(3), lambda d: version_at(d), {1, 3}, {3}, exchange=False),
    "find and save": Scenario(_old, lambda d: version_at(d), _save(3), {1, 3}, {3}, exchange=False),
}


class Turn(Thread):
    """A call that runs up to a step, stops there, and goes on when it is told."""

    def __init__(self, action: Action, directory: Path, stop_at: int) -> None:
        super().__init__(daemon=True)
        self._action, self._directory, self._stop_at = action, directory, stop_at
        self._stands, self._goes_on = Event(), Event()
        self.steps = 0
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._action(self._directory)
        except Exception as error:
            self.error = error
        self._stands.set()

    def step(self) -> None:
        self.steps += 1
        if self.steps == self._stop_at:
            self._stands.set()
            self._goes_on.wait()

    def begin(self) -> None:
        """Returns when the call has come to its step, or to its end."""
        self.start()
        self._stands.wait()

    def end(self) -> None:
        self._goes_on.set()
        self.join()


def on_event(event: str, arguments: tuple[object, ...]) -> None:
    turn = current_thread()
    if event not in STEPS or not isinstance(turn, Turn):
        return
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT:
        return  # files in its own hidden folder, and claims: they have tests of their own
    turn.step()


def version_at(directory: Path) -> int:
    """The version of `a`; 0 if there is none."""
    found = find(directory, "a")
    return found.manifest.step


def problems(scenario: Scenario, work: Path, first_stop: int, second_stop: int) -> tuple[list[str], int, int]:
    """What went wrong in one order, and the numbers of steps of both calls."""
    first, second = Turn(scenario.first, work, first_stop), Turn(scenario.second, work, second_stop)
    wrong = []
    first.begin()
    second.begin()
    look(scenario, work, scenario.possible, wrong)
    first.end()
    look(scenario, work, scenario.possible, wrong)
    second.end()
    wrong += [f"{turn.error!r}" for turn in (first, second) if turn.error is not None]
    look(scenario, work, scenario.done, wrong)
    sweep(work)
    left = {"a", "b", "latest"} if (work / "b").exists() else {"a", "latest"}
    if set(os.listdir(work)) != left:
        wrong.append(f"left is {sorted(os.listdir(work))}")
    elif scenario.foreign and (lost := FOREIGN.keys() - set(os.listdir(work / "a"))):
        wrong.append(f"lost is {sorted(lost)}")
    else:
        version_of(find(work, "a"))
    return wrong, first.steps, second.steps


def look(scenario: Scenario, work: Path, versions: set[int], wrong: list[str]) -> None:
    try:
        version = version_at(work)
    except Exception as error:
        if 0 not in versions:
            wrong.append(f"the tag is not there: {error}")
        return
    if version not in versions:
        wrong.append(f"the tag is version {version}")


def main() -> None:
    root, scenario, stride = Path(sys.argv[1]), SCENARIOS[sys.argv[2]], int(sys.argv[3])
    SHIM.fault_arm(os.fsencode(root), 0, 0, 0, not scenario.exchange, None)
    start, work = root / "start", root / "work"
    start.mkdir()
    scenario.before(start)
    sys.addaudithook(on_event)
    wrong: list[str] = []
    orders = 0
    first_stop, first_steps = 1, 1
    while first_stop <= first_steps:
        second_stop, second_steps = 1 + first_stop % stride, stride
        while second_stop <= second_steps:
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(start, work)
            found, first_steps, second_steps = problems(scenario, work, first_stop, second_stop)
            wrong += [f"first up to {first_stop}, second up to {second_stop}: {line}" for line in found]
            orders += 1
            second_stop += stride
        first_stop += 1
    print(json.dumps({"orders": orders, "wrong": wrong}))


if __name__ == "__main__":
    main()
