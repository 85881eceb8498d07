"""Process groups of torch.distributed that live as long as the communicator they were made for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

GROUP_TIMEOUT = timedelta(minutes=10)  # of torch.distributed, unless the program says otherwise


def backend_for(device: torch.device) -> str:
    """The backend of torch.distributed that is best for a device's tensors."""
    return "nccl" if device.type == "cuda" else "gloo"


class OwnGroups:
    """The process groups that were made for one communicator. The default group, and those of the program, are none."""

    def __init__(self) -> None:
        self._groups: list[dist.ProcessGroup] = []

    @property
    def are_there(self) -> bool:
        """Whether there are any that have not ended."""
        return bool(self._groups)

    def make(self, backend: str, ranks: Sequence[int] | None = None) -> dist.ProcessGroup | None:
        """A group of these ranks of the job (None: of all); None on a rank that is not among them.

        A collective of ALL ranks of the job: torch.distributed numbers groups on each rank, by the calls there.
        """
        made = dist.new_group(None if ranks is None else list(ranks), backend=backend)
        if not isinstance(made, dist.ProcessGroup):
            return None
        self._groups.append(made)
        return made

    def end(self) -> None:
        """Ends the groups; a second call does nothing. No collective: other ranks may be later."""
        groups, self._groups = self._groups, []
        for group in reversed(groups):
            with suppress(ValueError):  # the program has ended all groups of torch.distributed before
                dist.destroy_process_group(group)
