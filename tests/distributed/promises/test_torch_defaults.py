"""F21: an engine's whole life under the program's default device and dtype is what it is without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import partita
import pytest
import torch
from blocks_model import TRANSPORTS, assert_same_weights, config_for, make_blocks
from lives import SCHEDULE, life, samples
from partita import zero
from partita.pipeline import LayerSpec
from partita.zero import GatheredParameters
from pipelines import Shape, micro_batch, train
from pipelines import config_for as pipeline_config
from torch import Tensor, nn

# How the device is given: for the whole thread, or for a block.
DEFAULTS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], torch.dtype]] = {
    "meta": (lambda: default_device("meta"), torch.float32),
    "float64": (nullcontext, torch.float64),
    "meta in a block, bfloat16": (lambda: torch.device("meta"), torch.bfloat16),
}
BOTH = "meta in a block, bfloat16"


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def defaults(name: str) -> Iterator[torch.dtype]:
    """The block's default dtype."""
    on_device, dtype = DEFAULTS[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with on_device():
            yield dtype
    finally:
        torch.set_default_dtype(before)


def _lives_the_same(folder: str, names: list[str], transport: str, row: tuple[int, str, str, dict[str, Any]]) -> None:
    stage, precision, kind, changes = row
    config = config_for(stage, transport, precision, **{"gradient_clipping": 0.5, **changes})
    if kind != "config":
        del config["optimizer"]
    if "csv_monitor" in changes:
        config["csv_monitor"] |= {"output_path": folder}
    expected = life(Path(folder, "expected"), make_blocks(), samples(), config, kind)
    for name in names:
        model, data = make_blocks(), samples()
        with defaults(name):
            actual = life(Path(folder, name), model, data, config, kind)
        assert actual[0] == expected[0]
        for what, weights in expected[1].items():
            assert_same_weights(actual[1][what], weights, what)


HOST: dict[str, Any] = {"device": "cpu"}
LIVES: list[tuple[int, str, str, dict[str, Any]]] = [
    (0, "fp32", "SGD", {"gradient_accumulation_steps": 2}),
    (0, "fp16", "config", {"scheduler": SCHEDULE}),
    (
        1,
        "bf16",
        "SGD",
        {"checkpoint": {"async_save": True}, "monitor": {"flops": True}, "csv_monitor": {"enabled": True}},
    ),
    (2, "split", "config", {"scheduler": SCHEDULE, "gradient_accumulation_steps": 2}),
    (2, "fp32", "config", {"zero": {"offload_optimizer": HOST}, "activation_checkpointing": {"enabled": True}}),
    (3, "fp32", "FusedAdam", {"gradient_accumulation_steps": 2}),
    (3, "bf16", "config", {"zero": {"offload_optimizer": HOST, "offload_param": HOST}}),
    (3, "fp16", "config", {"checkpoint": {"async_save": True}, "comms_logger": {"enabled": True}}),
    (3, "bf16", "SGD", {"zero": {"offload_optimizer": HOST, "offload_param": HOST}, "scheduler": SCHEDULE}),
]
SAMPLED = (2, 3, 6, 8)  # stages 1 to 3; the others run with the long tests


@pytest.mark.parametrize("names", [[BOTH], pytest.param(list(DEFAULTS), marks=pytest.mark.slow)], ids=["both", "each"])
@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=[] if row in SAMPLED else pytest.mark.slow) for row in range(len(LIVES))]
)
def test_a_whole_life_is_the_same(ranks, tmp_path, row, names):
    """Every stage and every kind of optimizer, over both transports."""
    ranks(2).run(_lives_the_same, str(tmp_path), names, TRANSPORTS[row % 2], LIVES[row])


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_whole_life_alone_is_the_same(ranks, tmp_path, name):
    ranks(1).run(_lives_the_same, str(tmp_path), [name], "auto", (2, "bf16", "config", {}))


