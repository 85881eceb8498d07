"""bf16.master_weights = "split" against "fp32": the same bits, two bytes less per parameter."""

from __future__ import annotations

from typing import Any

import inside
import partita
import pytest
import torch
from dictated import SPLIT, Dictated, config_for, dictate, masters, merged, share, take_step
from gradient_models import Vectors
from support import load
from support import whole as gathered
from torch import Tensor, nn

STAGES = (0, 1, 2, 3)
WHOLE: dict[str, Any] = {"bf16": {"enabled": True, "master_weights": "fp32"}}
ADAM = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}}
KINDS = {"fp32": WHOLE, "split": SPLIT}
DECAY = {
    "type": "WarmupDecayLR",
    "params": {"warmup_num_steps": 5, "total_num_steps": 1200, "warmup_max_lr": 0.02, "warmup_type": "linear"},
}


class Mixed(nn.Module):
    """Odd sizes, a parameter without elements, a frozen one in between; groups of their own hyper-parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 13)
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.frozen = nn.Linear(13, 7)
        self.one = nn.Parameter(torch.ones(1))
        self.last = nn.Linear(7, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x.to(self.one.dtype))) * self.one
        return (self.last(torch.tanh(self.frozen(hidden))).float() - x[:, :3]).square().mean() + self.nothing.sum()

    def optimizer(self) -> torch.optim.Optimizer:
        weights = [self.first.weight, self.last.weight, self.nothing]
        others = [self.first.bias, self.one, self.last.bias]
        return torch.optim.AdamW([{"params": weights, "weight_decay": 0.1}, {"params": others, "lr": 3e-3}], lr=1e-2)


def make_pair(**changes: Any) -> tuple[partita.Engine, partita.Engine]:
    engines = []
    for kind in (WHOLE, SPLIT):
        model = Mixed()
        config = config_for(**{"scheduler": DECAY, "gradient_clipping": 0.5, **changes, **kind})
        engines.append(partita.Engine(model, model.optimizer(), config=config))
    return engines[0], engines[1]


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


def assert_same_state(whole: partita.Engine, split: partita.Engine, where: str) -> None:
    with gathered(whole), gathered(split):
        for (name, p), q in zip(whole.module.named_parameters(), split.module.parameters(), strict=True):
            assert torch.equal(bits(p), bits(q)), f"{name} {where}"
    for (name, value), other in zip(masters(whole).items(), masters(split).values(), strict=True):
        assert torch.equal(bits(value), bits(other)), f"master of {name} {where}"
    for moment in ("exp_avg", "exp_avg_sq"):
        ours, theirs = ([unit[moment] for unit in inside.moments(engine)] for engine in (split, whole))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), f"{moment} {where}"
    assert split.get_lr() == whole.get_lr(), where
    assert split.skipped_steps == whole.skipped_steps, where


def train_side_by_side(whole: partita.Engine, split: partita.Engine, steps: int) -> None:
    """Every 37th step, and the 4th, is skipped: rank 0 makes a NaN in its first micro-batch."""
    for step in range(steps):
        for i in range(whole.gradient_accumulation_steps()):
            index = (step * 10 + i) * whole.world_size + whole.global_rank
            x = torch.randn(2, 5, generator=torch.Generator().manual_seed(index))
            bad = i == 0 and whole.global_rank == 0 and (step == 3 or step % 37 == 36)
            losses = [engine(x) for engine in (whole, split)]
            assert losses[0].item() == losses[1].item(), f"loss of step {step}"
            for engine, loss in zip((whole, split), losses, strict=True):
                engine.backward(loss * float("nan") if bad else loss)
                engine.step()
        norms = [engine.get_global_grad_norm() for engine in (whole, split)]
        assert norms[0] == norms[1] or norms[0] != norms[0] != norms[1], f"norms {norms} of step {step}"
    assert whole.skipped_steps == 1 + steps // 37


def _stays_the_same(steps: int, changes: dict[str, Any]) -> None:
    whole, split = make_pair(**changes)
    assert_same_state(whole, split, "at the start")
    with gathered(split):
        before = {name: p.detach().clone() for name, p in split.module.named_parameters()}
    train_side_by_side(whole, split, steps)
    assert_same_state(whole, split, f"after {steps} steps")
    with gathered(split):
        unchanged = [name for name, p in split.module.named_parameters() if torch.equal(p, before[name])]
    assert unchanged == ["nothing", "frozen.weight", "frozen.bias"]
    for engine in (whole, split):
        engine.destroy()


def test_a_thousand_steps_have_the_same_bits(ranks):
    """N1: losses, weights, masters, moments; with clipping, a schedule, groups, frozen parameters, skipped steps."""
    ranks(1).run(_stays_the_same, 1000, {})


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_stage_has_the_same_bits(ranks, world_size, stage, accumulation):
    """G8, G9, N1: sizes that two ranks do not divide, one element, none; skipped steps in between."""
    ranks(world_size).run(_stays_the_same, 40, {"stage": stage, "gradient_accumulation_steps": accumulation})


def _odd_vectors(stage: int, sizes: tuple[int, ...]) -> None:
    config = {**config_for(stage), "optimizer": ADAM}
    whole, split = (partita.Engine(Vectors(sizes), config={**config, **kind}) for kind in (WHOLE, SPLIT))
    for step in range(5):
        x = torch.randn(len(sizes), max(sizes), generator=torch.Generator().manual_seed(step))
        for engine in (whole, split):
            engine.backward(engine(x))
            engine.step()
    assert_same_state(whole, split, f"with sizes {sizes}")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("sizes", [(1,), (97, 1, 64, 0)], ids=str)
def test_fewer_elements_than_ranks(ranks, stage, sizes):
    """G8, G9: ranks without any element of a unit."""
    ranks(3).run(_odd_vectors, stage, sizes)


def _with_ties() -> Dictated:
    """Every second weight of e lies in the middle between two bf16 numbers."""
    model = Dictated()
    with torch.no_grad():
        model.e[::2] = (torch.arange(7001) % 106) / 128 + 1 + 2**-8
    return model


def _masters_at_the_start(kind: str, stage: int) -> dict[str, Tensor]:
    model = _with_ties()
    engine = partita.Engine(model=model, config=config_for(stage, optimizer=ADAM, **KINDS[kind]))
    with gathered(engine):
        for (name, parameter), weight in zip(model.named_parameters(), _with_ties().parameters(), strict=True):
            assert torch.equal(parameter.detach().float(), rounded(weight.detach())), (
                f"{name} is not its master rounded"
            )
    return masters(engine)


@pytest.mark.parametrize("kind", ["fp32", "split"])
@pytest.mark.parametrize("stage", STAGES)
def test_masters_are_the_users_weights_bit_for_bit(ranks, stage, kind):
    """O1: nothing is lost when the model is converted to bf16, and every rank rounds alike."""
    weights = dict(_with_ties().named_parameters())
    for name, value in merged(ranks(2).run(_masters_at_the_start, kind, stage)).items():
        assert torch.equal(bits(value), bits(weights[name].flatten())), name


def _bytes_per_parameter(kind: str, stage: int) -> float:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)))
    engine = partita.Engine(model, config=config_for(stage, optimizer=ADAM, **KINDS[kind]))
    kept: list[Tensor | None] = []
    for unit in inside.units(engine):
        assert (unit.master is None, unit.remainder is None) == (kind == "split", kind == "fp32")
        kept += [unit.own_params if stage == 3 else unit.params, unit.master, unit.remainder]
        kept.append(unit.reduced if unit.full_grads is None else unit.full_grads)
        assert unit.residence.gathered_bytes == 0
    kept += [moment for by_name in inside.moments(engine) for moment in by_name.values()]
    return sum(t.nbytes for t in kept if t is not None) / (3 * 64 * 64)


@pytest.mark.parametrize("stage", STAGES)
def test_two_bytes_less_for_every_parameter_that_a_rank_owns(ranks, stage):
    """2 parameter + 2 gradient + 8 moments + 4 master, or + 2 remainder: 16 and 14; shards are owned by one rank."""
    shares = {0: (1, 1, 1), 1: (1, 1, 2), 2: (1, 2, 2), 3: (2, 2, 2)}[stage]  # of parameters, gradients, states
    for kind, master in (("fp32", 4), ("split", 2)):
        expected = 2 / shares[0] + 2 / shares[1] + (8 + master) / shares[2]
        assert ranks(2).run(_bytes_per_parameter, kind, stage) == [expected, expected]


def _loads_and_stands_still(stage: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Masters after a write into some parameters and a step with lr 0, and before the write."""
    still = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}}
    engine = partita.Engine(model=Dictated(), config=config_for(stage, optimizer=still, **SPLIT))
    take_step(engine, dictate(0))
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    before = masters(engine)
    with torch.no_grad(), gathered(engine, engine.module.c, engine.module.a):
        engine.module.c.copy_(Dictated(seed=7).c)
        engine.module.a.view(-1)[3] = 5.0
    written = engine.module_state_dict()
    take_step(engine, {name: grad * float("nan") for name, grad in dictate(1).items()})  # skipped
    take_step(engine, dictate(1))
    for name, value in engine.module_state_dict().items():
        assert torch.equal(value, written[name]), f"{name} moved with learning rate 0"
    return masters(engine), before


