"""Whether a model and a checkpoint go together: names and shapes. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.places import MODEL, PARAMETER, Place

NAMED = 5  # names in one message

Shapes = Mapping[Place, tuple[int, ...]]


class Fit:
    """Which tensors of a model a checkpoint has.

    Args:
        parameters, buffers: the model's, with their shapes.
        saved: all tensors of the checkpoint.
        aliases: other names of the model's tensors in the checkpoint.
        own_aliases: other names of the model's tensors here. A buffer that is one here may have been several there: the
            layers that share it were on several ranks.

    Attributes:
        missing: names of the model's tensors that the checkpoint does not have.
        unexpected: those of the checkpoint that the model does not have.
        reshaped: names with (saved shape, shape here).
    """

    def __init__(
        self,
        parameters: Shapes,
        buffers: Shapes,
        saved: Shapes,
        aliases: Mapping[str, str],
        own_aliases: Mapping[str, str],
    ) -> None:
        self._parameters = parameters
        here = {**parameters, **buffers}
        model = {p for p in saved if p.stem == MODEL or p.name.startswith(f"{PARAMETER}/")}
        self._sources = {place: place for place in here if place in saved}
        for place in here:
            other = Place(MODEL, aliases.get(place.name, ""))
            if place not in saved and place.stem == MODEL and other in saved:
                self._sources[place] = other
        self.missing = [place.name for place in here if place not in self._sources]
        used = set(self._sources.values())
        used |= {Place(MODEL, name) for name, first in own_aliases.items() if Place(MODEL, first) in buffers}
        self.unexpected = [place.name for place in saved if place in model and place not in used]
        shapes = {place: (saved[source], here[place]) for place, source in self._sources.items()}
        self.reshaped = {place.name: (there, own) for place, (there, own) in shapes.items() if there != own}
        self._fitting = {place for place, (there, own) in shapes.items() if there == own}

    def has(self, place: Place) -> bool:
        """Whether the checkpoint has this tensor of the model in the same shape."""
        return place in self._fitting

    def source(self, place: Place) -> Place:
        """Where the checkpoint has a tensor that it has."""
        return self._sources[place]

    def require_all(self) -> None:
        """Refuses names or shapes that differ.

        Raises:
            CheckpointError: lists them.
        """
        problems = [f"'{name}' is missing" for name in self.missing]
        problems += [f"'{name}' has shape {there}, in the model {own}" for name, (there, own) in self.reshaped.items()]
        problems += [f"'{name}' is not in the model" for name in self.unexpected]
        if problems:
            more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
            raise CheckpointError(
                f"it is of another model: {'; '.join(problems[:NAMED])}{more}{self._hint()}; load_module_strict=False "
                "loads the rest"
            )

    def require_any(self) -> None:
        """Refuses a checkpoint of which no parameter fits.

        Raises:
            CheckpointError: says what is missing.
        """
        if self._parameters and not any(place in self._fitting for place in self._parameters):
            raise CheckpointError(f"not a single parameter of the model fits: {self.differences()}{self._hint()}")

    def differences(self) -> str:
        """What is left out, in one line; "": nothing."""
        reshaped = [f"'{name}' ({there}, here {own})" for name, (there, own) in self.reshaped.items()]
        kinds = {
            "only in the model": [f"'{name}'" for name in self.missing],
            "only in the checkpoint": [f"'{name}'" for name in self.unexpected],
            "of another shape": reshaped,
        }
        return "; ".join(f"{len(names)} {kind}: {_first(names)}" for kind, names in kinds.items() if names)

    def _hint(self) -> str:
        """A prefix that all names have on one side only, as wrappers give it."""
        prefix = _prefix(self.missing, set(self.unexpected))
        if prefix and all(place.name.startswith(prefix) for place in self._parameters):
            return f". All names here begin with '{prefix}', which those of the checkpoint do not"
        prefix = _prefix(self.unexpected, set(self.missing))
        if prefix and all(name.startswith(prefix) for name in self.unexpected):
            return f". All names of the checkpoint begin with '{prefix}', which those here do not"
        return ""


def _prefix(longer: Iterable[str], shorter: set[str]) -> str:
    """With what one of the longer names, a shorter one behind it, begins."""
    for name in longer:
        parts = name.split(".")
        for i in range(1, len(parts)):
            if ".".join(parts[i:]) in shorter:
                return ".".join(parts[:i]) + "."
    return ""


def _first(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
