"""What ranks over torch.distributed tell each other beside their collectives: through the store, and only when a wait
is long, something has failed, or a rare call begins.

[Note: calls that do not match] Neither gloo nor NCCL compares what ranks call. Ranks that wait for each other in
different collectives do so until a timeout, and collectives of one kind and different sizes abort the process. So
- a rare call (`meet`) begins when all ranks are in it: no collective of such a call meets one of a training step;
- a rank whose wait is long (`look`) tells what it has launched, and compares with what the others that wait have told;
- a rank that gives up or ends (`end`) tells why.
In a step without a long wait none of this costs more than a note of each launch.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from partita._core import CommunicationError
from partita.comm.calls import Calls

LONG_WAIT_S = 2.0  # after which, and as often as which, a rank that waits looks around
KEPT_LAUNCHES = 64
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.0002, 0.02


class Launches:
    """The latest collectives of this rank: (number, call, what)."""

    def __init__(self) -> None:
        self.count = 0
        self._latest: deque[tuple[int, str, str, int, str]] = deque(maxlen=KEPT_LAUNCHES)

    def add(self, call: str, name: str, numel: int, dtype: str) -> int:
        """Returns the number of the collective."""
        number, self.count = self.count, self.count + 1
        self._latest.append((number, call, name, numel, dtype))
        return number

    def as_json(self) -> list[list[Any]]:
        """The latest ones, in order."""
        return [
            [number, call, f"{name} of {numel} {dtype.removeprefix('torch.')}" if dtype else name]
            for number, call, name, numel, dtype in self._latest
        ]


class Lookout:
    """The view of one communicator's ranks through the store.

    Args:
        group: the name of the process group, the same on its ranks. All ranks make their communicators of one group in
            the same order.
        timeout_s: how long `meet` waits for a rank.
    """

    def __init__(self, group: str, rank: int, world_size: int, calls: Callable[[], Calls], timeout_s: float) -> None:
        self.launches = Launches()
        self._store = dist.distributed_c10d._get_default_store()
        self._rank = rank
        self._others = [r for r in range(world_size) if r != rank]
        self._calls = calls
        self._timeout_s = timeout_s
        self._meetings = 0
        self._ended = False
        number = self._store.add(f"partita/{group}/made/{rank}", 1)  # groups are used by one communicator after another
        self._prefix = f"partita/{group}/{number}"

    # -- what this rank tells

    def end(self, reason: str, *, gave_up: bool = False) -> None:
        """This rank takes no part any more. Only the first reason is told.

        Args:
            gave_up: what it has launched will not be completed either.
        """
        if not self._ended:
            self._ended = True
            self._tell("ended", {"why": reason, "launched": 0 if gave_up else self.launches.count})

    def go_on(self) -> None:
        """A long wait is over."""
        self._tell("waiting", {})

    # -- what it learns from the others

    def look(self, number: int) -> str:
        """Called while the collective `number` is waited for: why that is in vain, or an empty text."""
        self._tell("waiting", {"launched": self.launches.count, "latest": self.launches.as_json()})
        own = {n: (call, what) for n, call, what in self.launches.as_json()}
        for rank in self._others:
            told = self._told("waiting", rank)
            if "meets" in told and told["launched"] <= number:
                here, _ = own.get(number, (self._calls().name, ""))
                return self._in_other_calls(rank, here, told["meets"], "")
            for n, call, what in told.get("latest", []):
                if n in own and (own[n][1] != what or _differ(own[n][0], call)):
                    return self._in_other_collectives(n, own[n], rank, (call, what))
        return self.why_ended(number)

    def why_ended(self, number: int) -> str:
        """Which rank has ended before it took part in the collective `number`, and why; empty if none is known."""
        for rank in self._others:
            told = self._told("ended", rank)
            if told and told["launched"] <= number:
                return f"rank {rank} {told['why']}"
        return ""

    def what_others_do(self, number: int) -> str:
        """In words, for the error of a rank that waits for the collective `number` no longer."""
        return "; ".join(f"rank {rank} {self._what_it_does(rank, number)}" for rank in self._others)

    def _what_it_does(self, rank: int, number: int) -> str:
        ended, waiting = self._told("ended", rank), self._told("waiting", rank)
        if ended:
            return str(ended["why"])
        if "meets" in waiting:
            return f"is in {waiting['meets']}"
        if not waiting:
            return "has told nothing: it computes, hangs, is stopped or has died"
        if waiting["launched"] > number:
            return "has launched that collective and waits, too"
        return f"waits, and has not launched that collective (number {number}; it has launched {waiting['launched']})"

    @contextmanager
    def meet(self, name: str) -> Iterator[None]:
        """A block that begins when all ranks are in the call `name`.

        Raises:
            CommunicationError: a rank is in another call, has ended, or does not come before the timeout.
        """
        if not self._calls().name and not self._ended:
            self.await_all(name)
        with self._calls().inside(name):
            yield

    def await_all(self, name: str) -> None:
        """Returns when all ranks are in `name`; raises as `meet`."""
        if not self._others:
            return
        number, self._meetings = self._meetings, self._meetings + 1
        self._store.set(self._key(f"met-{number}", self._rank), name)
        keys = [self._key(f"met-{number}", rank) for rank in self._others]
        begun = looked = time.monotonic()
        pause, is_long = FIRST_PAUSE_S, False
        while not self._store.check(keys):
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
            now = time.monotonic()
            if now - looked > LONG_WAIT_S:
                looked, is_long = now, True
                self._look_while_meeting(name, number, now - begun)
        if is_long:
            self.go_on()
        for rank, there in zip(self._others, self._store.multi_get(keys), strict=True):
            if there.decode() != name:
                raise CommunicationError(self._in_other_calls(rank, name, there.decode(), ""))
        if number:  # nobody looks at the last meeting any more
            self._store.delete_key(self._key(f"met-{number - 1}", self._rank))

    def _look_while_meeting(self, name: str, number: int, waited_s: float) -> None:
        self._tell("waiting", {"meets": name, "launched": self.launches.count})
        for rank in self._others:
            if self._store.check([self._key(f"met-{number}", rank)]):
                continue
            waiting, ended = self._told("waiting", rank), self._told("ended", rank)
            if ended:
                raise CommunicationError(f"{name} on rank {self._rank}: rank {rank} {ended['why']}")
            if waiting.get("latest") and waiting["launched"] > self.launches.count:
                raise CommunicationError(self._in_other_calls(rank, name, waiting["latest"][-1][1], ""))
            if waited_s > self._timeout_s:
                raise CommunicationError(
                    f"{name} is called on every rank; rank {rank} did not call it within {self._timeout_s:g} s"
                )

    # -- texts, which are the same on both ranks

    def _in_other_calls(self, rank: int, here: str, there: str, collectives: str) -> str:
        (first, call), (second, other) = sorted([(self._rank, here), (rank, there)])
        did = f"called {other}" if other else "is in a collective outside of all engine calls"
        call = call or f"a collective of rank {first}"
        return f"{call} is called on every rank; rank {second} {did}{collectives}"

    def _in_other_collectives(self, number: int, own: tuple[str, str], rank: int, other: tuple[str, str]) -> str:
        (first, (call, here)), (second, (other_call, there)) = sorted([(self._rank, own), (rank, other)])
        both = f"collective number {number} is {here} on rank {first} but {there} on rank {second}"
        rule = "all ranks must call the same collectives in the same order"
        if _differ(call, other_call):
            return self._in_other_calls(rank, own[0], other[0], f" ({both}: {rule})")
        return (f"in {call}: " if call else "") + f"{both}: {rule}"

    # -- the store, which may be gone with the rank that has it

    def _tell(self, what: str, value: dict[str, Any]) -> None:
        try:
            self._store.set(self._key(what, self._rank), json.dumps(value))
        except RuntimeError:
            return

    def _told(self, what: str, rank: int) -> dict[str, Any]:
        key = self._key(what, rank)
        try:
            return json.loads(self._store.get(key)) if self._store.check([key]) else {}
        except RuntimeError:
            return {}

    def _key(self, what: str, rank: int) -> str:
        return f"{self._prefix}/{what}/{rank}"


class Watch:
    """Looks around every now and then, while a collective is waited for."""

    def __init__(self, lookout: Lookout, number: int) -> None:
        self._lookout = lookout
        self._number = number
        self._looked_at = time.monotonic()
        self._is_long = False

    def __call__(self) -> None:
        """Raises CommunicationError if the wait is in vain."""
        now = time.monotonic()
        if now - self._looked_at < LONG_WAIT_S:
            return
        self._looked_at, self._is_long = now, True
        if why := self._lookout.look(self._number):
            raise CommunicationError(why)

    def close(self) -> None:
        """The wait is over."""
        if self._is_long:
            self._lookout.go_on()


def _differ(call: str, other: str) -> bool:
    """Whether these are two engine calls. A collective may run outside of all calls: in `loss.backward()`, say."""
    return bool(call and other and call != other)