def _builds_the_same(name: str, transport: str) -> None:
    """Constructors make tensors on the default device: the program names another one, or means it."""
    config = config_for(3, transport)
    with defaults(name) as dtype:
        with zero.Init(config=config, dtype=torch.float32), torch.device("cpu"):
            model = make_blocks()
        torch.manual_seed(5)
        with torch.device("meta"):
            empty = nn.Sequential(nn.Linear(5, 7, dtype=torch.float32), nn.LayerNorm(7, dtype=torch.float32))
        zero.materialize(empty, config=config)
        with zero.Init(config=config), torch.device("cpu"):
            assert nn.Linear(3, 3).weight.dtype == dtype
        zero.load_weights(model, {"body.scale": torch.full((1,), 3.0, device="cpu")}, strict=False)
        with GatheredParameters([*model.parameters(), *empty.parameters()]):
            weights = {key: value.clone() for key, value in model.state_dict().items()}
            first = empty[0].weight.detach().clone()
    expected = make_blocks().state_dict()
    expected["body.scale"].fill_(3.0)
    assert_same_weights(weights, dict(expected))
    torch.manual_seed(5)
    assert torch.equal(first, nn.Linear(5, 7).weight)


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_model_is_built_the_same(ranks, name):
    """zero.Init, materialize, load_weights and GatheredParameters."""
    for path in TRANSPORTS:
        ranks(2).run(_builds_the_same, name, path)


PIPELINES: list[tuple[str, dict[str, Any]]] = [
    ("zb-v", {"bf16": {"enabled": True}}),
    ("1f1b", {"optimizer": {"type": "AdamW", "params": {"lr": 0.01}}, "gradient_clipping": 0.1}),
]


def _pipelines_alike(schedule: str, changes: dict[str, Any]) -> None:
    config = pipeline_config(4, pipeline={"schedule": schedule}, comm={"transport": "auto"}, **changes)
    shape = Shape(tied=True, skips={4: [1]} if schedule == "1f1b" else {})
    data = [[micro_batch(step, index) for index in range(4)] for step in range(4)]
    expected = train(lambda: shape.module(2), config)
    with mock.patch.object(LayerSpec, "build", _as_without_defaults(LayerSpec.build)), defaults(BOTH):
        actual = train(lambda: shape.module(2), config, batch=lambda step, index: data[step][index])
    assert (actual.losses, actual.norms, actual.evaluated) == (expected.losses, expected.norms, expected.evaluated)
    assert_same_weights(actual.weights, expected.weights)


def _as_without_defaults(build: Callable[[LayerSpec], nn.Module]) -> Callable[[LayerSpec], nn.Module]:
    """Layers are built when the engine is made. What they make there follows the program's defaults."""

    def built(self: LayerSpec) -> nn.Module:
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu"):
                return build(self)
        finally:
            torch.set_default_dtype(dtype)

    return built


@pytest.mark.parametrize(("schedule", "changes"), PIPELINES)
def test_pipelines_are_the_same(ranks, schedule, changes):
    ranks(2).run(_pipelines_alike, schedule, changes)


def _fused_adam(dtype: torch.dtype, within: Callable[[], AbstractContextManager[Any]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(5, 7), (1,), (3, 1, 2)]
    values = [torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype) for shape in shapes]
    grads = [[torch.randn(v.shape, generator=generator, dtype=torch.float32).to(dtype) for v in values] for _ in "abcd"]
    with within():
        parameters = [nn.Parameter(value) for value in values]
        optimizer = partita.FusedAdam(parameters, lr=0.1, weight_decay=0.1)
        for i, of_step in enumerate(grads):
            for parameter, grad in zip(parameters, of_step, strict=True):
                parameter.grad = grad
            optimizer.step()
            if i == 1:
                optimizer.load_state_dict(optimizer.state_dict())
                with torch.no_grad():
                    parameters[0].mul_(1.5)
        return [p.detach() for p in parameters] + [s["exp_avg_sq"] for s in optimizer.state.values()]


@pytest.mark.parametrize("name", DEFAULTS)
def test_fused_adam_alone_is_the_same(name):
    for dtype in (torch.float32, torch.bfloat16):
        expected = _fused_adam(dtype, nullcontext)
        actual = _fused_adam(dtype, lambda: defaults(name))
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
