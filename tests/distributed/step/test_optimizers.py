"""The native Adam and AdamW in the engine: start, groups, mixed dtypes, unused and frozen parameters."""

from __future__ import annotations

from typing import Any

import inside
import partita
import pytest
import torch
from dictated import (
    PRECISIONS,
    SHAPES,
    Dictated,
    assert_follows,
    config_for,
    dictate,
    masters,
    merged,
    plain,
    take_step,
)
from partita.config import ConfigError
from support import whole
from torch import Tensor, nn

STAGES = (0, 1, 2, 3)
ADAM = {"lr": 0.03, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1}


def _adam_w(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), **ADAM)


def _adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), **ADAM)


def _groups(module: nn.Module) -> list[dict[str, Any]]:
    """Not in the order of registration; one group is empty."""
    p = dict(module.named_parameters())
    return [
        {"params": [p["e"], p["a"]], "lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3},
        {"params": [], "lr": 7.0},
        {"params": [p["b"], p["d"]], "weight_decay": 0.0, "lr": 0.01},
        {"params": [p["c"]]},
    ]


def _grouped_adam_w(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_groups(module), lr=0.02, weight_decay=0.3)


def _grouped_adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(_groups(module), lr=0.02, weight_decay=0.3)


def _fresh(config: dict[str, Any], seed_of_rank: bool) -> tuple[dict[str, Tensor], list[int], list[float]]:
    """Masters right after initialize, the numbers that must be 0, and the sums of the moments."""
    rank = torch.distributed.get_rank()
    engine = partita.Engine(model=Dictated(seed=rank if seed_of_rank else 0), config=config)
    state = inside.loss_scale(engine)
    counts = [engine.global_steps, engine.micro_steps, engine.skipped_steps, state.applied_steps, state.good_steps]
    return masters(engine), counts, [float(m.abs().sum()) for unit in inside.moments(engine) for m in unit.values()]


@pytest.mark.pairwise
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("seed_of_rank", [False, True], ids=["equal ranks", "other weights on rank 1"])
def test_masters_are_the_given_fp32_weights(ranks, stage, precision, seed_of_rank):
    """O1: bit-equal to rank 0's weights, although the parameters are rounded; step 0, moments 0."""
    results = ranks(2).run(_fresh, config_for(stage, precision, optimizer={"type": "AdamW"}), seed_of_rank)
    given = {name: p.detach().flatten() for name, p in Dictated().named_parameters()}
    for name, value in merged([r[0] for r in results]).items():
        assert torch.equal(value, given[name]), name
    for _, counts, moments in results:
        assert counts == [0] * 5
        assert moments == [0.0] * len(moments)


def _steps(config: dict[str, Any], steps: int, optimizer: Any = None) -> tuple[dict[str, Tensor], bool]:
    """Masters after some steps, and whether the parameters are the masters rounded (as far as this rank has them)."""
    engine = partita.Engine(model=Dictated(), optimizer=optimizer, config=config)
    for step in range(steps):
        take_step(engine, dictate(step))
    mine = masters(engine)
    with whole(engine):
        rounded = all(
            torch.equal(p.flatten()[known := ~mine[name].isnan()], mine[name][known].to(p.dtype))
            for name, p in engine.module.named_parameters()
        )
    return mine, rounded


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_first_update_is_torchs(ranks, stage, precision):
    """O1: where an update of a wrong step number, or with bias correction missing, differs most."""
    results = ranks(2).run(_steps, config_for(stage, precision, optimizer={"type": "AdamW", "params": ADAM}), 1)
    assert_follows(merged([r[0] for r in results]), plain(_adam_w, [dictate(0)])[0])
    assert all(rounded for _, rounded in results)


@pytest.mark.pairwise
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["L2", "decoupled"])
def test_decay_is_torchs(ranks, stage, precision, kind):
    """O4, F18: L2 for Adam with adam_w_mode false, decoupled for AdamW, over 10 steps."""
    means = {
        "L2": {"type": "Adam", "params": {**ADAM, "adam_w_mode": False}},
        "decoupled": {"type": "AdamW", "params": ADAM},
    }
    results = ranks(2).run(_steps, config_for(stage, precision, optimizer=means[kind]), 10)
    expected = plain(_adam if kind == "L2" else _adam_w, [dictate(step) for step in range(10)])[0]
    assert_follows(merged([r[0] for r in results]), expected)
    assert all(rounded for _, rounded in results)


def test_adam_and_adam_w_differ():
    """O4: so that the test above could tell them apart."""
    steps = [dictate(step) for step in range(10)]
    l2, decoupled = plain(_adam, steps)[0], plain(_adam_w, steps)[0]
    assert all((l2[name] - decoupled[name]).abs().max() > 1e-2 for name in SHAPES)


