"""F2, F3, F5, F9: what a program needs to start, many small parameters, buffers, engines side by side."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import partita
import pytest
import torch
from support import base_config, global_batch, make_model, part, train
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

STAGES = (0, 1, 2)
LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# -- F2: a bare machine

BARE_PROGRAM = """
import sys
import torch
before = set(sys.modules)
import partita
added = {name.partition(".")[0] for name in set(sys.modules) - before}
heavy = {"triton", "mpi4py", "deepspeed", "tensorboard", "transformers", "matplotlib", "ninja", "setuptools"}
assert not added & heavy, added & heavy
compilers = {"torch._dynamo", "torch._inductor", "torch.utils.cpp_extension", "torch.utils.tensorboard"}
assert not (set(sys.modules) - before) & compilers
assert not torch.cuda.is_initialized()
assert not torch.distributed.is_initialized()
model = torch.nn.Linear(4, 1)
engine, *_ = partita.initialize(model, config={"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}})
for step in range(2):
    engine.backward(engine(torch.ones(2, 4)).mean())
    engine.step()
print(engine.global_steps, engine.world_size)
"""


def test_a_plain_program_trains_on_a_bare_machine(tmp_path):
    """F2: no nvcc, compiler, launcher or MPI; importing partita imports no compiler and makes no CUDA context."""
    # An address alone, which some clusters set in every shell, does not make a job.
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path), "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}
    environment |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PYTHONPATH") if name in os.environ}
    command = [sys.executable, "-c", BARE_PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "1"]


@pytest.mark.parametrize("given", [("RANK",), ("WORLD_SIZE",), ("RANK", "WORLD_SIZE"), LAUNCHER[:3]])
def test_half_set_launcher_variables_are_named(given, monkeypatch):
    """F2, promise 7: which are there, which are not, and what to do; not a rendezvous that hangs."""
    import torch.distributed as dist

    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for name in given:
        monkeypatch.setenv(name, "0")
    with pytest.raises(RuntimeError, match="start the job with torchrun") as raised:
        partita.init_distributed()
    there, missing = str(raised.value).split(" set but ")
    assert there == ", ".join(given)
    assert missing.startswith(", ".join(name for name in LAUNCHER if name not in given) + " missing")


# -- F3: many small parameters


class ManySmall(nn.Module):
    """1,000 parameters of 1 to 13 elements, used as one vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pieces = nn.ParameterList(torch.randn(1 + i % 13) for i in range(1000))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.cat(list(self.pieces))
        return torch.tanh(x * flat).pow(2).mean(-1).sum() + flat.pow(2).sum() * x.mean() * 1e-3


def small_batch(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.rand(2, sum(1 + i % 13 for i in range(1000)), generator=generator)


def run_many_small(stage: int | None, steps: int = 4) -> dict[str, Tensor]:
    """With the engine, or for None with DDP and torch's AdamW."""
    import torch.distributed as dist

    model = ManySmall()
    if stage is not None:
        engine = partita.Engine(model, config=base_config(stage=stage, reduce_bucket_size=2000))
        for step in range(steps):
            engine.train_batch((small_batch(step, engine.global_rank),))
        engine.destroy()
    else:
        replica = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        for step in range(steps):
            replica(small_batch(step, dist.get_rank())).backward()
            optimizer.step()
            optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_thousand_small_parameters_train_as_with_ddp(ranks):
    """F3: the numbers; the time is measured by the benchmarks."""
    (expected, _) = ranks(2).run(run_many_small, None)
    for stage in STAGES:
        for weights in ranks(2).run(run_many_small, stage):
            assert weights.keys() == expected.keys()
            for name, value in weights.items():
                torch.testing.assert_close(
                    value, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
                )


# -- F9: buffers

BUFFER_DTYPES = ("float64", "float16", "float8_e4m3fn", "complex64", "bool", "uint8", "int16", "int64")


def buffers_after_initialize() -> dict[str, Tensor]:
    """Ranks begin with different values, in one and in no dimension."""
    import torch.distributed as dist

    model = nn.Linear(2, 1)
    for name in BUFFER_DTYPES:
        value = torch.full((3,), float(1 - dist.get_rank())).to(getattr(torch, name))
        model.register_buffer(name, value)
        model.register_buffer(f"scalar_{name}", value[0].clone())
    partita.Engine(model, config={"optimizer": {"type": "AdamW"}, "steps_per_print": 0}).destroy()
    return {name: buffer.to(torch.complex64).real for name, buffer in model.named_buffers()}


def test_buffers_of_every_dtype_take_the_values_of_rank_0(ranks):
    """F9: types that the transport cannot add can still be sent."""
    for buffers in ranks(2).run(buffers_after_initialize):
        assert len(buffers) == 2 * len(BUFFER_DTYPES)
        for name, value in buffers.items():
            assert torch.equal(value, torch.ones_like(value)), name


# -- F5: engines side by side


def run_interleaved(stages: tuple[int, int], steps: int = 4) -> list[dict[str, Tensor]]:
    """Two engines whose calls alternate within every step."""
    configs = [base_config(stage=stages[0]), base_config(stage=stages[1], gradient_clipping=0.1)]
    engines = [partita.Engine(make_model(seed), config=config) for seed, config in enumerate(configs)]
    for step in range(steps):
        batch = part(global_batch(step, engines[0].train_batch_size()), engines[0].global_rank, engines[0].world_size)
        losses = [engine(*batch) for engine in engines]
        for engine, loss in reversed(list(zip(engines, losses, strict=True))):
            engine.backward(loss)
        for engine in engines:
            engine.step()
    return [engine.module_state_dict() for engine in engines]


@pytest.mark.parametrize("stages", [(0, 2), (2, 2), (1, 0)])
def test_interleaved_engines_give_what_each_gives_alone(ranks, stages):
    """F5: no state is shared between engines."""
    together = ranks(2).run(run_interleaved, stages)
    for i, changes in enumerate(({}, {"gradient_clipping": 0.1})):
        alone = ranks(2).run(train, base_config(stage=stages[i], **changes), 4, make_model(i))
        for rank in range(2):
            for name, value in alone[rank][1].items():
                assert torch.equal(together[rank][i][name], value), f"engine {i}, {name}"


def test_a_loss_through_two_engines_trains_both_as_torch_does():
    """F5: a generator and a discriminator."""
    models = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(2)]
    references = copy.deepcopy(models)
    config = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "steps_per_print": 0}
    generator, critic = engines = [partita.Engine(model, config=config) for model in models]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in references]
    for step in range(3):
        noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        generator.backward(critic(generator(noise)[:, :3]).pow(2).mean())
        references[1](references[0](noise)[:, :3]).pow(2).mean().backward()
        for engine in engines:
            engine.step()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for model, reference in zip(models, references, strict=True):
        for value, expected in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(value, expected)


