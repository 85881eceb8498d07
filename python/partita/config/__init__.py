"""The JSON configuration: models, loading with errors that name keys, batch-size arithmetic."""

from partita.config.batch_sizes import BatchSizes, resolve_batch_sizes
from partita.config.errors import ConfigError
from partita.config.load import load_config
from partita.config.models import Config, ZeroConfig
from partita.config.nearest import suggest
from partita.config.save import default_config, save_config

__all__ = [
    "BatchSizes",
    "Config",
    "ConfigError",
    "ZeroConfig",
    "default_config",
    "load_config",
    "resolve_batch_sizes",
    "save_config",
    "suggest",
]
