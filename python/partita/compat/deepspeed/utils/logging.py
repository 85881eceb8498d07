"""Messages of some ranks."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

from partita.comm import place_in_job
from partita.compat.deepspeed._absent import absent_names

logger = logging.getLogger("partita")

log_levels = {name: getattr(logging, name.upper()) for name in ("debug", "info", "warning", "error", "critical")}


def log_dist(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """Logs "[Rank r] message" on the ranks that are named; `[-1]`: on all. None: only in a program of one process."""
    if _concerns(ranks):
        logger.log(level, f"[Rank {place_in_job()[0]}] {message}")


def print_dist(message: str, ranks: Sequence[int] | None = None) -> None:
    """Prints it, whatever the level of the log."""
    if _concerns(ranks):
        print(f"[Rank {place_in_job()[0]}] {message}")


@functools.lru_cache(None)
def _once(message: str, ranks: tuple[int, ...] | None, level: int) -> None:
    log_dist(message, ranks, level)


def log_dist_once(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """As `log_dist`, each message once."""
    _once(message, None if ranks is None else tuple(ranks), level)


def set_log_level_from_string(log_level_str: str, custom_logger: logging.Logger | None = None) -> None:
    """Sets the level of the log: "debug", "info", "warning", "error" or "critical".

    Raises:
        ValueError: there is no such level.
    """
    if log_level_str.lower() not in log_levels:
        raise ValueError(f"log level '{log_level_str}' is none of {list(log_levels)}")
    (custom_logger or logger).setLevel(log_levels[log_level_str.lower()])


def _concerns(ranks: Sequence[int] | None) -> bool:
    rank, world_size = place_in_job()
    wanted = list(ranks or [])
    return rank in wanted or -1 in wanted[:1] or world_size == 1


__getattr__ = absent_names(__name__)
