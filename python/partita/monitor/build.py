"""The sinks that a config asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from partita.config import ConfigError
from partita.monitor.files import CsvSink, JsonLinesSink
from partita.monitor.services import CometSink, TensorBoardSink, WandbSink
from partita.monitor.sink import Sink

if TYPE_CHECKING:
    from partita.config import Config

_LIBRARIES = {
    "tensorboard": ("tensorboard", "'partita[monitor]'"),
    "wandb": ("wandb", "wandb"),
    "comet": ("comet_ml", "comet_ml"),
}


def require_libraries(config: Config) -> None:
    """Raises ConfigError, naming the section, for a sink whose library is not installed."""
    for section, (module, package) in _LIBRARIES.items():
        if getattr(config, section).enabled and find_spec(module) is None:
            raise ConfigError(
                f"{section}.enabled: the library '{module}' is not installed: pip install {package}, or set "
                f"{section}.enabled to false"
            )


def make_sinks(config: Config) -> list[Sink]:
    """All sinks of a config.

    Raises:
        ConfigError: one of them cannot begin; names its section.
    """
    made: list[Sink] = []
    for section, make in _makers(config):
        try:
            made.append(make())
        except Exception as error:  # of the disk, or whatever a service raises
            for sink in made:
                sink.close()
            raise ConfigError(f"{section}: cannot be written: {str(error) or type(error).__name__}") from error
    return made


def _makers(config: Config) -> Iterator[tuple[str, Callable[[], Sink]]]:
    directory, board, table = config.monitor.dir, config.tensorboard, config.csv_monitor
    if directory is not None:
        yield "monitor.dir", lambda: JsonLinesSink(Path(directory))
    if board.enabled:
        yield "tensorboard", lambda: TensorBoardSink(Path(board.output_path) / board.job_name)
    if table.enabled:
        yield "csv_monitor", lambda: CsvSink(Path(table.output_path) / table.job_name)
    if config.wandb.enabled:
        yield "wandb", lambda: WandbSink(config)
    if config.comet.enabled:
        yield "comet", lambda: CometSink(config)
