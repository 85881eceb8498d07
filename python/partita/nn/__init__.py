"""What models are built of: functions beside those of torch.nn."""

from partita.nn import functional

__all__ = ["functional"]
