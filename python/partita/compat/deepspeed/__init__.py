"""The public names of DeepSpeed, over Partita."""

from partita.compat.deepspeed._absent import absent_names, watch_imports

watch_imports()
__getattr__ = absent_names(__name__)
