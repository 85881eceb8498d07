"""A model whose layers are on the ranks of a pipeline, trained by gradients that are written: no schedule, no executor.

What a rank has after some steps is told in pieces, which any split of the model can be compared by.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import partita
import torch
from partita.engine import EngineBase
from partita.model import Accumulation, LossScaling, ModelPart
from partita.optim import ShardedOptimizer, StepController, choose_optimizer
from partita.run import begin_run, loss_scaler_of
from partita.step import OptimizerStep
from partita.units import ParameterGathers
from torch import Tensor, nn

WIDTH = 33
LAYERS = 6
TIED, REPLICA = "0.weight", f"{LAYERS - 1}.weight"
SAMPLES = 12  # of a step, on any number of ranks

# The rank of each stage, and the data ranks. None: a plain engine has the whole model.
SPLITS: dict[str, tuple[tuple[int, ...] | None, int]] = {
    "plain x 1": (None, 1),
    "plain x 2": (None, 2),
    "1 x 1": ((0,), 1),
    "1 x 1, 2 chunks": ((0, 0), 1),
    "2 x 1": ((0, 1), 1),
    "2 x 1, 2 chunks": ((0, 1, 0, 1), 1),
    "2 x 1, V": ((0, 1, 1, 0), 1),
    "1 x 2": ((0,), 2),
    "2 x 2": ((0, 1), 2),
    "3 x 1": ((0, 1, 2), 1),
    "4 x 1": ((0, 1, 2, 3), 1),
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "split": {"bf16": {"enabled": True, "master_weights": "split"}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 6}},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
    "SGD": {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}},
}

# (parameter, quantity) -> runs of its elements: the number of the first one, and their values.
Pieces = dict[tuple[str, str], list[tuple[int, Tensor]]]


class Scale(nn.Module):
    """A parameter with one element, one without, and buffers, of which a state dict leaves out one."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))
        self.none = nn.Parameter(torch.empty(0, 3))
        self.register_buffer("seen", torch.tensor(by))
        self.register_buffer("hidden", torch.rand(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by + self.none.sum()


def layer(i: int, seed: int) -> nn.Module:
    """Layer i, whatever rank builds it."""
    with torch.random.fork_rng([]):
        torch.manual_seed(100 * seed + i)
        if i in (1, 4):
            return Scale(1.0 + seed + i)
        return nn.Linear(WIDTH, WIDTH, bias=i != LAYERS - 1).requires_grad_(i != 2)


def sequential(seed: int, *, tied: bool) -> nn.Sequential:
    """The whole model. tied: the first and the last layer have one weight."""
    model = nn.Sequential(*(layer(i, seed) for i in range(LAYERS)))
    if tied:
        model[LAYERS - 1].weight = model[0].weight
    return model


class SplitEngine(EngineBase):
    """The stages of this rank.

    Args:
        stage_ranks: the rank of the pipeline that has each stage.
    """

    def __init__(self, config: dict[str, Any], stage_ranks: tuple[int, ...], seed: int, *, tied: bool) -> None:
        pipe, stages = max(stage_ranks) + 1, len(stage_ranks)
        bounds = [range(LAYERS * s // stages, LAYERS * (s + 1) // stages) for s in range(stages)]
        with ExitStack() as exits:
            run = begin_run(config, torch.device("cpu"), exits, pipe=pipe)
            self.data_rank = run.grid.coordinates.data
            mine = [s for s, rank in enumerate(stage_ranks) if rank == run.grid.coordinates.pipe]
            modules = [nn.ModuleDict({str(i): layer(i, seed) for i in bounds[s]}) for s in mine]
            replicas = [_tie(modules, bounds, s, seed) if tied else {} for s in mine]
            module = nn.ModuleDict({name: child for stage in modules for name, child in stage.items()})
            inner = choose_optimizer(None, module, None, run.config)
            assert inner is not None
            controller = StepController(loss_scaler_of(run.config, run.precision), run.streams, run.world_size)
            scaling = LossScaling(controller.scale if run.precision.scales_loss else None)
            gathers = ParameterGathers()
            exits.callback(gathers.close)
            self.parts = [
                ModelPart(one, inner, run, scaling, Accumulation(1, run.policy), gathers, exits, own)
                for one, own in zip(modules, replicas, strict=True)
            ]
            outer = ShardedOptimizer(inner)
            self.taken = OptimizerStep(run, self.parts, outer, None, controller, gathers, exits)
            super().__init__(run, module, self.parts, self.taken, outer, None, None, exits)

    def take_steps(self, steps: int) -> None:
        """Each parameter gets gradients that follow from its name, the step and the data rank."""
        for _ in range(steps):
            for part in self.parts:
                for unit in part.units:
                    for slot, parameter in zip(unit.layout.slots, unit.parameters, strict=True):
                        name = part.replicas.get(slot.name, slot.name)
                        seed = 1000 * self.global_steps + 100 * self.data_rank + sum(map(ord, name))
                        values = torch.randn(slot.shape, generator=torch.Generator().manual_seed(seed))
                        parameter.grad = values.to(parameter.dtype)
                part.finish_backward()
                part.forget()
                part.accumulation.advance()
            for buffer in (b for part in self.parts for name, b in part.module.named_buffers() if "seen" in name):
                buffer.add_(1.0)
            self.taken.update()


def ranks_of(split: str) -> int:
    stages, data = SPLITS[split]
    return data * (1 + max(stages or (0,)))


def config_for(split: str, stage: int, precision: str, optimizer: str) -> dict[str, Any]:
    return {
        "train_batch_size": SAMPLES,
        "train_micro_batch_size_per_gpu": SAMPLES // SPLITS[split][1],
        "optimizer": OPTIMIZERS[optimizer],
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1500},
        "steps_per_print": 0,
        **PRECISIONS[precision],
    }


def engine_for(config: dict[str, Any], split: str, seed: int, tied: bool) -> Any:
    stages = SPLITS[split][0]
    if stages is None:
        return partita.Engine(sequential(seed, tied=tied), config=config)
    return SplitEngine(config, stages, seed, tied=tied)


def take_steps(engine: Any, steps: int) -> None:
    if isinstance(engine, SplitEngine):
        engine.take_steps(steps)
        return
    for _ in range(steps):
        x = torch.randn(SAMPLES, WIDTH).to(next(engine.module.parameters()).dtype)
        engine.backward(engine(x).float().square().mean())
        engine.step()


def pieces_of(engine: EngineBase) -> Pieces:
    """What this rank has of masters, moments, weights and buffers."""
    state = engine.train_state()
    found: Pieces = {}
    for quantity in state.quantities():
        flat = quantity.read()
        for s in quantity.slices:
            key = (s.slot.name, quantity.name)
            found.setdefault(key, []).append((s.parameter_offset, flat[s.in_shard].detach().clone()))
    for name, tensor in engine.module_state_dict().items():
        found[name, "stored"] = [(0, tensor.reshape(-1))]
    return found


def whole(told: list[Pieces], *, tied: bool) -> dict[str, Tensor]:
    """The state of all ranks. What several ranks have is the same there; a tied weight has one name."""
    found: dict[str, dict[int, Any]] = {}
    for pieces in told:
        for (name, quantity), runs in pieces.items():
            values = found.setdefault(f"{quantity} {TIED if tied and name == REPLICA else name}", {})
            for first, run in runs:
                for i, value in enumerate(run.view(torch.int16 if run.itemsize == 2 else torch.int32).tolist(), first):
                    assert values.setdefault(i, value) == value, (name, quantity, i)
    return {key: torch.tensor([values[i] for i in range(len(values))]) for key, values in found.items()}


def _tie(modules: list[nn.ModuleDict], bounds: list[range], stage: int, seed: int) -> dict[str, str]:
    """The last layer has the weight of the first: as one parameter in one stage, else as a replica."""
    last = str(LAYERS - 1)
    if LAYERS - 1 not in bounds[stage]:
        return {}
    module = next(module for module in modules if last in module)
    if "0" in module:
        module[last].weight = module["0"].weight
        return {}
    with torch.no_grad():
        module[last].weight.copy_(layer(0, seed).weight)
    return {REPLICA: TIED}
