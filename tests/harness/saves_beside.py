"""Saves beside training on a slow disk: functions of ranks below fault_shim.c (LD_PRELOAD)."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import partita
import torch
import torch.distributed
from partita.checkpoint import CheckpointError
from partita.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
from resumed import config_for, engine_for, take_steps, whole_state

SLOW_US = 20_000  # of a write: a step takes less


@contextmanager
def slow_disk(folder: str, microseconds: int = SLOW_US) -> Iterator[None]:
    """Every write into the folder takes this long."""
    shim = ctypes.CDLL(None)
    shim.fault_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, *[ctypes.c_int] * 3, ctypes.c_char_p]
    shim.fault_arm(os.fsencode(folder), 0, 0, 0, 0, None)
    shim.fault_delay(microseconds)
    yield
    shim.fault_delay(0)
    shim.fault_arm(None, 0, 0, 0, 0, None)


def _at_once(engine: partita.Engine) -> None:
    """Steps follow at once."""
    take_steps(engine, 2)


def _set_masters(engine: partita.Engine) -> None:
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            safe_set_full_fp32_param(parameter, torch.full(parameter.shape, 0.5))


def _set_states(engine: partita.Engine) -> None:
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            safe_set_full_optimizer_state(parameter, torch.full(parameter.shape, 0.5), "exp_avg")


def _write_gathered(engine: partita.Engine) -> None:
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    with partita.zero.GatheredParameters(parameters, modifier_rank=0), torch.no_grad():
        for parameter in parameters:
            parameter.fill_(0.5)


def _load_weights(engine: partita.Engine) -> None:
    state = engine.module_state_dict()
    engine.load_module_state_dict({name: torch.zeros_like(value) for name, value in state.items()})


def _evaluate(engine: partita.Engine) -> None:
    """The forward changes buffers."""
    with torch.no_grad():
        engine(torch.rand(3, 6))


CHANGES: dict[str, Callable[[partita.Engine], None]] = {
    "steps": _at_once,
    "masters": _set_masters,
    "states": _set_states,
    "gathered": _write_gathered,
    "loaded": _load_weights,
    "buffers": _evaluate,
}


def save_and_change(folder: str, config: dict[str, Any], optimizer: str, change: str) -> tuple[dict[str, Any], bool]:
    """The state that was saved, while something changes it; whether a save was still under way then."""
    engine = engine_for(config, seed=1)
    take_steps(engine, 2)
    state = whole_state(engine, optimizer)
    with slow_disk(folder):
        path = engine.save_checkpoint(folder, "tag")
        under_way = not os.path.exists(path)
        CHANGES[change](engine)
        engine.wait_for_save()
    assert os.path.exists(path)
    engine.destroy()
    return state, under_way


def load(folder: str, config: dict[str, Any], optimizer: str) -> dict[str, Any]:
    """What another run finds."""
    engine = engine_for(config, seed=2)
    engine.load_checkpoint(folder)
    state = whole_state(engine, optimizer)
    engine.destroy()
    return state


def train(folder: str, config: dict[str, Any], every: int) -> dict[str, Any]:
    """Eight steps, with a save after each `every` of them; 0: none."""
    engine = engine_for(config, seed=1, noise=True)
    found: dict[str, Any] = {}
    with slow_disk(folder, 2000):
        for step in range(1, 9):
            found[f"step {step}"] = take_steps(engine, 1)
            if every and step % every == 0:
                engine.save_checkpoint(folder)
        engine.wait_for_save()
    found |= whole_state(engine, "AdamW")
    engine.destroy()
    return found


def write_by_hand(folder: str, config: dict[str, Any], rank: int) -> list[str]:
    """What a save says of one rank's writes into a parameter, and what the next one says."""
    engine = engine_for(config, seed=1)
    take_steps(engine, 1)
    said = []
    with slow_disk(folder):
        for tag in ("torn", "next"):
            try:
                engine.save_checkpoint(folder, tag)
                if tag == "torn" and engine.global_rank == rank:
                    with torch.no_grad():
                        engine.module.layers[1].weight.zero_()
                if tag == "torn":
                    take_steps(engine, 1)
                engine.wait_for_save()
                said.append("")
            except CheckpointError as error:
                said.append(str(error))
    engine.destroy()
    return said


def end(folder: str, how: str) -> None:
    """A program that ends while it saves: one of torchrun's ranks."""
    config = config_for(2, 2, "split", checkpoint={"async_save": True}, comm={"timeout_seconds": 60})
    engine = engine_for(config, seed=1)
    take_steps(engine, 1)
    slow_disk(folder).__enter__()
    engine.save_checkpoint(folder, "tag")
    if how == "destroy":
        engine.destroy()
    elif how == "drop":
        del engine
        gc.collect()
    elif how == "raise" and engine.global_rank == 1:
        raise ValueError("rank 1 has had enough")
    elif how == "leave groups":
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    end(*sys.argv[1:])
