"""The threads of the host's part of a step, where the model is on a GPU: the cores that belong to the rank."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import inside
import partita
import pytest
import torch
from late_streams import LateStreams
from partita import _core
from partita.comm import init_distributed, world_communicator
from partita.config import load_config
from partita.device import Cores, kernels, own_cores, threads, threads_for, torch_threads
from partita.run.run import host_threads
from small_models import config, inputs, seeded
from torch import Tensor

GPU = torch.device("cuda", 0)
OFFLOAD: dict[str, Any] = {"stage": 1, "offload_optimizer": {"device": "cpu"}}
ALL = tuple(range(16))


def ranks_on(*cores: tuple[int, ...], host: str = "a", quota: float | None = None) -> list[Cores]:
    return [Cores(host, own, "group", quota) for own in cores]


@pytest.mark.parametrize(
    ("by_rank", "expected"),
    [
        (ranks_on(ALL), [16]),
        (ranks_on(ALL, ALL, ALL, ALL), [4, 4, 4, 4]),
        (ranks_on(ALL, ALL, ALL), [5, 5, 5]),
        (ranks_on(ALL[:8], ALL[8:]), [8, 8]),  # a launcher that gives each rank its own
        (ranks_on(ALL[:8], ALL[:8], ALL[8:], ALL[8:]), [4, 4, 4, 4]),  # by the halves of the machine
        (ranks_on(ALL, ALL[:4]), [14, 2]),
        (ranks_on(ALL) + ranks_on(ALL, ALL, host="b"), [16, 8, 8]),
        (ranks_on((3,), (3,), (3,)), [1, 1, 1]),
        (ranks_on(ALL, quota=3.5), [3]),
        (ranks_on(ALL, ALL, quota=8.0), [4, 4]),
        (ranks_on(ALL, ALL, quota=0.5), [1, 1]),
        (ranks_on(ALL[:8], ALL[8:], quota=100.0), [8, 8]),
    ],
)
def test_the_cores_of_a_host_are_divided_among_the_ranks_that_may_use_them(by_rank, expected):
    assert [threads_for(own, by_rank) for own in by_rank] == expected
    assert [Cores.of_text(own.text()) for own in by_rank] == by_rank


def test_a_limit_of_a_container_is_found(tmp_path, monkeypatch):
    """Kubernetes shows all cores of the machine, and gives the time of some."""
    monkeypatch.setattr(threads, "_CGROUPS", tmp_path)
    monkeypatch.setattr(threads.Path, "read_text", read_instead({"/proc/self/cgroup": "0::/slice/pod\n"}))
    (tmp_path / "slice" / "pod").mkdir(parents=True)
    assert own_cores().quota is None
    (tmp_path / "slice" / "cpu.max").write_text("max 100000\n")
    (tmp_path / "slice" / "pod" / "cpu.max").write_text("250000 100000\n")
    assert own_cores().quota == 2.5
    (tmp_path / "slice" / "cpu.max").write_text("100000 100000\n")
    assert own_cores().quota == 1.0


def read_instead(texts: dict[str, str]) -> Any:
    read = threads.Path.read_text
    return lambda path, *args, **kwargs: texts.get(str(path)) or read(path, *args, **kwargs)


@contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _threads_of(own: list[set[int]], given: dict[int, int], device: torch.device) -> int | None:
    init_distributed()
    world = world_communicator("torch")
    zero = {**OFFLOAD, "offload_optimizer": {"device": "cpu", "threads": given.get(world.rank)}}
    settings = load_config({"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero})
    with on_cores(own[world.rank]), mock.patch.object(threads, "_quota", lambda: ("", None)):
        return host_threads(settings, device, world)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core")
def test_ranks_learn_of_each_others_cores(ranks):
    """Also where one of them says how many threads it wants, and the other does not."""
    first, second, *_ = sorted(os.sched_getaffinity(0))
    both, cpu = {first, second}, torch.device("cpu")
    assert ranks(1).run(_threads_of, [both], {}, GPU) == [2]
    assert ranks(2).run(_threads_of, [both, both], {}, GPU) == [1, 1]
    assert ranks(2).run(_threads_of, [{first}, {second}], {}, GPU) == [1, 1]
    assert ranks(2).run(_threads_of, [both, both], {1: 7}, GPU) == [1, 7]
    assert ranks(2).run(_threads_of, [both, both], {1: 7}, cpu) == [None, None]


def test_without_offloading_nobody_asks():
    world: Any = None
    settings = load_config({"train_micro_batch_size_per_gpu": 1})
    assert host_threads(settings, GPU, world) is None


# -- who is told


@contextmanager
def noting_threads() -> Iterator[dict[str, list[Any]]]:
    """The last argument of native calls, by their names: a number of threads on the CPU."""
    seen: dict[str, list[Any]] = {}

    def noting(name: str) -> Any:
        call = getattr(_core, name)
        return lambda *args: (seen.setdefault(name, []).append(args[-1]), call(*args))[1]

    with ExitStack() as patches:
        for name in ("adam", "norm", "cast", "split_master"):
            patches.enter_context(mock.patch.object(_core, name, noting(name)))
        yield seen


class OnThree(LateStreams):
    """Beside a device whose host gives its part three threads."""

    host_threads = property(lambda self: 3, lambda self, value: None)


class Watched(torch.optim.SGD):
    """Notes on how many threads it runs."""

    seen: list[int] = []  # noqa: RUF012

    def step(self, closure: Any = None) -> Any:
        self.seen.append(torch.get_num_threads())
        return super().step(closure)


def _train(zero: dict[str, Any], optimizer: Any = None) -> None:
    settings = config(zero_optimization=zero, bf16={"enabled": True})
    if optimizer is not None:
        del settings["optimizer"]
    with inside.with_streams(OnThree()):
        engine = partita.Engine(seeded(), optimizer, config=settings)
    for step in range(2):
        engine.train_batch(inputs(step))
    engine.destroy()


def test_the_update_of_offloaded_units_has_the_threads_of_the_host(caplog):
    with caplog.at_level(logging.INFO, "partita"), noting_threads() as seen:
        _train(OFFLOAD)
    assert seen["adam"] == [3] * len(seen["adam"])
    assert seen["norm"].count(3) == 2
    assert "and 3 threads of the host;" in caplog.text
    with noting_threads() as seen:
        _train({"stage": 1})
    assert set(seen["adam"]) == {torch.get_num_threads()} != {3}


def test_an_optimizer_of_torch_has_them_too():
    """And afterwards torch has the threads that it had."""
    before = torch.get_num_threads()
    assert before != 3
    Watched.seen.clear()
    with noting_threads() as seen:
        _train(OFFLOAD, lambda parameters: Watched(parameters, lr=0.1))
    assert Watched.seen[-2:] == [3, 3]
    assert 3 in seen["cast"]
    assert 3 in seen["split_master"]
    assert torch.get_num_threads() == before


def test_threads_of_torch_are_given_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match=r"^x$"), torch_threads(3):
        assert torch.get_num_threads() == 3
        raise ValueError("x")
    with torch_threads(None):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before


# -- threads of ours, and the GPU

# A thread begins on GPU 0, and whatever it does there with CUDA makes a context, on the GPU of another rank.
THREADS = {
    "checkpoint/save.py": "commits files",
    "comm/fate.py": "aborts NCCL: on the rank's device",
    "comm/hierarchical.py": "collectives in the memory of the host",
    "comm/join.py": "a store",
    "comm/patience.py": "waits of gloo",
    "monitor/writer.py": "numbers and texts",
}


def test_threads_have_nothing_to_do_with_a_gpu_but_one_that_names_it():
    package = threads.Path(partita.__file__).parent
    sources = {str(path.relative_to(package)): path.read_text() for path in package.rglob("*.py")}
    begins = re.compile(r"\b(Thread|ThreadPoolExecutor|Timer|start_new_thread)\(")
    assert {name for name, text in sources.items() if begins.search(text)} == THREADS.keys()
    uses = re.compile(r"torch\.cuda\.(?!is_available)|pin_memory|host_buffer|copy_to_host|copy_into")
    assert [name for name in THREADS if uses.search(sources[name])] == ["comm/fate.py"]
    assert "torch.cuda.set_device(device)" in sources["comm/fate.py"]


# -- what they compute


def _updated(threads: int) -> list[Tensor]:
    numel = 300_001
    generator = torch.Generator().manual_seed(1)
    grads, master = (torch.randn(numel, generator=generator) for _ in range(2))
    exp_avg, exp_avg_sq = torch.zeros(numel), torch.zeros(numel)
    params = torch.zeros(numel, dtype=torch.bfloat16)
    control = torch.zeros(_core.StepControl.nbytes, dtype=torch.uint8)
    _core.StepControl(grad_norm=0.0, grad_scale=1.0, skip=False, step=1).write(control.data_ptr())
    segments = _core.Segments([(0, numel, 0)])
    part = kernels.adam_part(
        grads=grads, master=master, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, params=params, segments=segments
    )
    kernels.adam([part], [_core.AdamGroup(1e-3, 0.9, 0.999, 1e-8, 0.1, True)], control, threads=threads)
    total = torch.zeros(1, dtype=torch.float64)
    kernels.sum_of_squares(total, [kernels.norm_part(grads, segments)], threads=threads)
    half = torch.zeros(numel, dtype=torch.float16)
    kernels.cast(half, grads, threads=threads)
    split, remainder = torch.zeros(numel, dtype=torch.bfloat16), torch.zeros(numel, dtype=torch.int16)
    kernels.split_master(split, master, remainder, threads=threads)
    return [master, exp_avg, exp_avg_sq, params, total, half, split, remainder]


def test_the_number_of_threads_changes_no_bit():
    for a, b in zip(_updated(1), _updated(5), strict=True):
        assert torch.equal(a, b)
