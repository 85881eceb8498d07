"""An engine that was refused or destroyed, at any point, leaves nothing behind: no hook, buffer, group or class.

Except where the values of a parameter are gone (stage 3): its class stays and refuses its use until it has memory.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any
from unittest import mock

import partita
import pytest
import torch
from blocks_model import BlocksModel, batch_of, config_for, make_blocks, take_step
from partita.comm import Communicator
from partita.units import FlatParameters, GradientReducer, ParameterLifetimes
from torch import nn
from torch.distributed import distributed_c10d

STAGES = (0, 1, 2, 3)
EVERYTHING: dict[str, Any] = {
    "activation_checkpointing": {"enabled": True},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 8}},
    "bf16": {"enabled": True},
}

# What an engine is made of, in the order in which it is made: each fails in turn.
CONSTRUCTION = [
    "partita.run.run.load_config",
    "partita.run.run.streams_of",
    "partita.run.run.ProcessGrid",
    "partita.run.run.resolve_batch_sizes",
    "partita.run.run.precision_of",
    "partita.run.run.Run",
    "partita.engine.prepare.choose_optimizer",
    "partita.engine.prepare.require_supported",
    "partita.engine.prepare.ShardedOptimizer",
    "partita.engine.prepare.choose_scheduler",
    "partita.engine.prepare.sharded_loader",
    "partita.engine.prepare.StepController",
    "partita.engine.prepare.LossScaling",
    "partita.engine.engine.Accumulation",
    "partita.engine.prepare.ParameterGathers",
    "partita.engine.engine.ModelPart",
    "partita.model.part.ActivationCheckpoints",
    "partita.model.part.take_model",
    "partita.model.take.refuse_unfit",
    "partita.model.take.build_units",
    "partita.units.build.plan_trained",
    "partita.units.build.Unit",
    "partita.units.build.FlatParameters",
    "partita.model.take.place_untrained",
    "partita.model.part.ModelGuard",
    "partita.units.ParameterGathers.wait_in_forward",
    "partita.model.part.Backward",
    "partita.model.backward.ParameterLifetimes",
    "partita.model.backward.GradientReducer",
    "partita.model.part.ParameterAccess",
    "partita.model.part.GivenAccess",
    "partita.engine.engine.OptimizerStep",
    "partita.step.optimizer_step.Monitor",
    "partita.step.optimizer_step.PhaseTimers",
    "partita.step.optimizer_step.SkipGuard",
    "partita.step.optimizer_step.StepOutcomes",
    "partita.step.optimizer_step.ShardedStep",
    "partita.optim.sharded_step.TorchUpdate",
    "partita.engine.base.EngineBase._announce",
]
# Made several times: the second one fails.
SEVERAL = {"partita.units.build.Unit", "partita.units.build.FlatParameters"}


class InjectedError(Exception):
    """Not an error of anybody else."""


def failing(original: Any, after: int) -> Callable[..., Any]:
    """A stand-in for what is made: the call after `after` calls fails."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise InjectedError("injected")
        return original(*args, **kwargs)

    return call


def marks(model: nn.Module) -> list[str]:
    """What is on a model and its parameters that a plain model does not have. Parameters without values get memory."""
    found = []
    model.to_empty(device="cpu")
    for path, module in model.named_modules():
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            found += [f"{path}.{hooks}"] if getattr(module, hooks) else []
        found += [f"{path}.{name}" for name in vars(module) if name == "forward" or "partita" in name]
    for name, parameter in model.named_parameters():
        found += [f"{name}: {type(parameter).__name__}"] if type(parameter) is not nn.Parameter else []
        found += [f"{name}.{key}" for key in vars(parameter)]
        hooked = parameter._post_accumulate_grad_hooks or parameter._backward_hooks
        found += [f"{name}: hooks"] if hooked else []
    return found


def alive() -> list[str]:
    """What engines are made of, and is not garbage."""
    gc.collect()
    kinds = (FlatParameters, GradientReducer, ParameterLifetimes, partita.Engine, torch.optim.Optimizer)
    return sorted(kind.__name__ for kind in map(type, gc.get_objects()) if issubclass(kind, kinds))


def groups() -> int:
    return len(distributed_c10d._world.pg_map)


def frozen_blocks() -> BlocksModel:
    """With a frozen block, and so with units that are not trained."""
    model = make_blocks()
    model.body.blocks[1].requires_grad_(False)
    return model


