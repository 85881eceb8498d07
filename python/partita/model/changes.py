"""What may not happen to a model while an engine trains it, and noticing that it did."""

from __future__ import annotations

from itertools import chain
from operator import methodcaller
from typing import Any

from torch import nn

from partita.units import Unit

_values = methodcaller("values")  # of dicts, and of what modules of TorchScript have in their place


class ModelGuard:
    """Checks before every update that it reaches the parameters that the model uses, and all that want to be
    trained."""

    def __init__(self, model: nn.Module, units: list[Unit], untrained: dict[str, nn.Parameter]) -> None:
        self._model = model
        self._units = units
        self._frozen = [(name, p) for name, p in untrained.items() if not p.requires_grad]
        self._trained = {p: slot.name for u in units for slot, p in zip(u.layout.slots, u.parameters, strict=True)}
        self._known = {*self._trained, *untrained.values()}
        self._snapshot()

    def check(self) -> None:
        """Called when an update is due.

        Raises:
            RuntimeError: since initialize(), a parameter or its memory was replaced, or one was unfrozen or added;
                names it.
        """
        for unit in self._units:
            unit.check_parameters_in_place()
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                raise RuntimeError(
                    f"parameter '{name}' was frozen at initialize() and requires gradients now: it has no optimizer "
                    "state and would not be trained; freeze it again, or initialize() anew"
                )
        if self._now() != self._then:
            self._check_registered()
            self._snapshot()

    def _check_registered(self) -> None:
        """Modules may be wrapped or exchanged, as long as the parameters stay the same objects."""
        present = {p: name for name, p in self._model.named_parameters()}
        for parameter, name in self._trained.items():
            if parameter not in present:
                raise RuntimeError(
                    f"parameter '{name}' is no longer in the model: it was replaced after initialize() (by assigning a "
                    "module or parameter, load_state_dict(assign=True) or the like), so training no longer reaches the "
                    "model; change the model before initialize(), and load weights without assign"
                )
        for parameter, name in present.items():
            if parameter.requires_grad and parameter not in self._known:
                raise RuntimeError(
                    f"parameter '{name}' was added to the model after initialize() and would not be trained: freeze "
                    "it, or change the model before initialize()"
                )

    def _snapshot(self) -> None:
        """Remembers what each module has, by the dicts in which modules keep it."""
        modules = list(self._model.modules())
        self._owners: list[dict[str, Any]] = [*(m._modules for m in modules), *(m._parameters for m in modules)]
        self._values = [list(owner.values()) for owner in self._owners]  # kept, so that ids stay theirs
        self._then = self._now()

    def _now(self) -> list[int]:
        return list(map(id, chain.from_iterable(map(_values, self._owners))))
