"""Partita: ZeRO data parallelism and mixed precision for PyTorch, on a native core."""

from typing import TYPE_CHECKING, Any

from partita import nn, utils, zero
from partita.comm import CommunicationError, init_distributed
from partita.config import ConfigError, add_config_arguments, default_config
from partita.data import RepeatingLoader
from partita.engine import Engine, LifecycleError, PipelineEngine, Preempted, initialize
from partita.optim import FusedAdam

if TYPE_CHECKING:
    from partita.config import Config
else:  # see [Note: pydantic when a config is needed]

    def __getattr__(name: str) -> Any:
        if name == "Config":
            from partita.config import Config

            return Config
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"
__all__ = [
    "CommunicationError",
    "Config",
    "ConfigError",
    "Engine",
    "FusedAdam",
    "LifecycleError",
    "PipelineEngine",
    "Preempted",
    "RepeatingLoader",
    "__version__",
    "add_config_arguments",
    "default_config",
    "init_distributed",
    "initialize",
    "nn",
    "utils",
    "zero",
]


def __dir__() -> list[str]:
    """What is public, and what every module has."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__") and name.endswith("__"))})
