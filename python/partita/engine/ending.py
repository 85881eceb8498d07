"""What an engine says when it ends."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from partita.model import Accumulation

logger = logging.getLogger("partita")


def warn_of_unfinished(accumulations: Sequence[Accumulation]) -> None:
    """Warns of micro-batches that were in no update, unless an error has ended the training."""
    if sys.exc_info()[1] is not None or getattr(sys, "last_value", None) is not None:
        return
    accumulation = max(accumulations, key=lambda a: a.unfinished)
    if accumulation.unfinished:
        logger.warning(
            "the training ends in mid-accumulation: %d micro-batch(es) after the last update, which comes after every "
            "%d (gradient_accumulation_steps); their gradients are dropped: make the number of batches a multiple",
            accumulation.unfinished,
            accumulation.micro_batches,
        )
