"""Which transport ranks get; training does not depend on it; what parameters in shared memory may be used for."""

from __future__ import annotations

import copy
import gc
import io
import logging
import multiprocessing as mp
import os
import pickle
import weakref
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import inside
import partita
import pytest
import torch
import torch.distributed as dist
from partita.comm import (
    CommunicationError,
    Communicator,
    SharedMemoryCommunicator,
    communicator_of,
    world_communicator,
)
from partita.config import ConfigError
from support import assert_absent, base_config, global_batch, make_model, part, train, whole
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

STAGES = (0, 1, 2, 3)
PRECISIONS: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}
TIMEOUT = timedelta(seconds=30)
SHARED: dict[str, Any] = {"comm": {"transport": "shared_memory"}}

# -- the choice


def _chosen(transport: str, hosts: tuple[str, ...] | None = None) -> str:
    """The class of the communicator, or the error."""
    group = dist.group.WORLD
    assert group is not None
    try:
        if hosts is None:
            made = world_communicator(transport, TIMEOUT)
        else:
            made = communicator_of(group, transport, TIMEOUT, host=hosts[dist.get_rank()])
    except RuntimeError as error:
        return str(error)
    made.barrier()
    made.close()
    return type(made).__name__


@pytest.mark.parametrize("asked", ["auto", "torch", "shared_memory"])
def test_one_process_needs_no_transport(ranks, asked):
    """Whatever is asked for."""
    assert ranks(1).run(_chosen, asked) == ["SingleProcess"]


@pytest.mark.parametrize(
    ("asked", "hosts", "chosen"),
    [
        ("auto", None, "SharedMemoryCommunicator"),
        ("shared_memory", None, "SharedMemoryCommunicator"),
        ("torch", None, "TorchCommunicator"),
        ("auto", tuple("aaaa"), "SharedMemoryCommunicator"),
        ("torch", tuple("aabb"), "TorchCommunicator"),
        ("auto", tuple("abcd"), "TorchCommunicator"),
        ("auto", tuple("aabb"), "HierarchicalCommunicator"),
        ("shared_memory", tuple("aabb"), "HierarchicalCommunicator"),
        ("auto", tuple("abbb"), "HierarchicalCommunicator"),
        ("shared_memory", tuple("abcd"), 'comm.transport is "shared_memory", but no two ranks share a host'),
    ],
)
def test_the_transport_follows_from_the_hosts_and_the_config(ranks, asked, hosts, chosen):
    """The same on all ranks, and usable."""
    assert ranks(4).run(_chosen, asked, hosts) == [chosen] * 4


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _without_shared_memory_on(broken: int, transport: str) -> tuple[str, list[str], bool]:
    """The communicator's class or the error; warnings; whether an all-reduce gave the right sum."""
    log = _Log()
    with ExitStack() as stack:
        partita_log = logging.getLogger("partita")
        partita_log.addHandler(log)
        stack.callback(partita_log.removeHandler, log)
        if dist.get_rank() == broken:
            refused = RuntimeError("memfd_create: not permitted")
            stack.enter_context(mock.patch("partita._core.SharedMemoryGroup", side_effect=refused))
        try:
            made = world_communicator(transport, timedelta(seconds=1))
        except RuntimeError as error:
            return str(error), log.lines, True
    ones = torch.ones(5)
    made.all_reduce(ones).wait()
    return type(made).__name__, log.lines, bool((ones == made.world_size).all())


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_when_one_rank_cannot_join_all_use_torch(ranks, broken):
    """The rank with the trouble says what it is; the others, who they missed."""
    for rank, (chosen, (warning,), works) in enumerate(ranks(3).run(_without_shared_memory_on, broken, "auto")):
        assert chosen == "TorchCommunicator"
        assert works
        assert warning.endswith("; going on over torch.distributed")
        assert ("memfd_create: not permitted" if rank == broken else "did not join") in warning


