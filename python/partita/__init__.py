"""Partita: ZeRO data parallelism and mixed precision for PyTorch, on a native core."""

from partita import utils, zero
from partita.comm import CommunicationError, init_distributed
from partita.config import Config, ConfigError, default_config
from partita.engine import Engine, LifecycleError, initialize
from partita.optim import FusedAdam

__version__ = "0.1.0"
__all__ = [
    "CommunicationError",
    "Config",
    "ConfigError",
    "Engine",
    "FusedAdam",
    "LifecycleError",
    "__version__",
    "default_config",
    "init_distributed",
    "initialize",
    "utils",
    "zero",
]
