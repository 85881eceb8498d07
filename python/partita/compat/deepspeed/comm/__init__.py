"""DeepSpeed's `comm`: the collectives of torch.distributed under DeepSpeed's names."""

from partita.compat.deepspeed._absent import absent_names
from partita.compat.deepspeed.comm.comm import *  # noqa: F403
from partita.compat.deepspeed.comm.comm import __all__ as __all__

__getattr__ = absent_names(__name__)
