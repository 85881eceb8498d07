"""The JSON configuration: models, loading with errors that name keys, batch-size arithmetic."""

from typing import TYPE_CHECKING, Any

from partita.config.arguments import add_config_arguments
from partita.config.batch_sizes import BatchSizes, resolve_batch_sizes
from partita.config.errors import ConfigError
from partita.config.load import ConfigSource, load_config
from partita.config.nearest import suggest
from partita.config.rank_local import rank_local_keys
from partita.config.save import default_config, save_config

if TYPE_CHECKING:
    from partita.config.models import Config
else:  # see [Note: pydantic when a config is needed]

    def __getattr__(name: str) -> Any:
        if name == "Config":
            from partita.config.models import Config

            return Config
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BatchSizes",
    "Config",
    "ConfigError",
    "ConfigSource",
    "add_config_arguments",
    "default_config",
    "load_config",
    "rank_local_keys",
    "resolve_batch_sizes",
    "save_config",
    "suggest",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
