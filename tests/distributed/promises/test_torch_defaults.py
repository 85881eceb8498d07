"""F21: an engine's whole life under the program's default device and dtype is what it is without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import partita
import pytest
import torch
from blocks_model import TRANSPORTS, BlocksModel, assert_same_weights, batch_of, config_for, make_blocks
from partita import utils, zero
from partita.zero import GatheredParameters
from torch import Tensor, nn

DEFAULTS: dict[str, tuple[str | None, torch.dtype]] = {
    "meta": ("meta", torch.float32),
    "float64": (None, torch.float64),
    "meta, bfloat16": ("meta", torch.bfloat16),
}


@contextmanager
def defaults(device: str | None, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


def samples() -> list[tuple[Tensor, Tensor]]:
    batches = [batch_of(step, 0) for step in range(12)]
    return [(tokens[i], targets[i]) for tokens, targets in batches for i in range(2)]


def _optimizer(model: nn.Module, kind: str) -> Any:
    """A native one from the config, one of torch over pieces, or ours as the program makes it."""
    if kind == "config":
        return None
    if kind == "SGD":
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    return partita.FusedAdam(model.parameters(), lr=1e-2)


def _life(
    folder: Path, model: BlocksModel, data: list[Any], config: dict[str, Any], kind: str
) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """All that a program does with an engine; losses, weights in the end, weights of the file."""
    engine, _, loader, _ = partita.initialize(
        model=model, optimizer=_optimizer(model, kind), training_data=data, config=config
    )
    losses: list[float] = []
    for batch in loader:  # type: ignore[union-attr]
        loss = engine(*batch)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        if len(losses) == 3:
            break
    losses.append(engine.train_batch().item())
    engine.eval()
    losses.append(float(engine.eval_batch(tuple(batch))))
    engine.train()
    losses.append(engine.get_global_grad_norm() or 0.0)
    parameter = engine.module.body.norm.weight
    weight = utils.safe_get_full_fp32_param(parameter)
    assert weight is not None
    utils.safe_set_full_fp32_param(parameter, weight * 2)
    with GatheredParameters(engine.module.body.scale, modifier_rank=0), torch.no_grad():
        engine.module.body.scale.mul_(1.5)
    loss = engine(*batch)
    engine.backward(engine.token_mean(loss * 4, 4))
    gradient = utils.safe_get_full_grad(parameter)
    assert gradient is not None
    utils.safe_set_full_grad(parameter, gradient / 2)
    engine.step()
    engine.module_state_dict(rank=0)
    weights = engine.module_state_dict()
    state = engine.train_state()
    state.restore(state.copy())
    path = folder / "model.safetensors"
    engine.save_model(path, dtype=torch.float32)
    engine.load_module_state_dict(path)
    from_file = engine.module_state_dict()
    losses.append(engine.loss_scale)
    engine.destroy()
    return losses, weights, from_file


def _lives_the_same(folder: str, name: str, transport: str, stage: int, precision: str, kind: str) -> None:
    changes: dict[str, Any] = {"gradient_clipping": 0.5}
    if kind == "offload":
        host = {"device": "cpu"}
        changes["zero"] = {"offload_optimizer": host, **({"offload_param": host} if stage == 3 else {})}
    config = config_for(stage, transport, precision, **changes)
    kind = "config" if kind == "offload" else kind
    if kind != "config":
        del config["optimizer"]
    expected = _life(Path(folder), make_blocks(), samples(), config, kind)
    model, data = make_blocks(), samples()
    with defaults(*DEFAULTS[name]):
        actual = _life(Path(folder), model, data, config, kind)
    assert actual[0] == expected[0]
    assert_same_weights(actual[1], expected[1])
    assert_same_weights(actual[2], expected[2])


LIVES = [
    (0, "fp32", "SGD"),
    (0, "fp16", "config"),
    (1, "bf16", "SGD"),
    (2, "split", "config"),
    (2, "fp32", "offload"),
    (3, "fp32", "FusedAdam"),
    (3, "bf16", "offload"),
    (3, "fp16", "config"),
]


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_whole_life_is_the_same(ranks, tmp_path, name):
    """Every stage and every kind of optimizer; on one rank, and on two over both transports."""
    for i, (stage, precision, kind) in enumerate(LIVES):
        ranks(2).run(_lives_the_same, str(tmp_path), name, TRANSPORTS[i % 2], stage, precision, kind)
    ranks(1).run(_lives_the_same, str(tmp_path), name, "auto", 2, "bf16", "config")


def _builds_the_same(name: str, transport: str) -> None:
    """Constructors make tensors on the default device: the program names another one, or means it."""
    device, dtype = DEFAULTS[name]
    config = config_for(3, transport)
    with defaults(device, dtype):
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
