"""Models that are partitioned as they are built, materialised or loaded: the bits are those of plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import inside
import partita
import pytest
import torch
from blocks_model import (
    TRANSPORTS,
    BlocksModel,
    assert_same_weights,
    config_for,
    error_of,
    make_blocks,
    run_steps,
    take_step,
)
from partita import zero
from partita.zero import AbsentParameterError, GatheredParameters
from safetensors.torch import save_file
from torch import Tensor, nn

STAGES = (0, 1, 2, 3)


class Parent(nn.Module):
    """What models do in their constructors: initialise all, tie, register a local variable, nest, freeze."""

    def __init__(self, watch: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.model = BlocksModel(blocks=3)
        watch()
        kept = nn.Parameter(torch.randn(5, 7))
        self.kept = kept
        self.again = kept
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.layers = nn.ModuleList([nn.Linear(7, 7, bias=i == 0) for i in range(3)])
        watch()
        self.late = nn.Linear(7, 7)
        self.late.weight = self.layers[1].weight
        self.model.body.norm.requires_grad_(False)
        self.model.apply(self._init)
        watch()
        for p in self.layers.parameters():
            nn.init.normal_(p, std=0.3)
        watch()
        with torch.no_grad():
            self.kept.mul_(self.layers[0].weight.sum())
            self.layers[2].weight.data.clamp_(-0.5, 0.5)
            self.kept[1].zero_()
        self.register_buffer("offset", torch.rand(7))

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.constant_(module.bias, 0.1)
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(0, 0.5)

    def forward(self, *batch: Tensor) -> Tensor:
        x = self.kept + self.offset.to(self.kept.dtype)
        for layer in (*self.layers, self.late):
            x = torch.tanh(layer(x))
        return self.model(*batch) + x.float().square().mean() + self.again.float().square().mean()


def _eager(seed: int = 0, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    return Parent(**changes)


def _inside(transport: str, seed: int, rank: int, watch: bool = False, **changes: Any) -> nn.Module:
    """Built inside Init, where ranks have seeds of their own."""
    torch.manual_seed(seed + 100 * rank)
    parameters: list[nn.Parameter] = []
    hook = torch.nn.modules.module.register_module_parameter_registration_hook(
        lambda module, name, p: parameters.append(p)
    )
    try:
        with zero.Init(config=config_for(3, transport), **changes):
            return Parent(partial(_assert_one_module, parameters) if watch else lambda: None)
    finally:
        hook.remove()


def _assert_one_module(parameters: list[nn.Parameter]) -> None:
    """Not more memory than the largest module: `mix` or `back`, 7 x 15 and a bias."""
    storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in parameters}
    assert len(storages) > 10
    assert sum(storages.values()) <= 4 * 160, sum(storages.values())


def _rank() -> int:
    return torch.distributed.get_rank()


def _whole(model: nn.Module) -> dict[str, Tensor]:
    with GatheredParameters(model.parameters()):
        return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _builds_the_same(transport: str) -> None:
    model = _inside(transport, 0, _rank(), watch=True)
    own = torch.rand(3)
    for name, p in model.named_parameters():
        assert p.untyped_storage().nbytes() == 0, name
    assert "Parent." in error_of(model.kept.sum, AbsentParameterError)  # type: ignore[union-attr]
    eager = _eager()
    assert_same_weights(_whole(model), dict(eager.state_dict()))
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in eager.parameters()]
    assert model.kept is model.again and model.late.weight is model.layers[1].weight  # type: ignore[union-attr,index]
    torch.manual_seed(100 * _rank())
    assert torch.equal(own, torch.rand(3)) == (_rank() > 0)  # with other seeds, each goes on with its own numbers
    for dtype in (torch.bfloat16, torch.float64):
        before = torch.get_default_dtype()
        model = _inside(transport, 0, _rank(), dtype=dtype)
        assert torch.get_default_dtype() == before
        torch.set_default_dtype(dtype)
        try:
            assert_same_weights(_whole(model), dict(_eager().state_dict()))
        finally:
            torch.set_default_dtype(before)
    plain = _inside(transport, 0, 0, enabled=False)
    assert_same_weights(dict(plain.state_dict()), dict(_eager().state_dict()))


@pytest.mark.parametrize("path", TRANSPORTS)
def test_the_weights_are_those_of_a_model_built_on_rank_0(ranks, path):
    """On ranks with other seeds, too; whole parameters exist for one module at a time."""
    ranks(2).run(_builds_the_same, path)
    ranks(3).run(_builds_the_same, path)


def _trains(transport: str, stage: int, precision: str) -> None:
    expected = run_steps(_eager(), config_for(0, transport, precision))
    actual = run_steps(_inside(transport, 0, _rank()), config_for(stage, transport, precision))
    assert actual[0] == expected[0]
    assert_same_weights(actual[1], expected[1])


@pytest.mark.parametrize("stage", STAGES)
def test_it_trains_as_a_model_built_without(ranks, stage):
    """The bits of stage 0, tied, shared and frozen parameters included."""
    for path in TRANSPORTS:
        for precision in ("fp32", "bf16", "split"):
            ranks(2).run(_trains, path, stage, precision)


def _other_numbers(transport: str) -> str:
    def build() -> None:
        with zero.Init(config=config_for(3, transport)):
            nn.Linear(3, 3 + _rank())

    def build_more() -> None:
        with zero.Init(config=config_for(3, transport)):
            nn.ParameterList(torch.zeros(3) for _ in range(1 + _rank()))

    assert "rank 1 has other parameters than rank 0" in error_of(build_more, RuntimeError)
    raised = False
    try:
        with zero.Init(config=config_for(3, transport)):
            raise OSError("inside")
    except OSError:
        raised = True
    assert raised
    assert nn.Linear(3, 3).weight.sum().isfinite()  # nothing is left of Init
    return error_of(build, RuntimeError)


@pytest.mark.parametrize("path", TRANSPORTS)
def test_ranks_that_build_other_models_are_told_on_all(ranks, path):
    """They drew other random numbers, or registered other parameters."""
    for error in ranks(2).run(_other_numbers, path):
        assert "rank 1 drew other random numbers than rank 0" in error


class Resettable(nn.Module):
    """A parameter and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(7))
        self.register_buffer("scale", torch.empty(3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        nn.init.uniform_(self.scale)


def _sequential() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 7), nn.Linear(7, 9), nn.LayerNorm(9), Resettable(), nn.Linear(7, 11))
    model[4].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    return model


