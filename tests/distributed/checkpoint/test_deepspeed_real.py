"""Real checkpoints of DeepSpeed: the test writer's structure, masters by its own script, and losses that go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import partita
import pytest
import torch
from deepspeed_run import MOMENTS, config_of, new_model, optimizer_of, tokens_of
from deepspeed_writer import DynamicLossScaler, of_optimizer, write
from partita.checkpoint import DeepSpeedImport
from partita.checkpoint.deepspeed_files import Inert, load_dict
from partita.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

pytestmark = pytest.mark.slow
RUNNER = Path(__file__).parents[2] / "harness" / "deepspeed_run.py"


def run_deepspeed(out: Path, asked: dict[str, Any]) -> list[float]:
    """Trains in processes of their own; the losses of all steps."""
    pytest.importorskip("deepspeed")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(asked["ranks"])]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(RUNNER), str(out), json.dumps({"before": 3, "after": 3, **asked})],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses: list[float] = json.loads((out / "losses.json").read_text())
    return losses


def structure(value: Any) -> Any:
    """Names, types, shapes and dtypes, without values."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape))
    if isinstance(value, dict):
        return {key: structure(item) for key, item in value.items() if key != "ds_config"}
    if isinstance(value, Inert):
        return (type(value).__name__, len(value.arguments), structure(value.state))
    if isinstance(value, list | tuple):
        return [structure(item) for item in value]
    return type(value).__name__


# In stage 0 with fp16 DeepSpeed 0.19 does not scale the loss, and divides the gradients by the scale all the same.
UNSCALED = {"loss_scale": 1.0}
ASKED = [(0, 2, "fp32"), (0, 2, "fp16"), (1, 2, "fp16"), (1, 2, "bf16"), (2, 3, "fp32"), (3, 2, "bf16"), (3, 3, "fp32")]


def scaler_of_fp16() -> DynamicLossScaler:
    """With the attributes that DeepSpeed's has."""
    counts = {"cur_iter": 3, "last_overflow_iter": -1, "scale_window": 1000, "min_scale": 1, "delayed_shift": 2}
    flags = {"dynamic": True, "consecutive_hysteresis": False, "raise_error_at_min_scale": True}
    more = {"scale_factor": 2.0, "cur_hysteresis": 2, "dtype": torch.float16}
    return DynamicLossScaler(cur_scale=256, **counts, **flags, **more)


@pytest.mark.parametrize(("stage", "number", "precision"), ASKED)
def test_a_run_of_deepspeed_goes_on(ranks, tmp_path, stage, number, precision):
    zero = {"memory_efficient_linear": False} if stage == 3 else {}  # which adds the bias after rounding
    asked = {"stage": stage, "ranks": number, "precision": precision, "schedule": True, "zero": zero}
    asked |= {"scale": UNSCALED if stage == 0 else {"initial_scale_power": 8}} if precision == "fp16" else {}
    expected = run_deepspeed(tmp_path / "from", asked)
    assert sum(DeepSpeedImport(tmp_path / "from", tmp_path / "to").run()) > 0
    found = ranks(number).run(go_on, str(tmp_path), asked)
    for losses in found:
        assert losses == pytest.approx(expected[3:], rel=1e-6 if precision == "fp32" else 1e-3)

    model = new_model()
    optimizer = optimizer_of("AdamW", model)
    model(tokens_of(0, 0)).backward()
    optimizer.step()
    more = {"note": "hello", "numbers": [1, 2.5], "pair": (1, 2), "tensor": torch.arange(3)}
    scaler = {"scaler": scaler_of_fp16()} if precision == "fp16" and stage else {}
    run = of_optimizer(
        model, optimizer, precision=precision, more=more, lr_scheduler={"last_batch_iteration": 2}, **scaler
    )
    ours, theirs = write(tmp_path / "ours", run, stage, number), tmp_path / "from" / "global_step3"
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())
    for path in ours.iterdir():
        assert structure(load_dict(path)) == structure(load_dict(theirs / path.name)), path.name


def go_on(folder: str, asked: dict[str, Any]) -> list[float]:
    """Three more steps in Partita; compares masters and moments with those that DeepSpeed had first, and the masters
    with those that its script finds."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = new_model()
    config = {**config_of({**asked, "zero": {}}), "steps_per_print": 0}
    config.pop("zero_allow_untested_optimizer")
    engine, *_ = partita.initialize(model=model, optimizer=optimizer_of("AdamW", model), config=config)
    engine.load_checkpoint(Path(folder, "to"))
    kept = torch.load(Path(folder, "from", "kept.pt"), weights_only=True)
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            assert safe_get_full_fp32_param(parameter).equal(kept[name]["weight"]), name
            for key in MOMENTS:
                assert safe_get_full_optimizer_state(parameter, key).equal(kept[name][key]), (name, key)
    if asked["stage"]:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        masters = get_fp32_state_dict_from_zero_checkpoint(str(Path(folder, "from")))
        for name, parameter in engine.module.named_parameters():
            if parameter.requires_grad:
                assert safe_get_full_fp32_param(parameter).equal(masters[name]), name
    losses = []
    for step in range(3, 6):
        loss = engine(tokens_of(step, rank))
        engine.backward(loss)
        engine.step()
        total = loss.detach().float().reshape(1).clone()
        torch.distributed.all_reduce(total)
        losses.append(total.item() / ranks)
    engine.destroy()
    return losses