@pytest.mark.pairwise
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("make", [_grouped_adam_w, _grouped_adam])
def test_groups_have_their_own_settings(ranks, stage, precision, make):
    """O2, N6: four groups, one of them empty, in another order than the model's, in shared units."""
    config = config_for(stage, precision)
    config["zero_optimization"]["reduce_bucket_size"] = 1000
    results = ranks(2).run(_grouped_steps, config, make)
    assert_follows(merged(results), plain(make, [dictate(step) for step in range(10)])[0])


def _grouped_steps(config: dict[str, Any], make: Any) -> dict[str, Tensor]:
    model = Dictated()
    optimizer = make(model)
    engine = partita.Engine(model=model, optimizer=optimizer, config=config)
    assert inside.update_kind(engine) == "NativeAdam"
    assert engine.get_lr() == [0.1, 7.0, 0.01, 0.02]
    for step in range(10):
        take_step(engine, dictate(step))
    return masters(engine)


def _mixed_dtypes(config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, torch.dtype]]:
    model = Dictated()
    model.a.data = model.a.data.bfloat16()
    model.e.data = model.e.data.half()
    engine = partita.Engine(model=model, config=config)
    for step in range(5):
        take_step(engine, dictate(step))
    return masters(engine), {name: p.dtype for name, p in model.named_parameters()}


@pytest.mark.parametrize("stage", STAGES)
def test_dtypes_may_mix_in_a_group(ranks, stage):
    """O2: every parameter keeps its dtype; the 16-bit ones have fp32 masters."""
    scale = {"initial_scale_power": 8}  # there are float16 parameters, so the loss is scaled
    config = config_for(stage, optimizer={"type": "AdamW", "params": ADAM}, gradient_clipping=1.0, fp16=scale)
    results = ranks(2).run(_mixed_dtypes, config)

    def on_rounded_weights(module: nn.Module) -> torch.optim.Optimizer:
        with torch.no_grad():
            module.a.copy_(module.a.bfloat16())
            module.e.copy_(module.e.half())
        return _adam_w(module)

    expected, _ = plain(on_rounded_weights, [dictate(step) for step in range(5)], clip=1.0)
    assert_follows(merged([r[0] for r in results]), expected)
    dtypes = dict.fromkeys(SHAPES, torch.float32) | {"a": torch.bfloat16, "e": torch.float16}
    assert all(r[1] == dtypes for r in results)


def _some_unused(step: int) -> dict[str, Tensor]:
    """'a' is unused in step 1 and 2, 'e' in even steps, 'b' always."""
    unused = {"b"} | ({"a"} if step in (1, 2) else set()) | (set() if step % 2 else {"e"})
    return {name: grad for name, grad in dictate(step).items() if name not in unused}


