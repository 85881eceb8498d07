"""What a host that waits for its device knows of collectives; with works, groups and a clock of the test's own."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock

import partita.comm.fate as fate
import partita.comm.join as join
import partita.comm.outstanding as outstanding
import pytest
import torch
import torch.distributed as dist
from partita.comm import CommunicationError
from partita.comm.calls import why_leaving
from partita.comm.fate import Fate
from partita.comm.groups import OwnGroups, host_patience_s, set_timeout
from partita.comm.leaving import Ending
from partita.comm.outstanding import LONGEST_GAP_S, Launched, Outstanding

TIMEOUT_S = 30.0


class _Work:
    """A work that is done when the test says so."""

    def __init__(self, error: Exception | None = None, is_done: bool = False) -> None:
        self.error, self.is_done = error, is_done
        self.queries = 0

    def is_completed(self) -> bool:
        self.queries += 1
        return self.is_done

    def wait(self) -> None:
        if self.error is not None:
            raise self.error


class _Lookout:
    """What the others have told, in the hands of the test."""

    def __init__(self) -> None:
        self.why, self.looks, self.long_waits_ended = "", 0, 0

    def look(self, _number: int) -> str:
        self.looks += 1
        return self.why

    def what_others_do(self, _number: int) -> str:
        return "rank 1 sleeps"

    def go_on(self) -> None:
        self.long_waits_ended += 1


class _Waits:
    """A host that waits, on a clock that only goes when it does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(outstanding, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.computes))
        self.lookout = _Lookout()
        self.works: Any = Outstanding(self.lookout, TIMEOUT_S)  # type: ignore[arg-type]

    def launch(self, work: _Work, number: int = 0) -> _Work:
        self.works.add(Launched(f"collective {number}", number, (work,)))  # type: ignore[arg-type]
        return work

    def computes(self, seconds: float) -> None:
        self.now += seconds

    def waits(self, seconds: float) -> bool:
        """As a host that waits for its device does: looks every 50 ms. Returns whether all is done."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.05
            if self.works.check():
                return True
        return False


@pytest.fixture
def host(monkeypatch):
    return _Waits(monkeypatch)


def test_what_is_done_is_forgotten_with_few_questions(host):
    """However far the device is behind: never more than two per launch."""
    works = [host.launch(_Work(), i) for i in range(50)]
    for work in works:
        work.is_done = True
    for _ in range(60):
        before = sum(work.queries for work in works)
        works.append(host.launch(_Work(is_done=True)))
        assert sum(work.queries for work in works) - before <= 2
    assert all(work.queries for work in works[:-1])
    assert host.works.check()


def test_a_late_collective_is_named_and_what_the_others_do(host):
    host.launch(_Work(), 7)
    assert not host.waits(TIMEOUT_S - 1)
    with pytest.raises(CommunicationError, match=r"^collective 7: not done, .* for 30\.\d s .*; rank 1 sleeps$"):
        host.waits(2.0)


def test_only_waiting_counts_and_only_for_the_oldest(host):
    """A host that computes is not held up; a collective that is done was not late, nor is the next one yet."""
    first = host.launch(_Work(), 1)
    for _ in range(20):
        host.waits(0.1)
        host.computes(100 * LONGEST_GAP_S)
    host.launch(_Work(), 2)
    assert not host.waits(TIMEOUT_S - 20 * (0.1 + LONGEST_GAP_S) - 1)
    first.is_done = True
    assert not host.waits(TIMEOUT_S - 1)
    with pytest.raises(CommunicationError, match=r"^collective 2: "):
        host.waits(2.0)


def test_waiting_for_a_device_without_collectives_never_ends_in_an_error(host):
    """A long kernel is nobody's fault."""
    host.launch(_Work(is_done=True))
    for _ in range(100):
        host.computes(0.05)
        assert host.works.check()
    assert host.lookout.looks == 0


def test_what_another_rank_has_told_ends_the_wait_long_before(host):
    host.launch(_Work())
    assert not host.waits(5.0)
    host.lookout.why = "rank 1 has left"
    with pytest.raises(CommunicationError, match=r"^collective 0: rank 1 has left$"):
        host.waits(5.0)
    assert host.now < 1000 + 10


def test_a_long_wait_that_ends_is_taken_back(host):
    """Or others would compare their collectives with an old one."""
    work = host.launch(_Work())
    host.waits(5.0)
    assert (host.lookout.looks, host.lookout.long_waits_ended) == (2, 0)
    work.is_done = True
    assert host.waits(1.0)
    assert host.lookout.long_waits_ended == 1


