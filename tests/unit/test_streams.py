"""device/streams.py: the order of work, copies and waits that `CudaStreams` asks of torch.cuda, and the host's wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any
from unittest import mock

import pytest
import torch
from partita.device import AcrossStreams, polling
from partita.device.polling import wait_until
from partita.device.streams import CudaStreams


class Cuda:
    """torch.cuda as far as `CudaStreams` uses it. Work has numbers; a stream knows the work that it comes after."""

    def __init__(self) -> None:
        self.finished: set[int] = set()  # what the device has done
        self._numbers = count(1)
        self.now = self.Stream()

    class Stream:
        def __init__(self, device: Any = None) -> None:
            self.after: set[int] = set()

        def wait_event(self, event: Any) -> None:
            self.after |= event.after

        def wait_stream(self, other: Any) -> None:
            self.after |= other.after

    def event(self, enable_timing: bool = False) -> Any:
        cuda = self

        class Event:
            after = frozenset[int]()

            def record(self, stream: Any) -> None:
                self.after = frozenset(stream.after)

            def query(self) -> bool:
                return self.after <= cuda.finished

            def elapsed_time(self, end: Any) -> float:
                assert enable_timing and self.query() and end.query()
                return 1.5

        return Event()

    def work(self) -> int:
        """Something is queued on the current stream."""
        self.now.after.add(number := next(self._numbers))
        return number

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before


class Memory:
    """A tensor. `copies`: for each copy into it its number, its source, and the work that it came after."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.copies: list[tuple[int, Any, set[int]]] = []
        self.recorded: list[Any] = []
        self.shape, self.dtype = (3,), torch.float32

    def copy_(self, source: Any, non_blocking: bool) -> None:
        assert non_blocking
        before = set(self._cuda.now.after)
        self.copies.append((self._cuda.work(), source, before))

    def record_stream(self, stream: Any) -> None:
        self.recorded.append(stream)


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    fake = Cuda()
    with (
        mock.patch.object(torch.cuda, "Stream", fake.Stream),
        mock.patch.object(torch.cuda, "Event", fake.event),
        mock.patch.object(torch.cuda, "stream", fake.stream),
        mock.patch.object(torch.cuda, "current_stream", lambda _device: fake.now),
        mock.patch.object(torch.cuda, "get_device_name", lambda _device: "a GPU"),
    ):
        yield fake


@pytest.fixture
def made(cuda: Cuda) -> CudaStreams:
    return CudaStreams(torch.device("cuda", 0))


WAYS: list[tuple[str, str]] = [("copy_into", "to_host"), ("bring", "to_device")]


@pytest.mark.parametrize(("copy", "block"), WAYS)
def test_a_large_copy_goes_on_beside_the_current_stream(cuda, made, copy, block):
    """It comes after what was queued; what is queued later comes after the copy where somebody said so."""
    destination, source, first = Memory(cuda), Memory(cuda), cuda.work()
    under_way = getattr(made, copy)(destination, source)
    [(number, copied, before)] = destination.copies
    assert copied is source
    assert first in before
    assert number not in cuda.now.after
    under_way.come_after()
    assert number in cuda.now.after


@pytest.mark.parametrize(("copy", "block"), WAYS)
def test_work_in_the_block_of_a_direction_comes_after_its_copies_alone(cuda, made, copy, block):
    """A gather that is launched there begins after the shard has arrived, and not after what computes meanwhile."""
    outside, first, destination = cuda.now, cuda.work(), Memory(cuda)
    with getattr(made, block)():
        gather = cuda.work()
        getattr(made, copy)(destination, Memory(cuda))
        last = cuda.work()
        [(number, _, before)] = destination.copies
        assert {first, gather} <= before
        assert {number, last} <= cuda.now.after
    assert cuda.now is outside
    assert cuda.now.after == {first}
    computing = cuda.work()
    with getattr(made, block)():
        assert computing in cuda.now.after


def test_the_two_directions_do_not_wait_for_each_other(cuda, made):
    there, back = Memory(cuda), Memory(cuda)
    made.copy_into(there, Memory(cuda))
    made.bring(back, Memory(cuda))
    made.copy_into(there, Memory(cuda))
    (first, _, _), (_, _, before) = there.copies
    [(brought, _, before_brought)] = back.copies
    assert first not in before_brought
    assert brought not in before


