"""All that a program does with an engine, in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import partita
import torch
from blocks_model import BlocksModel, batch_of
from partita import utils
from partita.zero import GatheredParameters
from torch import Tensor, nn

SCHEDULE: dict[str, Any] = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 4}}


def samples() -> list[tuple[Tensor, Tensor]]:
    batches = [batch_of(step, 0) for step in range(24)]
    return [(tokens[i], targets[i]) for tokens, targets in batches for i in range(2)]


def optimizer_of(model: nn.Module, kind: str) -> Any:
    """A native one from the config, one of torch over pieces, or ours as the program makes it."""
    if kind == "config":
        return None
    if kind == "SGD":
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    return partita.FusedAdam(model.parameters(), lr=1e-2)


def life(
    folder: Path, model: BlocksModel, data: list[Any], config: dict[str, Any], kind: str = "config"
) -> tuple[list[float], dict[str, dict[str, Tensor]]]:
    """Trains, reads and writes parameters, saves and loads in all ways. A collective.

    Args:
        kind: of the optimizer, see `optimizer_of`.

    Returns:
        Losses and other numbers; weights, those of the file, those after the checkpoint was loaded and trained on.
    """
    engine, _, loader, _ = partita.initialize(
        model=model, optimizer=optimizer_of(model, kind), training_data=data, config=config
    )
    assert loader is not None
    numbers: list[float] = []
    micro_batches = iter(loader)
    for _ in range(3 * engine.gradient_accumulation_steps()):
        batch = next(micro_batches)
        loss = engine(*batch)
        engine.backward(loss)
        engine.step()
        numbers.append(loss.item())
    numbers.append(engine.train_batch().item())
    engine.eval()
    numbers.append(float(engine.eval_batch(tuple(batch))))
    engine.train()
    numbers.append(engine.get_global_grad_norm() or 0.0)
    engine.log({"chosen": numbers[-1]})
    _write(engine, batch)
    engine.module_state_dict(rank=0)
    weights = engine.module_state_dict()
    state = engine.train_state()
    state.restore(state.copy())
    path = folder / "model.safetensors"
    engine.save_model(path, dtype=torch.float32)
    engine.load_module_state_dict(path)
    from_file = engine.module_state_dict()
    engine.save_checkpoint(folder, client_state={"a": torch.ones(2, dtype=torch.float32, device="cpu")})
    numbers += _steps(engine)
    engine.wait_for_save()  # where it is beside training
    engine.load_checkpoint(folder)
    numbers += [*_steps(engine), *engine.get_lr(), engine.loss_scale]
    loaded = engine.module_state_dict()
    engine.destroy()
    return numbers, {"weights": weights, "from the file": from_file, "loaded": loaded}


def _steps(engine: partita.Engine) -> list[float]:
    return [engine.train_batch().item() for _ in range(2)]


def _write(engine: partita.Engine, batch: Any) -> None:
    """Whole masters, gradients and gathered parameters, written in the middle of a run."""
    parameter = engine.module.body.norm.weight
    weight = utils.safe_get_full_fp32_param(parameter)
    assert weight is not None
    utils.safe_set_full_fp32_param(parameter, weight * 2)
    with GatheredParameters(engine.module.body.scale, modifier_rank=0), torch.no_grad():
        engine.module.body.scale.mul_(1.5)
    for i in range(engine.gradient_accumulation_steps()):
        loss = engine(*batch)
        engine.backward(engine.token_mean(loss * 4, 4) if engine.gradient_accumulation_steps() == 1 else loss)
        if i + 1 == engine.gradient_accumulation_steps():
            gradient = utils.safe_get_full_grad(parameter)
            assert gradient is not None
            utils.safe_set_full_grad(parameter, gradient / 2)
        engine.step()
