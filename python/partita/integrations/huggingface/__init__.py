"""Accelerate and Trainer over Partita: `Accelerator` and `Trainer` with one class changed."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

_TRAINER = ("accelerate", "transformers")
_NEEDS = {"PartitaAccelerator": ("accelerate",), "PartitaMixin": _TRAINER, "PartitaTrainer": _TRAINER}

if TYPE_CHECKING:
    from partita.integrations.huggingface.accelerator import PartitaAccelerator
    from partita.integrations.huggingface.trainer import PartitaMixin, PartitaTrainer
else:

    def __getattr__(name: str) -> Any:
        """Who uses the accelerator alone needs no transformers."""
        for library in _NEEDS.get(name, ()):
            if find_spec(library) is None:
                raise ImportError(f"{name} needs {library}: pip install {' '.join(_NEEDS[name])}")
        if name == "PartitaAccelerator":
            from partita.integrations.huggingface.accelerator import PartitaAccelerator

            return PartitaAccelerator
        if name in ("PartitaMixin", "PartitaTrainer"):
            from partita.integrations.huggingface import trainer

            return getattr(trainer, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["PartitaAccelerator", "PartitaMixin", "PartitaTrainer"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