def _refused(config: dict[str, Any], step: str, optimizer: Any) -> tuple[list[str], list[str], int]:
    """What a construction leaves that fails at a step: on the model, in memory, process groups (-1: it does not come to
    that step)."""
    groups_before = groups()
    model = frozen_blocks()
    given = [p for p in model.parameters() if p.requires_grad]
    own = optimizer(given, lr=0.1) if optimizer else None
    originals = [p.detach().clone() for p in model.parameters()]
    owner, _, name = step.rpartition(".")
    original = _resolve(step)
    stand_in = failing(original, after=int(step in SEVERAL))
    is_method = owner.rpartition(".")[2][0].isupper()
    replacement = (lambda self, *a, **k: stand_in(self, *a, **k)) if is_method else stand_in
    try:
        with mock.patch(f"{owner}.{name}", replacement):
            engine = partita.Engine(model, own, train_data=list(range(64)), config=config)
    except InjectedError:
        pass
    else:
        engine.destroy()
        return [], [], -1
    left = marks(model)
    if own is not None and [id(p) for p in own.param_groups[0]["params"]] != [id(p) for p in given]:
        left.append("the optimizer has other parameters")
    changed = [n for (n, p), was in zip(model.named_parameters(), originals, strict=True) if p.numel() != was.numel()]
    if changed and config["zero_optimization"]["stage"] < 3:
        left.append(f"{changed} have no values")
    del own, given, originals, model
    return left, alive(), groups() - groups_before


def _resolve(path: str) -> Any:
    parts = path.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found: Any = __import__(".".join(parts[:i]), fromlist=["_"])
        except ImportError:
            continue
        for name in parts[i:]:
            found = getattr(found, name)
        return found
    raise AssertionError(path)


def _refused_everywhere(config: dict[str, Any], optimizer: Any) -> list[str]:
    """The steps that were come to; each leaves nothing."""
    taken, before = [], alive()
    for step in CONSTRUCTION:
        left, objects, groups_left = _refused(config, step, optimizer)
        if groups_left < 0:
            continue
        taken.append(step)
        assert not left, f"{step}: {left}"
        assert objects == before, f"{step}: {objects}"
        assert groups_left == 0, f"{step}: {groups_left} groups"
    return taken


@pytest.mark.parametrize(
    ("stage", "over"),
    [(0, "torch"), (1, "shared_memory"), (3, "shared_memory"), (3, "torch")],
)
def test_each_step_of_the_construction_fails_in_turn(ranks, stage, over):
    """Nothing is left on the model, in memory or among the groups, on any of 2 ranks."""
    sgd = None if stage == 1 else torch.optim.SGD
    zero = {"overlap_gather": stage in (1, 2)}
    changes = dict(EVERYTHING)
    if sgd is not None:
        changes["optimizer"] = None
    taken = ranks(2).run(_refused_everywhere, config_for(stage, over, zero=zero, **changes), sgd)[0]
    skipped = set(CONSTRUCTION) - set(taken)
    expected = {"partita.units.build.FlatParameters"}  # where there is no second frozen unit
    expected |= set() if stage in (1, 2) else {"partita.units.ParameterGathers.wait_in_forward"}
    expected |= {"partita.optim.sharded_step.TorchUpdate"} if sgd is None else set()
    assert skipped <= expected, skipped


def _destroyed(config: dict[str, Any], point: str) -> None:
    before, groups_before = alive(), groups()
    model = frozen_blocks()
    engine = partita.Engine(model, config=config)
    if point != "at once":
        take_step(engine, 0)
    if point in ("after forward", "after backward"):
        loss = engine(*batch_of(1, engine.global_rank))
        if point == "after backward":
            engine.backward(loss)
        del loss
    if point == "after an error":
        with pytest.raises(TypeError):
            engine(1, 2, 3)
    engine.destroy()
    engine.destroy()
    assert not marks(model), f"{point}: {marks(model)}"
    assert not [name for name in alive() if name not in before and name != "Engine"], point
    assert groups() == groups_before, point
    del engine, model
    assert not [name for name in alive() if name not in before], point


