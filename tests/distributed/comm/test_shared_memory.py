"""What parameters in shared memory may be used for; when their memory is taken and given back."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing as mp
import os
import pickle
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any

import inside
import partita
import pytest
import torch
import torch.distributed as dist
from partita.comm import (
    CommunicationError,
    SharedMemoryCommunicator,
    world_communicator,
)
from support import assert_without_values, base_config, global_batch, make_model, part, whole
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

STAGES = (0, 1, 2, 3)
PRECISIONS: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}
TIMEOUT = timedelta(seconds=30)
SHARED: dict[str, Any] = {"comm": {"transport": "shared_memory"}}

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
        assert_without_values(engine.module)
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