def test_when_one_rank_cannot_join_all_raise_if_that_was_asked_for(ranks):
    """Nobody is left waiting."""
    for rank, (message, _, _) in enumerate(ranks(3).run(_without_shared_memory_on, 1, "shared_memory")):
        assert message.startswith('comm.transport is "shared_memory", but ')
        assert ("memfd_create: not permitted" if rank == 1 else "did not join") in message


def _asked_of_world_communicator(comm: dict[str, Any]) -> tuple[str, timedelta, str]:
    real, calls = inside.connect(), []

    def record(*args: Any) -> Any:
        calls.append(args)
        return real(*args)

    with inside.with_connect(record):
        engine = partita.Engine(make_model(), config=base_config(comm=comm))
    kind = type(inside.communicator(engine)).__name__
    engine.destroy()
    ((transport, timeout, _device),) = calls
    return transport, timeout, kind


@pytest.mark.parametrize(
    ("comm", "expected"),
    [
        ({}, ("auto", timedelta(seconds=30), None)),
        ({"transport": "torch", "timeout_seconds": 7.5}, ("torch", timedelta(seconds=7.5), "TorchCommunicator")),
        (
            {"transport": "shared_memory", "timeout_seconds": 90},
            ("shared_memory", timedelta(seconds=90), "SharedMemoryCommunicator"),
        ),
    ],
)
def test_the_config_reaches_the_transport(ranks, transport, comm, expected):
    """With the default transport, what the tests run on."""
    default = {"auto": "SharedMemoryCommunicator", "torch": "TorchCommunicator"}[transport]
    for asked, timeout, kind in ranks(2).run(_asked_of_world_communicator, comm):
        assert (asked, timeout) == expected[:2]
        assert kind == expected[2] or (expected[2] is None and kind == default)


@pytest.mark.parametrize(
    ("key", "value"),
    [("transport", "tcp"), ("transport", None), ("timeout_seconds", 0), ("timeout_seconds", -1), ("timout", 3)],
)
def test_wrong_values_are_config_errors_that_name_the_key(key, value):
    """Before anything is communicated."""
    called = mock.Mock()
    with inside.with_connect(called), pytest.raises(ConfigError) as raised:
        partita.Engine(make_model(), config=base_config(comm={key: value}))
    assert f"comm.{key}" in str(raised.value)
    assert not called.called


