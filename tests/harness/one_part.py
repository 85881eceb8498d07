"""An update of one shard, for tests of the kernels."""

from __future__ import annotations

from typing import Any

from partita._core import AdamGroup
from partita.device import kernels
from torch import Tensor


def adam(*, groups: list[AdamGroup], control: Tensor, **buffers: Any) -> None:
    """`kernels.adam` of the one part that `buffers` make."""
    kernels.adam([kernels.adam_part(**buffers)], groups, control)
