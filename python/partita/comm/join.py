"""Joining the ranks of a job, and saying who is waited for."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import threading
import time
import weakref
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from partita import _core
from partita.comm.fate import are_given_up
from partita.comm.groups import GROUP_TIMEOUT, has_nccl, set_timeout

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
AGENT_SERVES = "TORCHELASTIC_USE_AGENT_STORE"  # set by torchrun, whose agent serves the store of the ranks
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # Open MPI, MPICH and Intel MPI, MVAPICH
NOTICE_AFTER_S = 15.0  # of waiting for ranks that have not joined, and once a minute from then on
NOTICE_EVERY_S = 60.0
PAUSE_S = 0.02
_MEETING = "partita/meeting"  # the key of its name

logger = logging.getLogger("partita")


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int | None = None,
    verbose: bool = True,
    timeout: timedelta = GROUP_TIMEOUT,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
    *,
    backend: str | None = None,
) -> None:
    """Makes the default process group, unless there is one. The parameters have DeepSpeed's names and order.

    Under torchrun (or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) all ranks join; in a plain
    `python train.py` the group is this process alone, without a socket and without NCCL. Who has waited for 15 s logs
    which ranks are missing, and where.

    Args:
        dist_backend: "nccl", "gloo", or another that torch.distributed knows; None: NCCL for the tensors of GPUs and
            gloo for those of the host when this build has CUDA kernels and a GPU is there, otherwise gloo. No GPU is
            used before a tensor of one is sent. A backend that cannot carry a model's tensors is no obstacle to
            training it.
        auto_mpi_discovery: whether processes that MPI started without the launcher's variables are an error; False:
            each of them is alone.
        distributed_port: the port of rank 0 where the launcher set no MASTER_PORT.
        verbose, config: not used: nothing is printed, and there is no log of collectives.
        timeout: how long a collective waits for a rank before it raises, and a rank for all others to join.
        init_method, rank, world_size: as for `torch.distributed.init_process_group`, in place of the launcher's.
        dist_init_required: False: the group must be there.
        backend: another name of dist_backend.

    Raises:
        RuntimeError: some of the launcher's variables are set and some are missing; there is no group, and none is to
            be made; a rank did not join, which is named.
        TypeError: an argument is of another type; names it.
    """
    given = dist_backend or backend
    _check_types(given, auto_mpi_discovery, distributed_port, timeout)
    if dist.is_initialized():
        return
    if dist_init_required is False:
        raise RuntimeError(
            "dist_init_required=False, and there is no process group: call torch.distributed.init_process_group() "
            "before, or leave dist_init_required out"
        )
    chosen = given or best_backend()
    if init_method is not None or rank >= 0 or world_size >= 0:
        own = [number if number >= 0 else int(os.environ.get(name, -1)) for number, name in _numbers(rank, world_size)]
        dist.init_process_group(chosen, init_method=init_method, rank=own[0], world_size=own[1], timeout=timeout)
    else:
        _join_launched(chosen, timeout, distributed_port, may_be_mpi=auto_mpi_discovery)
    group = dist.group.WORLD
    if group is not None and has_nccl(group):
        # Before any communicator is made, so that this comes after the end of all of them.
        weakref.finalize(group, _end_job, weakref.ref(group))


def join_job(timeout: timedelta) -> None:
    """`init_distributed()` for an engine.

    No `device_id` is given. With one, each rank would make an NCCL communicator here, used or not; all groups would be
    split off it, which hangs where a part of the ranks gets a group of gloo; and messages between ranks would share
    one queue with everything else.

    Args:
        timeout: how long waits for NCCL's collectives last, if the group is made here.
    """
    if dist.is_initialized():
        return
    init_distributed()
    if dist.group.WORLD is not None:
        set_timeout(dist.group.WORLD, timeout)


def best_backend() -> str:
    """Of the default process group: gloo, and NCCL beside it where there are GPUs for this build."""
    has_gpu = _core.built_with_cuda() and dist.is_nccl_available() and torch.cuda.is_available()
    return "cpu:gloo,cuda:nccl" if has_gpu else "gloo"


def _numbers(rank: int, world_size: int) -> list[tuple[int, str]]:
    return [(rank, "RANK"), (world_size, "WORLD_SIZE")]


def _check_types(backend: object, mpi: object, port: object, timeout: object) -> None:
    checks = (
        ("dist_backend", backend, str | None, '"nccl" or "gloo", say'),
        ("auto_mpi_discovery", mpi, bool, "a bool; give timeout= by its name"),
        ("distributed_port", port, int | None, "a number"),
        ("timeout", timeout, timedelta, "a datetime.timedelta"),
    )
    for name, value, kind, rule in checks:
        if not isinstance(value, kind):
            raise TypeError(f"init_distributed(): {name} must be {rule}, got {value!r}")


def _join_launched(backend: str, timeout: timedelta, port: int | None, *, may_be_mpi: bool) -> None:
    """Joins the ranks that a launcher started, or is alone without a launcher."""
    missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
    if not missing or (missing == ["MASTER_PORT"] and port is not None):
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        place = (os.environ["MASTER_ADDR"], int(os.environ.get("MASTER_PORT", port or 0)))
        store = _meet(place, rank, world_size, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    elif "RANK" in missing and "WORLD_SIZE" in missing:  # alone, where NCCL and its threads have nothing to do
        if may_be_mpi:
            _refuse_mpi()
        alone = "gloo" if "nccl" in backend else backend
        dist.init_process_group(alone, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        present = [name for name in LAUNCHER_VARIABLES if name not in missing]
        raise RuntimeError(
            f"{', '.join(present)} set but {', '.join(missing)} missing in the environment: start the job with "
            "torchrun, which sets all four, or unset them to train in one process"
        )


def _refuse_mpi() -> None:
    """Processes of mpirun know of each other, and would each train alone."""
    for name in MPI_SIZES:
        if os.environ.get(name, "1") not in ("0", "1"):
            raise RuntimeError(
                f"{name} = {os.environ[name]}: MPI started several processes, and {', '.join(LAUNCHER_VARIABLES)} are "
                "not set, so each would train alone: start the job with torchrun, set the four variables from MPI's, "
                "or call partita.init_distributed(auto_mpi_discovery=False) if each is to train alone"
            )


def is_joined() -> bool:
    """Whether there is a default process group."""
    return bool(dist.is_initialized())


def leave_job() -> None:
    """Ends the default process group, if there is one: its threads must be gone when Python ends."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _end_job(made: weakref.ref[dist.ProcessGroup]) -> None:
    """Ends the default group that was made here: torch.distributed warns of a group of NCCL that nobody has ended."""
    group = made()
    if group is not None and dist.group.WORLD is group and not are_given_up():
        dist.destroy_process_group()


