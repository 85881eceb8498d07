"""Runs whose optimizer states, or shards, are on the host, and the same runs on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import partita
import torch
from dictated import SPLIT, Dictated, config_for, dictate, share
from partita.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
)
from torch import Tensor, nn

TRANSPORTS = ("auto", "torch")
ADAM: dict[str, Any] = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}}
SGD: dict[str, Any] = {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}}
CPU: dict[str, Any] = {"device": "cpu"}
# name -> (stage, what is offloaded)
OFFLOADS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {"offload_optimizer": CPU}),
    "2": (2, {"offload_optimizer": CPU}),
    "3": (3, {"offload_optimizer": CPU}),
    "3, parameters too": (3, {"offload_optimizer": CPU, "offload_param": CPU}),
    "1, nothing": (1, {"offload_optimizer": {**CPU, "ratio": 0}}),
    "2, some": (2, {"offload_optimizer": {**CPU, "ratio": 0.3}}),
    "3, some, not pinned": (3, {"offload_optimizer": {**CPU, "ratio": 0.6, "pin_memory": False}}),
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "split": SPLIT,
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 1, "loss_scale_window": 2}},
}
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "clipping": {"gradient_clipping": 0.5},
    "torch optimizer": {"optimizer": SGD},
    "torch optimizer, accumulation, clipping": {
        "optimizer": SGD,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
    },
    "fp32 sums": {"gradient_accumulation_steps": 3, "data_types": {"grad_accum_dtype": "fp32"}},
    "16-bit traffic": {"communication_data_type": "bf16"},
    "not overlapped": {"overlap_comm": False},
}
PATTERN = "..x.x.."  # x: gradients overflow


def offloading(offload: str, precision: str = "fp32", change: str = "plain", over: str = "auto") -> dict[str, Any]:
    stage, zero = OFFLOADS[offload]
    changes = dict(CHANGES[change])
    overlap = changes.pop("overlap_comm", True)
    config = config_for(stage, **{"optimizer": ADAM, **PRECISIONS[precision], **changes})
    config["zero_optimization"] |= {**zero, "overlap_comm": overlap}
    config["comm"] = {"transport": over, "timeout_seconds": 20}
    return config


def resident(config: dict[str, Any]) -> dict[str, Any]:
    zero = {k: v for k, v in config["zero_optimization"].items() if not k.startswith("offload")}
    return {**config, "zero_optimization": zero}


def gradients(engine: partita.Engine, step: int, *, bad: bool = False) -> dict[str, Tensor]:
    """This rank's. Bad: one element of `e` is too large for any format; it lies in the last rank's shard."""
    grads = share(dictate(step), engine.global_rank, engine.world_size)
    if bad and engine.global_rank == 0:
        grads["e"][-1] = float("inf")
    return grads


def one_backward(engine: partita.Engine, step: int, *, bad: bool) -> None:
    engine.backward(engine(gradients(engine, step, bad=bad)))


def three_backwards(engine: partita.Engine, step: int, *, bad: bool) -> None:
    for i in range(3):
        engine.backward(engine(gradients(engine, 10 * step + i, bad=bad and i == 1)))


def state_of(engine: partita.Engine) -> dict[str, Tensor]:
    """Weights, masters and moments by name, whole. A collective."""
    found = dict(engine.module_state_dict())
    for name, parameter in engine.module.named_parameters():
        found[f"master of {name}"] = safe_get_full_fp32_param(parameter)
        for key in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            state = safe_get_full_optimizer_state(parameter, key)
            if state is not None:
                found[f"{key} of {name}"] = state
    return found


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.itemsize == 2 else torch.int32)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], where: str = "") -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(bits(actual[name]), bits(value)), f"{name} {where}: {(actual[name] - value).abs().max()}"


def seen_in(
    config: dict[str, Any],
    backward: Callable[..., None] = one_backward,
    pattern: str = PATTERN,
    model: Callable[[], nn.Module] = Dictated,
    prepare: Callable[[partita.Engine], Any] | None = None,
) -> tuple[list[Any], dict[str, Tensor]]:
    """Per step what the engine tells, and the state at the end."""
    engine = partita.Engine(model=model(), config=config)
    if prepare is not None:
        prepare(engine)
    rows = []
    for step, event in enumerate(pattern):
        for i in range(engine.gradient_accumulation_steps()):
            backward(engine, 100 * step + 10 * i, bad=event == "x" and i == 0)
            engine.step()
        rows.append((engine.get_global_grad_norm(), engine.skipped_steps, engine.loss_scale, engine.get_lr()))
    state = state_of(engine)
    engine.destroy()
    return rows, state