def _steps_with_unused(config: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    engine = partita.Engine(model=Dictated(), config=config)
    for step in range(6):
        take_step(engine, _some_unused(step))
    return masters(engine), inside.loss_scale(engine).applied_steps


@pytest.mark.pairwise
@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_an_unused_parameter_has_a_gradient_of_zeros(ranks, stage, precision, kind):
    """O2: one step count for all; moments and weights of unused parameters decay as torch's do on zeros."""
    params = ADAM if kind == "AdamW" else {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    results = ranks(2).run(_steps_with_unused, config_for(stage, precision, optimizer={"type": kind, "params": params}))
    expected, _ = plain(
        lambda module: getattr(torch.optim, kind)(module.parameters(), **params), [_some_unused(s) for s in range(6)]
    )
    assert_follows(merged([r[0] for r in results]), expected)
    assert [r[1] for r in results] == [6, 6]


class _Adapted(nn.Module):
    """A frozen base with a trained low-rank adapter between two frozen layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.base = nn.Linear(6, 5)
        self.down = nn.Linear(6, 2, bias=False)
        self.up = nn.Linear(2, 5, bias=False)
        self.out = nn.Linear(5, 1)
        for frozen in (self.base, self.out):
            frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.base.weight.dtype)
        return self.out(torch.tanh(self.base(x) + self.up(self.down(x)))).float().square().mean()


def _adapters(config: dict[str, Any], all_in_the_optimizer: bool) -> dict[str, Any]:
    model = _Adapted()
    given = torch.optim.AdamW(model.parameters(), lr=0.1) if all_in_the_optimizer else None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = partita.Engine(model=model, optimizer=given, config=config)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        engine.backward(engine(torch.randn(4, 6, generator=generator)))
        engine.step()
    dtypes = {p.dtype for p in model.parameters()}
    assert dtypes == {inside.units(engine)[0].dtype}, "frozen parameters are cast as the others"
    with whole(engine):
        for name, parameter in model.named_parameters():
            same = torch.equal(parameter, before[name].to(parameter.dtype))
            assert same == name.startswith(("base", "out")), f"{name} {'did not change' if same else 'changed'}"
            assert parameter.grad is None
    units = inside.units(engine)
    return {
        "trained": sorted(slot.name for unit in units for slot in unit.layout.slots),
        "states": [m["exp_avg"].numel() for m in inside.moments(engine)] == [len(unit.own) for unit in units],
        "elements": sum(slot.numel for unit in units for slot in unit.layout.slots),
    }


@pytest.mark.pairwise
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("all_in_the_optimizer", [False, True])
def test_only_adapters_have_states(ranks, stage, precision, all_in_the_optimizer):
    """O6: also when the user's optimizer was given the frozen parameters too."""
    config = config_for(stage, precision, optimizer={"type": "AdamW", "params": {"lr": 0.1}})
    for result in ranks(2).run(_adapters, config, all_in_the_optimizer):
        assert result["trained"] == ["down.weight", "up.weight"]
        assert result["states"] and result["elements"] == 12 + 10


def _evaluates_only(config: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(torch.distributed.get_rank())
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)).requires_grad_(False)
    reference = {name: p.clone() for name, p in model.state_dict().items()}
    engine = partita.Engine(model=model, config=config)
    x = torch.ones(2, 3, dtype=model[0].weight.dtype)
    output = engine.eval_batch(x)
    return {"given": reference, "now": engine.module_state_dict(), "output": output.float(), "lr": engine.get_lr()}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_model_without_trainable_parameters_evaluates(ranks, stage, precision):
    """N6: no optimizer; every rank has rank 0's weights, cast."""
    results = ranks(2).run(_evaluates_only, config_for(stage, precision))
    for result in results:
        for name, value in result["now"].items():
            assert torch.equal(value, results[0]["given"][name].to(value.dtype)), name
        assert torch.equal(result["output"], results[0]["output"])
        assert result["lr"] == []


def test_an_optimizer_with_nothing_to_train_is_refused():
    """N6: the config's optimizer over a frozen model."""
    with pytest.raises(ValueError, match="no parameter of the model requires gradients"):
        partita.Engine(model=nn.Linear(2, 2).requires_grad_(False), config=config_for(optimizer={"type": "AdamW"}))


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ({"type": "AdmaW"}, ["optimizer.type", "'AdmaW'", "did you mean 'AdamW'"]),
        ({"type": "FusedLamb"}, ["optimizer.type", "'FusedLamb'", "use AdamW"]),
        ({"type": "Shampoo"}, ["optimizer.type", "'Shampoo'", "valid are", "AdamW", "SGD"]),
        ({"type": "AdamW", "params": {"learning_rate": 1}}, ["optimizer.params", "'learning_rate'", "lr"]),
        ({"type": "AdamW", "params": {"wieght_decay": 1}}, ["'wieght_decay'", "did you mean 'weight_decay'"]),
        ({"type": "SGD", "params": {"momemtum": 0.9}}, ["SGD", "'momemtum'", "did you mean 'momentum'"]),
        ({"type": "AdamW", "params": {"lr": -1}}, ["optimizer.params.lr = -1", "a number >= 0"]),
        ({"type": "AdamW", "params": {"betas": [0.9, 1.0]}}, ["betas", "below 1"]),
        ({"type": "AdamW", "params": {"betas": 0.9}}, ["optimizer.params", "betas"]),
        ({"type": "AdamW", "params": {"lr": "fast"}}, ["optimizer.params", "lr"]),
        ({"type": "SGD", "params": {"lr": -1}}, ["SGD", "-1"]),
    ],
)
def test_errors_in_the_config_name_the_thing(optimizer, words):
    """O4."""
    with pytest.raises(ConfigError) as raised:
        partita.Engine(model=Dictated(), config=config_for(optimizer=optimizer))
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_defaults_are_deepspeeds_and_names_ignore_case():
    """O4: without weight_decay in the config there is none, where torch's AdamW has 0.01."""
    engine = partita.Engine(model=Dictated(), config=config_for(optimizer={"type": "adamw"}))
    group = {key: value for key, value in engine.optimizer.param_groups[0].items() if key != "params"}
    expected = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    assert group == {**expected, "decoupled_weight_decay": True, "bias_correction": True}
    engine.destroy()