def place_in_job() -> tuple[int, int]:
    """(rank, number of ranks) of this process, also before it has joined the others."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if all(name in os.environ for name in LAUNCHER_VARIABLES):
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def note_rank(kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
    """Adds to an error which rank it is of, where there are several. An exit callback of an `ExitStack`."""
    rank, world_size = place_in_job()
    if not isinstance(error, Exception) or world_size == 1:
        return
    note = f"(on rank {rank} of {world_size})"
    if sys.version_info >= (3, 11):
        error.add_note(note)
    elif error.args and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]} {note}", *error.args[1:])


def _meet(place: tuple[str, int], rank: int, world_size: int, timeout: timedelta) -> Store:
    """The store of a job, once all its ranks are there."""
    address = f"{place[0]}:{place[1]}"
    notices = _Notices(rank, world_size, address, timeout)
    found: list[Any] = []
    serves = rank == 0 and os.environ.get(AGENT_SERVES) != "True"

    def connect() -> None:
        try:
            # Without waiting for the others: below, who is missing is known.
            store = TCPStore(*place, world_size, serves, timeout, wait_for_workers=False, multi_tenant=serves)
            found.append(store)
        except Exception as error:
            found.append(error)

    # On a thread, so that a signal ends the wait for rank 0.
    thread = threading.Thread(target=connect, name="partita-joins", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(PAUSE_S)
        notices.waiting_for([0] if rank else [])
    if isinstance(found[0], Exception):
        raise RuntimeError(f"rank {rank} of {world_size} cannot reach the job at {address}: {found[0]}") from None
    meeting = _Meeting(found[0], rank, world_size)
    while missing := meeting.missing():
        notices.waiting_for(missing)
        time.sleep(PAUSE_S)
    return meeting.store


class _Meeting:
    """The ranks that come together in a store, which may have been there for others before.

    [Note: one meeting] The store of torchrun's agent outlives the ranks that it starts again, of which some may have
    died before they joined. So no rank can count the meetings. Rank 0 gives each one a name of its own, and whoever
    reads that name leaves a new token there. A rank that rank 0 has not answered with this token has read the name of
    an earlier meeting, perhaps, and looks for another one.
    """

    store: Store

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._all = store
        self._rank, self._world_size = rank, world_size
        self._name = ""
        self._token = secrets.token_hex(8)
        self._answered: set[int] = set()
        if rank == 0:
            self._enter(secrets.token_hex(8))
            store.set(_MEETING, self._name)

    def missing(self) -> list[int]:
        """The ranks that are not there yet, as far as this one knows; empty: `store` is that of this meeting."""
        if self._rank and (not self._all.check([_MEETING]) or not self._follow()):
            return [0]
        there = [r for r in range(self._world_size) if self.store.check([f"here/{r}"])]
        if self._rank == 0:
            for r in set(there) - self._answered:
                self.store.set(f"seen/{r}", self.store.get(f"here/{r}").decode())
                self._answered.add(r)
        return [r for r in range(self._world_size) if r not in there]

    def _follow(self) -> bool:
        """Whether rank 0 has seen this rank in the meeting whose name is there now."""
        name = self._all.get(_MEETING).decode()
        if name != self._name:
            self._enter(name)
        seen = f"seen/{self._rank}"
        return self.store.check([seen]) and self.store.get(seen).decode() == self._token

    def _enter(self, name: str) -> None:
        self._name = name
        self.store = PrefixStore(f"partita/{name}", self._all)
        self.store.set(f"here/{self._rank}", self._token)


class _Notices:
    """Says every now and then which ranks are missing; raises when they stay away."""

    def __init__(self, rank: int, world_size: int, place: str, timeout: timedelta) -> None:
        self._who = f"rank {rank} of {world_size}"
        self._place = place
        self._timeout_s = timeout.total_seconds()
        self._begun = time.monotonic()
        self._next_s = NOTICE_AFTER_S

    def waiting_for(self, missing: list[int]) -> None:
        """Called again and again."""
        waited_s = time.monotonic() - self._begun
        if waited_s < min(self._next_s, self._timeout_s) or not missing:
            return
        names = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
        if waited_s >= self._timeout_s:
            raise RuntimeError(
                f"{self._who} has waited {waited_s:.0f} s for {names}, who did not join at {self._place}"
            )
        logger.warning(
            "%s has waited %.0f s for %s to join at %s: started there, with this MASTER_ADDR and MASTER_PORT?",
            self._who,
            waited_s,
            names,
            self._place,
        )
        self._next_s = waited_s + NOTICE_EVERY_S
