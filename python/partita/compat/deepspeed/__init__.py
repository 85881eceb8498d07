"""DeepSpeed's public names, over Partita.

`import partita.compat.deepspeed as deepspeed` is one way. The other one leaves a program as it is: after `activate()`
(or `import partita.compat.deepspeed.auto`, or under `partita run`) `import deepspeed` gives this package.
"""

from partita import add_config_arguments, init_distributed
from partita.compat.deepspeed._absent import absent_names, watch_imports
from partita.compat.deepspeed._activate import AlreadyImportedError, activate
from partita.compat.deepspeed._version import __version__
from partita.compat.deepspeed.accelerator import get_accelerator
from partita.compat.deepspeed.engine import DeepSpeedEngine, PipelineEngine, initialize
from partita.compat.deepspeed.runtime.pipe.module import PipelineModule

DeepSpeed = DeepSpeedEngine
__version_major__, __version_minor__, __version_patch__ = (int(n) for n in __version__.partition("+")[0].split("."))

__all__ = [
    "AlreadyImportedError",
    "DeepSpeed",
    "DeepSpeedEngine",
    "PipelineEngine",
    "PipelineModule",
    "__version__",
    "activate",
    "add_config_arguments",
    "get_accelerator",
    "init_distributed",
    "initialize",
]

ELSEWHERE = {
    "DeepSpeedConfig": "runtime.config",
    "DeepSpeedConfigError": "runtime.config",
    "OnDevice": "utils",
    "checkpointing": "runtime.activation_checkpointing",
    "log_dist": "utils",
    "logger": "utils",
    "zero": "runtime",
}
"""Names of this package that are those of another module; modules are imported when they are asked for."""

watch_imports()
__getattr__ = absent_names(__name__, ELSEWHERE)
