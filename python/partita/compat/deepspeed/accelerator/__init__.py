"""DeepSpeed's `accelerator`: the device that programs train on."""

from partita.compat.deepspeed._absent import absent_names
from partita.compat.deepspeed.accelerator.real_accelerator import Accelerator, get_accelerator

__all__ = ["Accelerator", "get_accelerator"]

__getattr__ = absent_names(__name__)
