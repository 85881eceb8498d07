"""The configuration: models, answers to every key, loading with errors that name keys, batch-size arithmetic."""

from typing import TYPE_CHECKING, Any

from partita.config.answers import Answer, Finding, Ignored
from partita.config.arguments import add_config_arguments
from partita.config.auto import Given, resolve_auto
from partita.config.batch_sizes import BatchSizes, resolve_batch_sizes
from partita.config.errors import ConfigError
from partita.config.load import ConfigSource, answers_to, clean_form, load_config
from partita.config.nearest import suggest
from partita.config.parameters import ADAM_MODES, OPTIMIZERS
from partita.config.rank_local import rank_local_keys
from partita.config.save import default_config, save_config
from partita.config.text_file import read_object

if TYPE_CHECKING:
    from partita.config.models import Config
else:  # see [Note: pydantic when a config is needed]

    def __getattr__(name: str) -> Any:
        if name == "Config":
            from partita.config.models import Config

            return Config
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ADAM_MODES",
    "OPTIMIZERS",
    "Answer",
    "BatchSizes",
    "Config",
    "ConfigError",
    "ConfigSource",
    "Finding",
    "Given",
    "Ignored",
    "add_config_arguments",
    "answers_to",
    "clean_form",
    "default_config",
    "load_config",
    "rank_local_keys",
    "read_object",
    "resolve_auto",
    "resolve_batch_sizes",
    "save_config",
    "suggest",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
