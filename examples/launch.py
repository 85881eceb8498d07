"""torchrun for a terminal: the ranks say what is wrong, in one line, and there are no tracebacks of torchrun's own.

python examples/launch.py --standalone --nproc-per-node 2 examples/pretrain_lm.py
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

PROGRAM_FAILED, MISUSED = 1, 2


def main() -> int:
    """Runs the program of the command line on its ranks; the exit code of the first one that failed."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # which torchrun does too, and says so in five lines
    logging.disable(logging.ERROR)
    try:
        run.run(run.parse_args(sys.argv[1:]))
    except ValueError as error:  # of torchrun's own options
        print(f"launch.py: error: {error}", file=sys.stderr)
        return MISUSED
    except SignalException as ended:  # Ctrl-C: the ranks have ended
        return 128 + int(ended.sigval)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode > 0:  # it has said why
            return int(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        print(f"rank {rank} was ended by {name}: the same command goes on from the last checkpoint", file=sys.stderr)
        return PROGRAM_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