def test_a_failed_collective_is_named_and_a_failed_device_is_not_mistaken_for_one(host):
    host.launch(_Work(RuntimeError("connection reset"), is_done=False), 3).is_done = True
    with pytest.raises(CommunicationError, match=r"^collective 3: connection reset$"):
        host.works.check()
    host.works.forget()
    host.launch(_Work(torch.AcceleratorError("illegal address"), is_done=False)).is_done = True
    with pytest.raises(torch.AcceleratorError, match=r"illegal address"):
        host.works.check()


# -- giving up


class _Nccl:
    """A group of NCCL, as far as its end goes."""

    def __init__(self, abort: Any = lambda: None, timeout: timedelta = timedelta(minutes=10)) -> None:
        self.options = SimpleNamespace(_timeout=timeout)
        self.abort = abort
        self.told: list[timedelta] = []

    def _get_backend(self, device: torch.device) -> _Nccl:
        if device.type != "cuda":
            raise RuntimeError("no backend")
        return self

    def name(self) -> str:
        return "nccl"

    def _set_default_timeout(self, timeout: timedelta) -> None:
        self.told.append(timeout)


def test_all_groups_that_fail_together_are_aborted_at_the_same_time():
    """An abort frees memory of the device, which waits for the kernels of the others: each needs the others' abort."""
    both = threading.Barrier(2)
    shared, groups = Fate(), [_Nccl(lambda: both.wait(30)) for _ in range(2)]
    for group in groups:
        shared.concerns(group)  # type: ignore[arg-type]
    shared.fail("one")
    shared.fail("a second failure aborts nothing again")
    assert shared.is_over()
    assert not both.broken
    assert fate.are_given_up()


@pytest.mark.parametrize("hangs", [False, True])
def test_the_end_of_a_group_does_not_wait_for_an_abort_that_hangs(monkeypatch, hangs):
    """Nor destroys what another thread is aborting."""
    let_go = threading.Event()
    shared, group = Fate(), _Nccl(let_go.wait)
    shared.concerns(group)  # type: ignore[arg-type]
    monkeypatch.setattr(fate, "ABORTED_WITHIN_S", 0.1)
    own = OwnGroups()
    own._groups.append(group)  # type: ignore[arg-type]
    if not hangs:
        let_go.set()
    shared.fail("it")
    if not hangs:
        [thread.join() for thread in shared._threads]
    with mock.patch.object(dist, "destroy_process_group") as destroyed:
        own.end(shared)
    assert destroyed.call_count == (0 if hangs else 1)
    let_go.set()
    [thread.join() for thread in shared._threads]


@pytest.mark.parametrize("ends", [False, True])
def test_a_communicator_that_nobody_has_closed_ends_its_groups_with_the_program(monkeypatch, ends):
    """Not when it becomes garbage, which ranks collect at different times: NCCL's end waits for the ranks of a host."""
    own = OwnGroups()
    own._groups.append(_Nccl())  # type: ignore[arg-type]
    works = Outstanding(_Lookout(), TIMEOUT_S)  # type: ignore[arg-type]
    ending = Ending(_Nccl(), own, mock.Mock(), mock.Mock(), Fate(), None, works)  # type: ignore[arg-type]
    monkeypatch.setattr(threading.main_thread(), "is_alive", lambda: not ends)
    with mock.patch.object(dist, "destroy_process_group") as destroyed:
        ending.with_the_program()
    assert destroyed.call_count == (1 if ends else 0)


@pytest.mark.parametrize("with_program", [False, True])
def test_who_leaves_with_an_error_aborts_what_would_wait_for_the_others(monkeypatch, with_program):
    """They may wait for this rank, in a kernel and in CUDA's own wait: nobody would end before torch's watchdog does.
    A group of the program is aborted at the end of the program only."""
    aborted: list[str] = []
    theirs, made = _Nccl(lambda: aborted.append("theirs")), _Nccl(lambda: aborted.append("made"))
    own, shared = OwnGroups(), Fate()
    own._groups.append(made)  # type: ignore[arg-type]
    for group in (theirs, made):
        shared.concerns(group)  # type: ignore[arg-type]
    works = Outstanding(_Lookout(), TIMEOUT_S)  # type: ignore[arg-type]
    ending = Ending(theirs, own, mock.Mock(), mock.Mock(), shared, None, works)  # type: ignore[arg-type]
    with mock.patch.object(dist, "destroy_process_group"):
        if with_program:
            monkeypatch.setattr(threading.main_thread(), "is_alive", lambda: False)
            monkeypatch.setattr(sys, "last_value", ValueError("wrong"), raising=False)
            ending.with_the_program()
        else:
            with pytest.raises(ValueError, match=r"^wrong$"), _closing(ending):
                raise ValueError("wrong")
    assert shared.is_over()
    assert sorted(aborted) == (["made", "theirs"] if with_program else ["made"])