def _materializes(transport: str) -> None:
    config = config_for(3, transport)
    with torch.device("meta"):
        model = _sequential()
    torch.manual_seed(7 + _rank())
    assert zero.materialize(model, config=config) is model
    expected = _sequential()
    torch.manual_seed(7)
    for module in expected:
        module.reset_parameters()  # type: ignore[operator]
    assert_same_weights(_whole(model), dict(expected.state_dict()))
    assert model[4].weight is model[0].weight and not model[2].bias.requires_grad
    assert all(p.untyped_storage().nbytes() == 0 for p in model.parameters())
    with torch.device("meta"):
        model = make_blocks()
    zero.materialize(model, _fill, config=config)
    _, weights = run_steps(model, config)
    filled = make_blocks()
    filled.apply(_fill)
    assert_same_weights(weights, run_steps(filled, config_for(0, transport))[1])


@torch.no_grad()
def _fill(module: nn.Module) -> None:
    for p in module.parameters(recurse=False):
        p.fill_(0.01).view(-1)[::3] = 0.2


def _cannot_materialize() -> None:
    def error(make: Callable[[], nn.Module], fill: Any = None) -> str:
        with torch.device("meta"):
            model = make()
        return error_of(lambda: zero.materialize(model, fill), ValueError)

    assert "'body' (Body) has scale and no reset_parameters()" in error(make_blocks)
    assert "'body.blocks.0.mix.weight' has no values after Linear" in error(
        make_blocks, lambda m: None if isinstance(m, nn.Linear) else _fill(m)
    )
    assert "'num_batches_tracked' is torch.int64" in error(lambda: nn.Sequential(nn.BatchNorm1d(3)))


@pytest.mark.parametrize("path", TRANSPORTS)
def test_models_from_the_meta_device(ranks, path):
    """reset_parameters() or a function of the user's, with rank 0's random numbers; shared parameters stay shared."""
    ranks(2).run(_materializes, path)


def test_modules_that_cannot_be_filled_are_named(ranks):
    """Without a way to reset, or when that leaves NaN, or when integers lost their values."""
    ranks(2).run(_cannot_materialize)


def _source(folder: str, kind: str) -> tuple[Any, dict[str, Tensor]]:
    """What to load, and the weights in it; written by rank 1, who reads it."""
    weights = {name: value.clone() for name, value in make_blocks(seed=3).state_dict().items()}
    if kind == "bf16":
        weights = {name: value.bfloat16() for name, value in weights.items()}
    expected = dict(weights)
    if kind != "dict":
        del weights["head.weight"]  # as files have tied weights
    if kind in ("dict", "bf16"):
        return (weights if _rank() == 1 else {}), expected
    names = sorted(weights)
    shards = [names] if kind == "file" else [names[:5], names[5:9], names[9:]]
    path = Path(folder) / kind
    if _rank() == 1:
        path.mkdir()
        for i, shard in enumerate(shards):
            save_file({name: weights[name] for name in shard}, path / f"{i}.safetensors")
    files = [path / f"{i}.safetensors" for i in range(len(shards))]
    return {"file": files[0], "folder": str(path), "files": files}[kind], expected


