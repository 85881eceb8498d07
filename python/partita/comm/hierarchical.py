"""Several hosts: shared memory inside each, torch.distributed between their first ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from partita._core import Reduction
from partita.comm.communicator import Communicator, Handle
from partita.comm.waited import Waited


class _Timed:
    """Waits of the program, and how long they held it up.

    Args:
        wait: returns when what is waited for is done.
        held_up: is told the seconds of the first call.
    """

    def __init__(self, wait: Callable[[], object], held_up: Callable[[float], None]) -> None:
        self._wait: Callable[[], object] | None = wait
        self._held_up = held_up

    def wait(self) -> None:
        """Returns when it is done; raises what it raised."""
        if self._wait is None:
            return
        began = time.perf_counter()
        self._wait()
        self._wait = None
        self._held_up(time.perf_counter() - began)


class HierarchicalCommunicator(Communicator):
    """Each collective is one inside the hosts, one between their leaders, and one inside the hosts again.

    The leader of a host is its lowest rank. Results are the same on all ranks; 16-bit sums are rounded once per host
    and once between hosts. Collectives run on a thread, in the order of their calls.

    Args:
        rank: of this process among all.
        hosts: the ranks of each host, in order.
        inside: the ranks of this host, in order.
        between: the leaders, in the order of `hosts`; None on the others.
        everyone: all ranks, for what two ranks of different hosts send each other; owns the process groups that were
            made for this communicator, the leaders' too.
    """

    def __init__(
        self,
        rank: int,
        hosts: list[list[int]],
        inside: Communicator,
        between: Communicator | None,
        everyone: Communicator,
    ) -> None:
        self.rank = rank
        self.world_size = sum(map(len, hosts))
        self.transport = f"{inside.transport} on {len(hosts)} hosts, {everyone.transport} between them"
        self.sums_in_fp32 = inside.sums_in_fp32 and everyone.sums_in_fp32
        self._hosts = hosts
        self._host = next(i for i, ranks in enumerate(hosts) if rank in ranks)
        self._inside, self._between, self._everyone = inside, between, everyone
        per_host = len(hosts[0])
        in_order = [r for ranks in hosts for r in ranks] == list(range(self.world_size))
        # The slices of a host's ranks lie together, in equal sections of a buffer.
        self._has_sections = in_order and all(len(ranks) == per_host for ranks in hosts)
        # Of the program; then what of it `waited()` has put down to ranks, and the waits of all threads until then.
        self._held_up_s = self._counted_s = 0.0
        self._counted = self._seen = Waited.none(self.world_size)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="partita-hosts")

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        return self._inside.empty(numel, dtype)

    def all_reduce(self, buffer: Tensor, reduction: Reduction = Reduction.sum) -> Handle:
        self._require_here("all_reduce", buffer)
        return self._run(self._all_reduce, buffer, reduction)

    def reduce_scatter(self, buffer: Tensor, reduction: Reduction = Reduction.sum) -> Handle:
        self._require_here("reduce_scatter", buffer)
        self.slice_numel(buffer)
        return self._run(self._reduce_scatter if self._has_sections else self._all_reduce, buffer, reduction)

    def all_gather(self, buffer: Tensor) -> Handle:
        self._require_here("all_gather", buffer)
        self.slice_numel(buffer)
        return self._run(self._all_gather if self._has_sections else self._gather_slices, buffer)

    def broadcast(self, tensor: Tensor, root: int) -> Handle:
        self._check_rank("broadcast from", root)
        self._require_here("broadcast", tensor)
        return self._run(self._broadcast, tensor, root)

    def send(self, tensor: Tensor, destination: int) -> Handle:
        if destination in self._hosts[self._host]:
            handle = self._inside.send(tensor, self._hosts[self._host].index(destination))
        else:
            handle = self._everyone.send(tensor, destination)
        return _Timed(handle.wait, self._add_held_up)

    def recv(self, tensor: Tensor, source: int) -> Handle:
        if source in self._hosts[self._host]:
            handle = self._inside.recv(tensor, self._hosts[self._host].index(source))
        else:
            handle = self._everyone.recv(tensor, source)
        return _Timed(handle.wait, self._add_held_up)

    def barrier(self) -> None:
        self._run(self._barrier).wait()

    def waited(self) -> Waited | None:
        """What the program lost is known, and whom the communication thread waited for: since the last call, the first
        is divided as the second is. A rank that waits for its leader cannot know that the leader waits for another
        host."""
        inside = self._inside.waited() or Waited.none(self._inside.world_size)
        total = inside.in_group(self._hosts[self._host], self.world_size)
        parts = [(self._everyone, list(range(self.world_size)))]
        if self._between is not None:
            parts.append((self._between, [ranks[0] for ranks in self._hosts]))
        for communicator, ranks in parts:
            if (waited := communicator.waited()) is not None:
                total += waited.in_group(ranks, self.world_size)
        new, held_up = total - self._seen, self._held_up_s - self._counted_s
        if new.total_s > 0:
            self._counted += new.times(min(1.0, held_up / new.total_s))
        self._seen, self._counted_s = total, self._held_up_s
        return self._counted

    def _add_held_up(self, seconds: float) -> None:
        self._held_up_s += seconds

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._inside.close()
        self._everyone.close()

    def _run(self, function: Callable[..., None], *args: object) -> Handle:
        run = partial(self._run_or_leave, function, self.calls.name, *args)
        return _Timed(partial(self._wait, self._thread.submit(run)), self._add_held_up)

    def _wait(self, future: Future[None]) -> None:
        try:
            future.result()
        except KeyboardInterrupt:
            self.close()  # the thread would wait on, and the program for the thread
            raise

    def _run_or_leave(self, function: Callable[..., None], call: str, *args: object) -> None:
        """What follows a failure would meet other collectives on other ranks: this rank takes no part any more."""
        for communicator in (self._inside, self._between):
            if communicator is not None:
                communicator.calls.name = call  # where the program was at the launch
        try:
            function(*args)
        except (TypeError, ValueError):  # a wrong argument, before anything was sent: the same on all ranks
            raise
        except BaseException as error:
            self._inside.leave(f"a collective of its host failed: {error}")
            raise

    def _section(self, buffer: Tensor) -> Tensor:
        """The slices of this host's ranks."""
        return buffer.chunk(len(self._hosts))[self._host]

    def _all_reduce(self, buffer: Tensor, reduction: Reduction) -> None:
        self._inside.all_reduce(buffer, _partial(reduction)).wait()
        if self._between is not None:
            self._between.all_reduce(buffer, _partial(reduction)).wait()
            self._divide(buffer, reduction)
        self._inside.broadcast(buffer, 0).wait()

    def _reduce_scatter(self, buffer: Tensor, reduction: Reduction) -> None:
        self._inside.all_reduce(buffer, _partial(reduction)).wait()
        section = self._section(buffer)
        if self._between is not None:
            self._between.reduce_scatter(buffer, _partial(reduction)).wait()
            self._divide(section, reduction)
        self._inside.broadcast(section, 0).wait()

    def _all_gather(self, buffer: Tensor) -> None:
        self._inside.all_gather(self._section(buffer)).wait()
        if self._between is not None:
            self._between.all_gather(buffer).wait()
        self._inside.broadcast(buffer, 0).wait()

    def _gather_slices(self, buffer: Tensor) -> None:
        slices = self.slices(buffer)
        for i, rank in enumerate(self._hosts[self._host]):
            self._inside.broadcast(slices[rank], i).wait()
        if self._between is not None:
            for host, ranks in enumerate(self._hosts):
                for rank in ranks:
                    self._between.broadcast(slices[rank], host).wait()
        self._inside.broadcast(buffer, 0).wait()

    def _broadcast(self, tensor: Tensor, root: int) -> None:
        host = next(i for i, ranks in enumerate(self._hosts) if root in ranks)
        if host == self._host:
            self._inside.broadcast(tensor, self._hosts[host].index(root)).wait()
        if self._between is not None:
            self._between.broadcast(tensor, host).wait()
        if host != self._host:
            self._inside.broadcast(tensor, 0).wait()

    def _barrier(self) -> None:
        self._inside.barrier()
        if self._between is not None:
            self._between.barrier()
        self._inside.barrier()

    def _divide(self, result: Tensor, reduction: Reduction) -> None:
        if reduction == Reduction.average:
            result /= self.world_size


def _partial(reduction: Reduction) -> Reduction:
    """What hosts compute of it; an average is a sum that is divided at the end."""
    return Reduction.max if reduction == Reduction.max else Reduction.sum