# -- training


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_transports_train_alike(ranks, stage, precision):
    """On three ranks, where the orders of summation differ."""
    shared, torchs = (
        ranks(3).run(train, base_config(stage=stage, comm={"transport": name}, **PRECISIONS[precision]))
        for name in ("shared_memory", "torch")
    )
    tolerance = 1e-4 if precision == "fp32" else 3e-2
    for run, other in zip(shared, torchs, strict=True):
        torch.testing.assert_close(run[0], other[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(run[2], other[2], rtol=10 * tolerance, atol=tolerance)
        for name, value in run[1].items():
            torch.testing.assert_close(value, other[1][name], rtol=tolerance, atol=tolerance)


def _trained_on_hosts(stage: int, hosts: tuple[str, ...]) -> Any:
    group = dist.group.WORLD
    assert group is not None

    def connect(*_: Any, beside: Communicator | None = None) -> Communicator:
        return communicator_of(dist.new_group() if beside else group, "auto", TIMEOUT, host=hosts[dist.get_rank()])

    with inside.with_connect(connect):
        return train(base_config(stage=stage, gradient_clipping=0.5))


@pytest.mark.parametrize("hosts", [tuple("aabb"), tuple("abab"), tuple("aaab")])
@pytest.mark.parametrize("stage", STAGES)
def test_several_hosts_train_as_one(ranks, stage, hosts):
    """All ranks end with the same weights."""
    one = ranks(4).run(train, base_config(stage=stage, gradient_clipping=0.5))
    several = ranks(4).run(_trained_on_hosts, stage, hosts)
    for run, other in zip(several, one, strict=True):
        torch.testing.assert_close(run[0], other[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(run[2], other[2], rtol=1e-4, atol=1e-4)
        for name, value in run[1].items():
            assert torch.equal(value, several[0][1][name]), name
            torch.testing.assert_close(value, other[1][name], rtol=1e-3, atol=1e-4)


# -- parameters in shared memory


def _step(engine: partita.Engine, step: int) -> None:
    batch = global_batch(step, engine.train_batch_size())
    engine.train_batch(part(batch, engine.global_rank, engine.world_size))


def _copies(stage: int) -> None:
    engine = partita.Engine(make_model(), config=base_config(stage=stage, **SHARED))
    assert isinstance(inside.communicator(engine), SharedMemoryCommunicator)
    _step(engine, 0)
    state = engine.module_state_dict()
    expected = {name: value.tolist() for name, value in state.items()}
    saved = io.BytesIO()
    torch.save(state, saved)
    plain = io.BytesIO()
    with whole(engine):
        torch.save(engine.module.state_dict(), plain)
        copies = {
            "module_state_dict": state,
            "deepcopy": copy.deepcopy(state),
            "pickle": pickle.loads(pickle.dumps(state)),
            "clone": {name: value.clone() for name, value in engine.module.state_dict().items()},
            "deepcopy of state_dict": copy.deepcopy(engine.module.state_dict()),
        }
    _step(engine, 1)
    engine.destroy()
    if stage == 3:
        assert_absent(engine)
    for file in (saved, plain):
        file.seek(0)
        copies[f"torch.save {id(file)}"] = torch.load(file)
    for how, values in copies.items():
        assert {name: value.tolist() for name, value in values.items()} == expected, how
    fresh = make_model(1)
    fresh.load_state_dict(state)
    assert fresh.embed.weight.tolist() == expected["embed.weight"]


@pytest.mark.parametrize("stage", STAGES)
def test_state_is_copied_out_of_shared_memory(ranks, stage):
    """Copies have memory of their own: later steps and destroy() leave them alone."""
    ranks(2).run(_copies, stage)


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """Holds the engine, as a careless program does; workers let go of it."""

    def __init__(self, engine: partita.Engine | None) -> None:
        self.engine = engine

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if torch.utils.data.get_worker_info() is not None:
            self.engine = None
            gc.collect()
        tokens, targets = global_batch(i, 1)
        return tokens[0], targets[0]


def _train_with_workers(stage: int, workers: int) -> dict[str, Tensor]:
    mp.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it may have children
    engine = partita.Engine(make_model(), config=base_config(stage=stage, **SHARED))
    samples = Samples(engine)
    context = "fork" if workers else None
    for _ in range(2):  # the workers of each epoch end before the next
        for batch in DataLoader(samples, batch_size=2, num_workers=workers, multiprocessing_context=context):
            engine.backward(engine(*batch))
            with whole(engine):
                before = {name: value.clone() for name, value in engine.module.state_dict().items()}
                assert all(torch.equal(value, before[name]) for name, value in engine.module.state_dict().items())
            engine.step()
        after = engine.module_state_dict()
        gc.collect()
        with whole(engine):
            assert all(torch.equal(value, after[name]) for name, value in engine.module.state_dict().items())
    weights = engine.module_state_dict()
    engine.destroy()
    return weights


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_forked_workers_leave_training_alone(ranks, stage):
    """Two workers per rank; weights are those of a run without."""
    alone, forked = (ranks(2).run(_train_with_workers, stage, workers) for workers in (0, 2))
    for rank in range(2):
        for name, value in forked[rank].items():
            assert torch.equal(value, alone[rank][name]), name


def _fork() -> str:
    """What a forked child gets from a collective; the parent's buffers survive the child's freeing of its own."""
    communicator = world_communicator("shared_memory", TIMEOUT)
    buffer = communicator.empty(100_000, torch.float32).fill_(7)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            communicator.all_reduce(buffer)
            os.write(write, b"nothing was raised")
        except CommunicationError as error:
            del buffer
            gc.collect()
            communicator.close()
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    message = os.read(read, 1000).decode()
    os.close(read)
    os.close(write)
    assert (buffer == 7).all()
    communicator.all_reduce(buffer).wait()
    assert (buffer == 7 * communicator.world_size).all()
    communicator.close()
    return message


def test_a_forked_child_is_no_member(ranks):
    """It is told so, and the group goes on."""
    for rank, message in enumerate(ranks(2).run(_fork)):
        assert f"rank {rank} is process " in message
        assert "its forked child" in message


# -- memory


def _of_this_process() -> dict[str, int]:
    """Resident bytes, and how many of everything that may leak."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {
        "resident": int(status["VmRSS"].split()[0]) * 1024,
        "shared": int(status["RssShmem"].split()[0]) * 1024,
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
        "maps": len(maps),
        "shared maps": sum("memfd:partita" in line for line in maps),
    }


def _wide_model() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(5)))


MODEL_BYTES = 5 * 1024 * 1024 * 4


def _life(stage: int) -> None:
    """An engine that trains two steps and ends."""
    model = _wide_model()
    engine = partita.Engine(model, config=base_config(stage=stage, reduce_bucket_size=1 << 20, **SHARED))
    communicator = weakref.ref(inside.communicator(engine))
    for _ in range(2):
        engine.backward(engine(torch.ones(1, 1024)).square().mean())
        engine.step()
    engine.destroy()
    del engine, model
    gc.collect()
    assert communicator() is None


def _lives(count: int) -> list[dict[str, int]]:
    seen = [_of_this_process()]  # with what other tests have left in it
    for i in range(count):
        _life(i % 4)
        dist.barrier()
        seen.append(_of_this_process())
    return seen


def test_thirty_engines_leave_nothing_behind(ranks):
    """After eight lives, the rest add less than a model."""
    for seen in ranks(2).run(_lives, 30):
        before, settled, rest = seen[0], seen[8], seen[9:]
        for now in rest:
            assert now["shared maps"] <= before["shared maps"]
            assert now["shared"] <= settled["shared"] + 1_000_000
            assert now["resident"] < settled["resident"] + MODEL_BYTES
            assert now["threads"] <= settled["threads"]
            assert now["files"] <= settled["files"]
            assert now["maps"] <= settled["maps"] + 20


def _dropped(stage: int) -> None:
    model = _wide_model()
    engine = partita.Engine(model, config=base_config(stage=stage, **SHARED))
    for _ in range(2):
        engine.backward(engine(torch.ones(1, 1024)).square().mean())
        engine.step()
    communicator = weakref.ref(inside.communicator(engine))
    del engine
    gc.collect()
    assert communicator() is None
    del model


@pytest.mark.parametrize("stage", [0, 3])
def test_an_engine_that_is_dropped_is_destroyed(ranks, stage):
    """Also while its model lives on."""
    ranks(2).run(_dropped, stage)


def _model_outlives_engine() -> None:
    before = _of_this_process()["shared maps"]
    model = _wide_model()
    engine = partita.Engine(model, config=base_config(**SHARED))
    expected = engine.module_state_dict()
    engine.destroy()
    del engine
    gc.collect()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name])
    with torch.no_grad():
        model[0].weight.fill_(float(dist.get_rank()))  # nobody else's
    dist.barrier()
    assert (model[0].weight == dist.get_rank()).all()
    del model, value
    gc.collect()
    assert _of_this_process()["shared maps"] <= before


def test_parameters_outlive_the_engine(ranks):
    """They keep their memory, and nothing else of the group."""
    ranks(2).run(_model_outlives_engine)


def _committed() -> list[int]:
    communicator = world_communicator("shared_memory", TIMEOUT)
    assert isinstance(communicator, SharedMemoryCommunicator)
    sizes = [communicator.committed_bytes]
    buffer = communicator.empty(4 << 20, torch.float32)
    sizes.append(communicator.committed_bytes)
    buffer.fill_(1)
    sizes.append(communicator.committed_bytes)
    view = buffer[:10]
    del buffer
    sizes.append(communicator.committed_bytes)
    del view
    sizes.append(communicator.committed_bytes)
    communicator.close()
    return sizes


def test_memory_is_committed_when_touched_and_returned_with_the_last_view(ranks):
    """16 MiB."""
    for empty, allocated, touched, viewed, freed in ranks(2).run(_committed):
        assert empty == allocated == freed == 0
        assert touched == viewed == 16 << 20