LIVES_PROGRAM = """
import gc, os, sys, torch, partita

def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def life(model, stage):
    engine = partita.Engine(model, config={"optimizer": {"type": "AdamW"}, "steps_per_print": 0,
                            "zero_optimization": {"stage": stage}, "bf16": {"enabled": stage == 1}})
    engine.train_batch(torch.ones(2, 700).to(model[0].weight.dtype))
    engine.destroy()

class Model(torch.nn.Sequential):
    def forward(self, x):
        return super().forward(x).float().mean()

def build():
    return Model(torch.nn.Linear(700, 700), torch.nn.Linear(700, 700))

kept = build()
sizes = []
for i in range(50):
    life(kept if i % 2 else build(), i % 3)
    gc.collect()
    sizes.append(resident_bytes())
print(max(sizes[10:]) - sizes[9], sum(p.numel() * 4 for p in kept.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_fifty_engines_leave_no_memory_behind(tmp_path):
    """F5: after ten lives, forty more add less than one model, for new models and for one that is used again."""
    command = [sys.executable, "-c", LIVES_PROGRAM]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=tmp_path, env=one_thread, timeout=300
    )
    growth, model_bytes = map(int, done.stdout.split())
    assert growth < model_bytes, f"{growth:,} bytes"


@pytest.mark.parametrize("stage", STAGES)
def test_destroy_leaves_nothing_on_the_model_and_nobody_holds_the_engine(stage):
    """F5."""
    model = nn.Linear(3, 1)
    config: dict[str, Any] = {"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": stage}}
    engine = partita.Engine(model, config=config)
    output = engine(torch.ones(2, 3))
    engine.backward(output.mean())
    engine.step()
    alive = weakref.ref(engine)
    engine.destroy()
    del engine, output
    gc.collect()
    assert alive() is None
    assert not any(p._post_accumulate_grad_hooks or p._backward_hooks for p in model.parameters())
    assert not (model._forward_hooks or model._forward_pre_hooks or model._backward_hooks)
