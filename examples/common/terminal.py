"""What a terminal shows of a run, and how Ctrl-C ends it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]
from tqdm.contrib.logging import logging_redirect_tqdm  # type: ignore[import-untyped]

BAR = "{percentage:3.0f}% {bar:10} {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"
SAME_KEY_SECONDS = 0.5  # in which one Ctrl-C comes twice: from the terminal, and from torchrun


class Interrupts:
    """Lets Ctrl-C end all ranks after the same step; a second one ends them at once.

    With checkpoints the engine does it, as for SIGUSR1: it saves, and raises `partita.Preempted`. Without them
    `ends_loop` is a flag to look at.
    """

    def __init__(self, *, saves: bool, speaks: bool) -> None:
        self.requested = False
        self._since_s = 0.0
        self._saves = saves
        self._speaks = speaks
        signal.signal(signal.SIGINT, self._take)

    @property
    def ends_loop(self) -> bool:
        """Whether the training loop is to end by itself."""
        return self.requested and not self._saves

    def _take(self, *_: object) -> None:
        if not self.requested:
            self.requested = True
            self._since_s = time.monotonic()
            if self._saves:
                signal.raise_signal(signal.SIGUSR1)
            if self._speaks:
                what = "saves and ends after this step" if self._saves else "ends after a few steps, with results"
                os.write(sys.stderr.fileno(), f"\nCtrl-C: {what}; a second Ctrl-C ends at once\n".encode())
        elif time.monotonic() - self._since_s > SAME_KEY_SECONDS:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)


class Progress:
    """On a terminal a bar, elsewhere (a log, a job's output) a plain line for each `show()`; `name` begins both."""

    def __init__(self, steps: int, *, done: int, speaks: bool, name: str = "") -> None:
        has_bar = speaks and sys.stderr.isatty()
        self._prints = speaks and not has_bar
        self._steps = steps
        self._name = name and f"{name}: "
        form = self._name + BAR
        self._bar = tqdm(total=steps, initial=done, disable=not has_bar, dynamic_ncols=True, bar_format=form)
        self._logging = logging_redirect_tqdm([logging.getLogger("partita")]) if has_bar else contextlib.nullcontext()

    def __enter__(self) -> Progress:
        self._logging.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._logging.__exit__(*error)
        self._bar.close()

    def step(self) -> None:
        self._bar.update()

    def show(self, step: int, text: str) -> None:
        """Numbers of the step, in a line."""
        self._bar.set_postfix_str(text)
        if self._prints:
            print(f"{self._name}step {step}/{self._steps} {text}", file=sys.stderr, flush=True)