@pytest.mark.parametrize("over", ["shared_memory", "torch"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_destroyed_engine_leaves_nothing(ranks, stage, over):
    """At whatever point of a step it is destroyed; a second destroy() does nothing."""
    config = config_for(stage, over, zero={"overlap_gather": stage in (1, 2)}, **EVERYTHING)
    for point in ("at once", "after a step", "after forward", "after backward", "after an error"):
        ranks(2).run(_destroyed, config, point)


def _goes_on(config: dict[str, Any]) -> bool:
    """A model that an engine refused in the midst trains as one that was never refused."""
    model, other = make_blocks(), make_blocks()
    with pytest.raises(InjectedError), mock.patch("partita.engine.engine.OptimizerStep", failing(None, 0)):
        partita.Engine(model, config=config)
    losses = []
    for each in (model, other):
        engine = partita.Engine(each, config=config)
        losses.append([take_step(engine, step) for step in range(3)])
        engine.destroy()
    return losses[0] == losses[1]


@pytest.mark.parametrize("stage", (0, 1, 2))
def test_a_refused_model_can_be_trained(ranks, stage):
    assert ranks(2).run(_goes_on, config_for(stage, "shared_memory")) == [True, True]


def _learning_rate(config: dict[str, Any]) -> tuple[float, list[str]]:
    """Of the program's optimizer, after an engine with a schedule was refused."""
    model = make_blocks()
    model.body.embed.weight.data = model.body.embed.weight.data.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="float64"):
        partita.Engine(model, optimizer, config=config)
    return optimizer.param_groups[0]["lr"], sorted(optimizer.param_groups[0].keys() - optimizer.defaults.keys())


def test_a_refused_schedule_leaves_the_learning_rate(ranks):
    """A warm-up starts at 0, and would stay there."""
    config = config_for(1, "shared_memory", **EVERYTHING)
    assert ranks(2).run(_learning_rate, {**config, "optimizer": None}) == [(0.1, ["params"])] * 2


def _destroyed_beside(config: dict[str, Any]) -> None:
    """An engine that only evaluates is destroyed while a later one trains the same model."""
    model = make_blocks()
    first = partita.Engine(model, config={**config, "optimizer": None})
    second = partita.Engine(model, config=config)
    alone = partita.Engine(make_blocks(), config=config)
    first.destroy()
    for step in range(2):
        assert take_step(second, step) == take_step(alone, step)
    weights, expected = second.module_state_dict(), alone.module_state_dict()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    second.destroy()
    alone.destroy()


@pytest.mark.parametrize("over", ["shared_memory", "torch"])
def test_an_engine_lets_go_of_its_own_only(ranks, over):
    ranks(2).run(_destroyed_beside, config_for(3, over))


def _dropped(config: dict[str, Any]) -> list[str]:
    before, model = alive(), make_blocks()
    engine = partita.Engine(model, config=config)
    take_step(engine, 0)
    del engine
    return [name for name in alive() if name not in before and name != "ParameterGathers"]


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_that_is_dropped_is_freed_though_its_model_lives(ranks, stage):
    config = config_for(stage, "shared_memory", zero={"overlap_gather": stage in (1, 2)})
    assert ranks(2).run(_dropped, config) == [[], []]


def _failing_close(config: dict[str, Any]) -> list[str]:
    """One closing fails: the others are closed all the same, and the error is raised."""
    model = make_blocks()
    engine = partita.Engine(model, config=config)
    take_step(engine, 0)
    with (
        mock.patch.object(GradientReducer, "wait", side_effect=InjectedError("injected")),
        pytest.raises(InjectedError),
    ):
        engine.destroy()
    return marks(model)


def test_all_is_closed_when_one_closing_fails(ranks):
    assert ranks(2).run(_failing_close, config_for(2, "shared_memory")) == [[], []]


def test_communicators_are_closed_once(ranks):
    """The communicators of an engine are closed with it, and by nobody else."""
    assert ranks(2).run(_closings, config_for(3, "torch")) == [[1, 1], [1, 1]]


def _closings(config: dict[str, Any]) -> list[int]:
    from partita.comm import TorchCommunicator

    closed: dict[int, int] = {}
    original = TorchCommunicator.close

    def count(self: Communicator) -> None:
        closed[id(self)] = closed.get(id(self), 0) + 1
        original(self)

    with mock.patch.object(TorchCommunicator, "close", count):
        engine = partita.Engine(make_blocks(), config=config)
        engine.destroy()
    return sorted(closed.values())