def _loads(folder: str, transport: str, stage: int, precision: str, kind: str) -> None:
    source, expected = _source(folder, kind)
    config = config_for(stage, transport, precision)
    engine = partita.Engine(model=make_blocks(), config=config)
    assert engine.load_module_state_dict(source, rank=1) == []
    assert inside.gathered_bytes(engine) == 0
    own = engine.module_state_dict()
    assert_same_weights(own, {name: value.to(own[name].dtype) for name, value in expected.items()})
    take_step(engine, 0)
    reference = partita.Engine(model=make_blocks(), config=config_for(0, transport, precision))
    reference.module.load_state_dict(expected)
    take_step(reference, 0)
    assert_same_weights(engine.module_state_dict(), reference.module_state_dict())
    engine.destroy()
    reference.destroy()
    if stage == 3:
        with zero.Init(config=config):
            model = make_blocks()
        assert zero.load_weights(model, source, rank=1) == []
        dtype = torch.bfloat16 if precision == "split" else torch.float32  # F41: the config's
        assert_same_weights(_whole(model), {name: value.to(dtype) for name, value in expected.items()})


@pytest.mark.parametrize("kind", ["dict", "file", "files", "folder", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_weights_are_loaded_on_all_ranks(ranks, tmp_path, stage, kind):
    """C5, O3: into an engine and into what Init built; the next step is that of stage 0 with these weights."""
    for path in TRANSPORTS if stage == 3 else TRANSPORTS[:1]:
        for precision in ("fp32", "split"):
            folder = tmp_path / f"{path} {precision}"
            folder.mkdir()
            ranks(2).run(_loads, str(folder), path, stage, precision, kind)


def _refused(folder: str, transport: str, stage: int) -> list[str]:
    engine = partita.Engine(model=make_blocks(), config=config_for(stage, transport))
    before, rank = engine.module_state_dict(), engine.global_rank
    good = {name: value.clone() for name, value in make_blocks(seed=3).state_dict().items()}
    path = Path(folder)
    if rank == 0:
        del good["head.weight"]
        save_file(good, path / "good.safetensors")
        data = (path / "good.safetensors").read_bytes()
        (path / "short.safetensors").write_bytes(data[: len(data) // 2])
        (path / "empty").mkdir()
    missing = {name: value for name, value in good.items() if name != "body.norm.bias"}
    sources: list[Any] = [
        missing,
        {**good, "body.other": torch.ones(1)},
        {**good, "body.norm.bias": torch.ones(8)},
        path / "nothing.safetensors",
        path / "short.safetensors",
        path / "empty",
        [path / "good.safetensors", path / "nothing.safetensors"],
    ]
    errors = []
    for source in sources:
        given = source if rank == 0 or not isinstance(source, dict) else {}
        errors.append(error_of(lambda s=given: engine.load_module_state_dict(s), ValueError))
        assert_same_weights(engine.module_state_dict(), before, "after a refused load")
    assert (
        "'body.norm.bias' has shape (8,)"
        in error_of(lambda: engine.load_module_state_dict(sources[2] if rank == 0 else {}, strict=False), ValueError)
        or rank
    )
    assert engine.load_module_state_dict(missing if rank == 0 else {}, strict=False) == ["body.norm.bias"]
    after = engine.module_state_dict()
    assert_same_weights(after, {**make_blocks(seed=3).state_dict(), "body.norm.bias": before["body.norm.bias"]})
    return errors


@pytest.mark.parametrize(("stage", "path"), [(0, "shared_memory"), (2, "torch"), (3, "shared_memory"), (3, "torch")])
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(ranks, tmp_path, stage, path):
    """C4, C8: on all ranks, which all say what is wrong."""
    (tmp_path / path).mkdir()
    reader, other = ranks(2).run(_refused, str(tmp_path / path), path, stage)
    wrong = ["'body.norm.bias' is missing", "'body.other' is not in the model", "'body.norm.bias' has shape (8,)"]
    for error, part in zip(reader, [*wrong, "nothing.", "short.", "no *.safetensors", "nothing."], strict=True):
        assert part in error
    assert other == [f"the weights cannot be loaded: on rank 0: {error}" for error in reader]


def _on_one_rank() -> None:
    model = _inside("auto", 0, 0, watch=False)
    assert_same_weights(dict(model.state_dict()), dict(_eager().state_dict()))
    assert_same_weights(run_steps(model, config_for(3, "auto"))[1], run_steps(_eager(), config_for(0, "auto"))[1])


def test_one_rank_builds_and_trains(ranks):
    """There is nobody to share with."""
    ranks(1).run(_on_one_rank)
