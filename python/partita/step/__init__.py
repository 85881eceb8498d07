"""One optimizer step."""

from partita.step.outcomes import StepLedger
from partita.step.skips import SkipGuard

__all__ = ["SkipGuard", "StepLedger"]
