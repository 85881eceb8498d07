"""Lightning over Partita: `Trainer(strategy=PartitaStrategy(config=...))`."""

from partita.integrations.lightning.precision import PartitaPrecision
from partita.integrations.lightning.strategy import PartitaStrategy

__all__ = ["PartitaPrecision", "PartitaStrategy"]
