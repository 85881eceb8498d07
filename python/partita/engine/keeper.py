"""What a run saves on its own, what it keeps, and from what it goes on: the config's `checkpoint`.

[Note: one decision] All ranks save after the same step. Steps are counted alike everywhere. A clock and a signal are
known to one rank, which adds its wish to the sums that every step all-reduces anyway (`StepController.sums`). So an
agreement costs no collective. On a GPU the host learns of the sums one step later, and the ranks act after that one.
"""

from __future__ import annotations

import logging
import os
import re
import time
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from partita.engine.signals import Signals
from partita.optim import PendingOutcome, StepController, Wishes
from partita.run import Run

if TYPE_CHECKING:
    from partita.checkpoint import Found, Protection

logger = logging.getLogger("partita")

_OWN_TAG = re.compile(r"global_step\d+")


class Preempted(SystemExit):
    """The run has saved and ends, as SIGTERM or SIGUSR1 asked: raised on all ranks, by the `step()` that saved.

    As any SystemExit it passes by `except Exception`, and ends the program with exit code 0.

    Attributes:
        path: of the checkpoint.
        step: `global_steps` then.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        super().__init__(0)
        self.path = path
        self.step = step

    def __reduce__(self) -> tuple[type[Preempted], tuple[Path, int]]:
        return type(self), (self.path, self.step)  # the argument of SystemExit is the exit code


class Keeps(Protocol):
    """The engine, as its keeper sees it."""

    client_state: dict[str, Any]

    @property
    def global_steps(self) -> int:
        """Optimizer steps so far."""

    @property
    def save_under_way(self) -> Path | None:
        """The checkpoint that is being saved beside training."""

    def save_checkpoint(self, save_dir: Path) -> Path:
        """Saves, or begins to save beside training, with `client_state`. A collective."""

    def wait_for_save(self) -> Path | None:
        """Waits for `save_under_way`. A collective."""

    def load_checkpoint(self, load_dir: Path, tag: str, *, fallback: bool) -> tuple[Path, dict[str, Any]]:
        """Loads. A collective."""


class _Wishing:
    """What this rank wishes for in each step. `minutes`: between saves, on the rank whose clock counts."""

    def __init__(self, minutes: float | None, signals: Signals) -> None:
        self._interval_s = None if minutes is None else 60 * minutes
        self._signals = signals
        self.restart_clock()

    def restart_clock(self) -> None:
        self._since_s = time.monotonic()

    def __call__(self) -> Wishes:
        is_due = self._interval_s is not None and time.monotonic() - self._since_s >= self._interval_s
        return Wishes(save=is_due, end=self._signals.came)


class Keeper:
    """Saves after steps, prunes, resumes. Does nothing where the config gives no `checkpoint.dir`.

    Args:
        exits: gives signals back what they did before.
        protection: with which the engine saves and loads.
    """

    def __init__(self, run: Run, controller: StepController, exits: ExitStack, protection: Protection) -> None:
        config = run.config.checkpoint
        self._settings = config
        self._protection = protection
        self._ranks = run.grid.world
        self._controller = controller
        self._lag = run.streams.is_asynchronous
        self._dir = None if config.dir is None else Path(os.path.abspath(config.dir))
        self._saved: tuple[int, Path] | None = None  # the step and the path of the last save
        self._unsettled: Path | None = None  # of a save that is neither verified, nor has led to a removal
        self._pending: PendingOutcome | None = None
        self._signals = Signals()
        self._wishing = _Wishing(None if self._ranks.rank else config.interval_minutes, self._signals)
        if self._dir is not None:
            controller.wishes = self._wishing
            self._signals.open()
            exits.callback(self._signals.close)
            weakref.finalize(self, self._signals.close).atexit = False  # of an engine that nobody destroys

    def resume(self, engine: Keeps) -> Path | None:
        """Goes on from the checkpoint that the config wants; its path, or None if the run begins anew. A collective.

        Raises:
            CheckpointError: the folder cannot be used, the checkpoint is not there, is damaged or does not fit.
        """
        if self._dir is None:
            return None
        from partita.checkpoint import newest, prepare  # with pydantic, which `import partita` leaves out

        prepare(self._ranks, self._dir)
        if self._settings.resume == "never":
            return None
        tag = newest(self._ranks, self._dir) if self._settings.resume == "auto" else self._settings.resume
        if tag is None:
            self._say(f"'{self._dir}' has no checkpoint: the run begins anew")
            return None
        path, engine.client_state = engine.load_checkpoint(self._dir, tag, fallback=self._settings.fallback)
        self._saved = (engine.global_steps, path)
        return path

    def after_update(self, engine: Keeps) -> None:
        """Called by all ranks when a step is complete.

        Raises:
            CheckpointError: the checkpoint was not written; on all ranks.
            Preempted: a signal has asked for it, and the checkpoint is there.
        """
        if self._dir is None:
            return
        wishes = self._wishes_of_all()
        every = self._settings.interval_steps
        if wishes.end or wishes.save or (every and engine.global_steps % every == 0):
            self._save(engine, self._dir)
        if wishes.end or engine.save_under_way is None:
            self.settle(engine)
        if wishes.end:
            self._end()

    def settle(self, engine: Keeps) -> None:
        """Waits for the last save; it is read back if the config says so, and older ones are removed. A collective.

        Raises:
            CheckpointError: the checkpoint was not written, or is not what was saved; on all ranks.
        """
        if self._unsettled is None:
            return
        path, self._unsettled = self._unsettled, None
        engine.wait_for_save()
        if self._settings.verify:
            self._verify(path)
        self._prune(path.parent)

    def _wishes_of_all(self) -> Wishes:
        """Those of the last step whose sums the host knows without waiting for a GPU."""
        now = self._controller.outcome()
        pending, self._pending = (self._pending, now) if self._lag else (now, None)
        return Wishes() if pending is None else pending.wait().wishes

    def _save(self, engine: Keeps, directory: Path) -> None:
        if self._saved is None or self._saved[0] != engine.global_steps:
            self.settle(engine)
            self._saved = (engine.global_steps, engine.save_checkpoint(directory))
            self._unsettled = self._saved[1]
        self._wishing.restart_clock()
        self._pending = None  # a wish to save that this save has met; one to end comes again with the next step

    def _verify(self, path: Path) -> None:
        from partita.checkpoint import verify_together

        verify_together(self._ranks, path, self._protection)

    def _prune(self, directory: Path) -> None:
        """On rank 0, removes old checkpoints of those that have names as the engine gives them."""
        if self._settings.keep_last is None or self._ranks.rank:
            return
        from partita.checkpoint import event_of, prune

        def is_own(found: Found) -> bool:
            return _OWN_TAG.fullmatch(found.tag) is not None

        try:
            for found in prune(directory, self._settings.keep_last, among=is_own):
                self._protection.tell(directory, event_of("pruned", found))
        except OSError as error:
            logger.warning("the old checkpoints in '%s' cannot be removed: %s", directory, error)

    def _end(self) -> None:
        assert self._saved is not None
        step, path = self._saved
        asked = self._signals.name or "SIGTERM or SIGUSR1 on another rank"
        self._say(f"{asked}: saved '{path}' at step {step}, and the run ends; started again, it goes on from there")
        self._signals.forget()
        raise Preempted(path, step)

    def _say(self, text: str) -> None:
        if self._ranks.rank == 0:
            logger.info(text)
