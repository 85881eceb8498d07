"""DeepSpeed's `launcher.runner`: what `accelerate launch` asks it."""

from partita.compat.deepspeed._absent import absent_names

DEEPSPEED_ENVIRONMENT_NAME = ".deepspeed_env"
"""The file in which Accelerate leaves variables for DeepSpeed's launcher of several hosts. Nothing here reads it."""

__getattr__ = absent_names(__name__)
