"""The end of a communicator over torch.distributed, in order, after a failure, or with the program."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
import weakref
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from partita.comm.calls import exception_under_way, why_ending
from partita.comm.fate import Fate, break_connections
from partita.comm.groups import OwnGroups
from partita.comm.lookout import Lookout
from partita.comm.outstanding import Outstanding
from partita.comm.patience import MessageWaits

# How long the end of a program waits for gloo's threads; what is under way when a rank has died may never end.
LET_GO_WITHIN_S = 1.0
LET_GO_AFTER_BREAK_S = 10.0  # what is under way ends then, where a loaded machine lets it
THREAD_SWITCH_S = 0.002
# How long a rank that leaves with an error waits for what it has launched: the others may take part in that, or not.
LEAVES_WITHIN_S = 1.0


@dataclass(frozen=True)
class Ending:
    """What must come to an end, apart from the communicator itself, which may be gone.

    lent: tensors that threads of gloo have; None: the backend is another one. outstanding: None where waits are the
    host's.
    """

    group: dist.ProcessGroup
    own: OwnGroups
    messages: MessageWaits
    lookout: Lookout
    fate: Fate
    lent: weakref.WeakValueDictionary[int, Tensor] | None
    outstanding: Outstanding | None

    def close(self, reason: str) -> None:
        """This rank leaves, and ends the groups that were made for the communicator."""
        self.lookout.end(f"has left the group: {reason}")
        self.messages.close()
        has_failed = exception_under_way() is not None
        self._settle(has_failed=has_failed)
        if has_failed and not self.fate.failures:
            self.own.give_up()  # the others do not end their groups now
        self.own.end(self.fate)

    def with_the_program(self) -> None:
        """Tells why this rank has ended, and waits until a group's threads have let go of all tensors. If they do not,
        the group stays for ever: letting go of it would wait for them, and so would ranks that wait for the end of this
        process."""
        self.lookout.end(f"has left the group: {why_ending()}")
        self.messages.close()
        if self.outstanding is not None and self.lent is None and not threading.main_thread().is_alive():
            # The program is ending, as that thread has. Before, a communicator that nobody has closed is garbage, which
            # ranks collect at different times: the end of NCCL on one of them waits for those of its host.
            has_failed = getattr(sys, "last_value", None) is not None
            self._settle(has_failed=has_failed)
            if has_failed and not self.fate.failures:
                self.fate.fail("its program has ended with an error")  # the others do not end now
            self.own.end(self.fate)  # else torch.distributed complains, and aborts what others wait for
        if self.lent is not None:
            self._await_threads(self.lent)

    def _settle(self, *, has_failed: bool) -> None:
        """What was launched gets done, or nobody waits for it any more."""
        if self.outstanding is None or self.fate.failures:
            return
        if not self.outstanding.settle(LEAVES_WITHIN_S if has_failed else float("inf")):
            self.fate.fail("it has left while collectives were under way")
        self.outstanding.forget()

    def _await_threads(self, lent: weakref.WeakValueDictionary[int, Tensor]) -> None:
        deadline = time.monotonic() + LET_GO_WITHIN_S
        while lent and time.monotonic() < deadline:
            time.sleep(THREAD_SWITCH_S)
        if lent:  # what is under way waits for a rank that does not come
            break_connections(self.group, dist.get_rank(self.group), dist.get_world_size(self.group))
            deadline += LET_GO_AFTER_BREAK_S
            while lent and time.monotonic() < deadline:
                time.sleep(THREAD_SWITCH_S)
        time.sleep(THREAD_SWITCH_S)  # the last one may be giving back the memory, with the lock
        if lent:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.group))
