"""Import it first: it prepares the process for torch and finds `bench/peers` and the models of `examples`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# Libraries that compile on first use look for ninja, which may be installed beside this interpreter only.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
# Last, so that no file there hides one beside this.
_repository = Path(__file__).resolve().parents[2]
sys.path += [str(_repository / "bench" / "peers"), str(_repository / "examples")]


def without_paths(text: str) -> str:
    """A message as it would read on any machine: paths begin at the repository, or at the Python installation."""
    return text.replace(f"{_repository}/", "").replace(f"{sys.prefix}/", "")