def test_the_end_of_an_iterator_is_no_error_of_who_leaves():
    """A loop over batches that ends in `except StopIteration: engine.destroy()` ends its groups in order."""
    aborted: list[str] = []
    own, made = OwnGroups(), _Nccl(lambda: aborted.append("made"))
    own._groups.append(made)  # type: ignore[arg-type]
    works = Outstanding(_Lookout(), TIMEOUT_S)  # type: ignore[arg-type]
    lookout = mock.Mock()
    ending = Ending(_Nccl(), own, mock.Mock(), lookout, Fate(), None, works)  # type: ignore[arg-type]
    with mock.patch.object(dist, "destroy_process_group") as destroyed:
        try:
            next(iter(()))
        except StopIteration:
            ending.close(why_leaving())
    assert destroyed.call_count == 1
    assert not aborted
    assert "failed" not in lookout.end.call_args.args[0]


@contextmanager
def _closing(ending: Ending) -> Iterator[None]:
    try:
        yield
    finally:
        ending.close("it failed")


def test_the_host_gives_up_before_the_watchdog_of_nccl_does():
    """Which ends the process: groups of the engine's get a longer time, and those of others shorten the host's."""
    ours = _Nccl()
    set_timeout(ours, timedelta(seconds=100))  # type: ignore[arg-type]
    (told,) = ours.told
    assert told > timedelta(seconds=100)
    longer = _Nccl(timeout=told)
    assert host_patience_s(longer, timedelta(seconds=100)) == 100  # type: ignore[arg-type]
    theirs = _Nccl(timeout=timedelta(seconds=100))
    assert host_patience_s(theirs, timedelta(seconds=100)) == 80  # type: ignore[arg-type]


# -- the default group


def test_groups_beside_a_default_group_that_is_bound_to_a_gpu_are_bound_to_none():
    """Messages of a group that is bound would wait for each other in one queue, and its ranks in `new_group()`."""
    if begins := not dist.is_initialized():  # another test may have made the job's
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    default = dist.group.WORLD
    assert default is not None
    before = default.bound_device_id
    try:
        default.bound_device_id = bound = torch.device("cpu", 0)
        own = OwnGroups()
        made = own.make("gloo")
        assert made is not None
        assert made.bound_device_id is None
        assert default.bound_device_id == bound
        own.end()
    finally:
        default.bound_device_id = before
        if begins:
            dist.destroy_process_group()


def _joined_with(
    has_gpu: bool, launcher: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, dict[str, Any]]:
    for name in join.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with ExitStack() as stack:
        for owner, name, value in (
            (join._core, "built_with_cuda", True),
            (dist, "is_nccl_available", True),
            (dist, "is_initialized", False),
            (torch.cuda, "is_available", has_gpu),
            (join, "_meet", "store"),
        ):
            stack.enter_context(mock.patch.object(owner, name, mock.Mock(return_value=value)))
        made = stack.enter_context(mock.patch.object(dist, "init_process_group"))
        partita_init = join.init_distributed
        partita_init()
    return made.call_args.args[0], made.call_args.kwargs


LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("has_gpu", "launcher", "backend"),
    [(True, LAUNCHED, "cpu:gloo,cuda:nccl"), (False, LAUNCHED, "gloo"), (True, {}, "gloo"), (False, {}, "gloo")],
)
def test_the_default_group_carries_both_kinds_of_tensors_where_there_is_a_gpu(monkeypatch, has_gpu, launcher, backend):
    """And is bound to no GPU: whoever trains on the CPU beside one makes no context there."""
    chosen, named = _joined_with(has_gpu, launcher, monkeypatch)
    assert chosen == backend
    assert "device_id" not in named


@pytest.mark.parametrize(("is_default", "given_up", "ends"), [(True, False, 1), (False, False, 0), (True, True, 0)])
def test_a_default_group_that_was_made_here_ends_with_the_program(monkeypatch, is_default, given_up, ends):
    """Unless the program has ended it, or what is under way was aborted."""
    group = _Nccl()
    monkeypatch.setattr(join, "are_given_up", lambda: given_up)
    world = SimpleNamespace(
        group=SimpleNamespace(WORLD=group if is_default else None), destroy_process_group=mock.Mock()
    )
    monkeypatch.setattr(join, "dist", world)
    join._end_job(weakref.ref(group))  # type: ignore[arg-type]
    assert world.destroy_process_group.call_count == ends