def test_a_small_copy_is_on_the_current_stream(cuda, made):
    host, first = Memory(cuda), cuda.work()
    with mock.patch.object(torch, "empty", lambda *args, **kwargs: host if kwargs["pin_memory"] else None):
        copy = made.copy_to_host(Memory(cuda))
    [(number, _, before)] = host.copies
    assert before == {first}
    assert cuda.now.after == {first, number}
    cuda.finished |= {first, number}
    assert copy.wait() is host


def test_the_host_waits_for_one_copy_and_looks_around_meanwhile(cuda, made):
    """What `while_waiting` raises ends the wait, and the copy can be waited for again."""
    destination, other = Memory(cuda), Memory(cuda)
    copy = made.copy_into(destination, Memory(cuda))
    made.bring(other, Memory(cuda))
    [(number, _, _)] = destination.copies

    def fail() -> None:
        raise ConnectionError("a collective is late")

    made.while_waiting = fail
    with pytest.raises(ConnectionError, match="late"):
        copy.wait()
    made.while_waiting = lambda: cuda.finished.add(number)
    assert copy.wait() is destination
    made.while_waiting = fail
    assert copy.wait() is destination
    cuda.now.after.clear()
    copy.come_after()
    assert not cuda.now.after, "a copy that the host has waited for holds up no stream"


def test_tensors_of_another_stream_are_kept_for_this_one(cuda, made):
    """G2"""
    tensor, other = Memory(cuda), Cuda.Stream()
    other.after.add(100)
    made.come_after(cuda.now, [tensor])
    assert not tensor.recorded
    made.come_after(other, [tensor])
    assert tensor.recorded == [cuda.now]
    assert 100 in cuda.now.after


def test_memory_across_streams(cuda, made):
    """A second stream waits for the arrival and for nothing later; who gets the memory waits for both."""
    shared, side, main = AcrossStreams(made), Cuda.Stream(), cuda.now
    for _ in range(2):
        arrival = cuda.work()
        shared.is_ready()
        later = cuda.work()
        shared.use()
        with cuda.stream(side):
            shared.use()
            assert arrival in side.after
            assert later not in side.after
            used = cuda.work()
            shared.use()
        assert used not in main.after
        shared.give_up(main)
        assert used in main.after
        third = Cuda.Stream()
        with cuda.stream(third):
            shared.use()  # nothing is there
        assert not third.after


def test_the_time_between_marks_is_waited_for(cuda, made):
    start, end = made.mark(), (cuda.work(), made.mark())[1]
    assert made.is_reached(start)
    assert not made.is_reached(end)
    made.while_waiting = lambda: cuda.finished.update(cuda.now.after)
    assert made.milliseconds(start, end) == 1.5


# -- the host's wait


class Clock:
    """Time passes in sleeps."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.sleeps = 0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        assert 0 < seconds <= 1e-3
        self.now_s += seconds
        self.sleeps += 1


@pytest.fixture
def clock() -> Iterator[Clock]:
    fake = Clock()
    with mock.patch.object(polling, "time", fake):
        yield fake


def _after(questions: int) -> Callable[[], bool]:
    asked = count(1)
    return lambda: next(asked) > questions


def test_what_is_about_done_costs_no_sleep(clock):
    wait_until(_after(10), lambda: pytest.fail("looked around"))
    assert not clock.sleeps


def test_a_long_wait_looks_around_every_50_ms(clock):
    looks: list[float] = []
    wait_until(lambda: clock.now_s > 101, lambda: looks.append(clock.now_s))
    assert 19 <= len(looks) <= 20
    assert all(b - a <= 0.0511 for a, b in zip([100.0, *looks], looks, strict=False))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("CUDA error: an illegal memory access")])
def test_errors_end_a_wait(clock, error):
    """Of a signal's handler, or of CUDA: as they are."""

    def ask() -> bool:
        if clock.sleeps > 3:
            raise error
        return False

    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        wait_until(ask, lambda: None)