@pytest.mark.parametrize("stage", STAGES)
def test_only_written_parameters_lose_their_remainder(ranks, stage):
    """O3: loaded weights are adopted as bf16 holds them, also when the next step is skipped; others keep all bits."""
    results = ranks(2).run(_loads_and_stands_still, stage)
    after, before = (merged([r[i] for r in results]) for i in (0, 1))
    expected = dict(before)
    expected["a"] = before["a"].clone()
    for name in ("a", "c"):
        expected[name] = rounded(expected[name])
    expected["a"][3] = 5.0
    expected["c"] = Dictated(seed=7).c.detach().bfloat16().float()
    for name, value in expected.items():
        assert torch.equal(bits(after[name]), bits(value)), name
    assert not torch.equal(bits(before["e"]), bits(rounded(before["e"])))


def rounded(master: Tensor) -> Tensor:
    """As bf16 weights are: ties away from zero."""
    return ((master.view(torch.int32) + 0x8000) & ~0xFFFF).view(torch.float32)


def _trains_on(stage: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Masters of a model that loaded weights after a few steps, and of one that was given them."""
    config = config_for(stage, optimizer=ADAM, **SPLIT)
    late = partita.Engine(model=Dictated(), config=config)
    load(late, Dictated(seed=7).state_dict())
    model = Dictated()
    model.load_state_dict({name: value.bfloat16().float() for name, value in Dictated(seed=7).state_dict().items()})
    early = partita.Engine(model=model, config=config)
    for step in range(3):
        for engine in (late, early):
            engine.backward(engine(share(dictate(step), engine.global_rank, engine.world_size)))
            engine.step()
    return masters(late), masters(early)


@pytest.mark.parametrize("stage", STAGES)
def test_training_goes_on_from_loaded_weights(ranks, stage):
    """O3."""
    for late, early in ranks(2).run(_trains_on, stage):
        for name, value in early.items():
            assert torch.equal(bits(late[name]), bits(value)), name
