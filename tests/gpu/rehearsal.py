"""One process, but every collective over torch.distributed and stage 3 gathered, compared with the plain engine.

On a GPU this is the stream order, the resizing of storages and the waiting of several GPUs, over NCCL; collectives can
begin 2 ms later than they could, and a wait of the host is an error. On a CPU it goes over gloo and tries the script.

    PYTHONPATH=examples:tests/harness python tests/gpu/rehearsal.py [cpu]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import inside
import partita
import torch
import torch.distributed as dist
from language.models import GPT, ModelConfig
from partita.comm import Communicator, TorchCommunicator
from partita.units import Lifetime, StagePolicy

STEPS = 6
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "split": {"bf16": {"enabled": True, "master_weights": "split"}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 10}},
}
ROWS: list[tuple[int, dict[str, Any], bool]] = [  # stage, zero_optimization, whether collectives are late
    *((stage, {}, late) for late in (False, True) for stage in (0, 1, 2, 3)),
    (2, {"overlap_comm": False}, False),
    (3, {"overlap_comm": False}, False),
]
LATE_CYCLES = 3_000_000  # of the GPU's clock, some 2 ms
Outcome = tuple[torch.Tensor, dict[str, torch.Tensor]]


@contextmanager
def as_several_ranks(device: torch.device, late: bool) -> Iterator[None]:
    """Engines made in this block communicate although they are alone, and gather what stage 3 partitions."""
    backend = "nccl" if device.type == "cuda" else "gloo"

    def connect(*_args: Any, **_kwargs: Any) -> Communicator:
        with inside.whole_collectives():
            return TorchCommunicator(dist.new_group(backend=backend), device)

    def lifetime(policy: StagePolicy, **_ranks: Any) -> Lifetime:
        return Lifetime.GATHERED if policy.shards_params else Lifetime.ALWAYS

    launch, delayed = TorchCommunicator._launch, {}

    def launch_late(self: TorchCommunicator, *args: Any, **kwargs: Any) -> Any:
        """G1: who does not wait for a collective sees old values."""
        stream = delayed.setdefault(id(self), torch.cuda.Stream())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LATE_CYCLES)
            return launch(self, *args, **kwargs)

    with ExitStack() as exits:
        exits.enter_context(inside.with_connect(connect))
        exits.enter_context(mock.patch.object(StagePolicy, "lifetime", lifetime))
        if late and device.type == "cuda":
            exits.enter_context(mock.patch.object(TorchCommunicator, "_launch", launch_late))
        yield


def train(device: torch.device, stage: int, precision: str, zero: dict[str, Any]) -> Outcome:
    """Losses and weights. On a GPU, waiting for it is an error from the third step on."""
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT(ModelConfig(vocabulary=512, context=64, layers=6, heads=4, width=256))
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "steps_per_print": 0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 300_000,
            "stage3_param_persistence_threshold": 1000,
            **zero,
        },
        **PRECISIONS[precision],
    }
    engine = partita.Engine(model, config=config)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(512, (4, 65), generator=generator).to(device) for _ in range(2 * STEPS)]
    losses = []
    try:
        for i, tokens in enumerate(batches):
            if device.type == "cuda" and i == 4:
                torch.cuda.set_sync_debug_mode("error")
            loss = engine(tokens[:, :-1], tokens[:, 1:])
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    weights = {name: value.cpu() for name, value in engine.module_state_dict().items()}
    engine.destroy()
    return torch.stack(losses).float().cpu(), weights


def rehearse(device: torch.device) -> int:
    """Prints a line per row; returns how many are not the plain engine's bits."""
    different = 0
    for precision in PRECISIONS:
        losses, weights = train(device, 0, precision, {})
        for stage, zero, late in ROWS:
            try:
                with as_several_ranks(device, late):
                    other_losses, other_weights = train(device, stage, precision, zero)
                same = torch.equal(losses, other_losses)
                same &= all(torch.equal(value, other_weights[name]) for name, value in weights.items())
                verdict = "the same bits" if same else "DIFFERS"
            except Exception as error:
                same, verdict = False, f"FAILED: {type(error).__name__}: {str(error)[:300]}"
            print(precision, f"stage {stage}", zero or "", "late" if late else "", verdict, flush=True)
            different += not same
    return different


if __name__ == "__main__":
    on = torch.device("cpu") if sys.argv[1:] == ["cpu"] else torch.device("cuda", 0)
    if on.type == "cuda":
        torch.cuda.set_device(on)
    torch.use_deterministic_algorithms(True, warn_only=True)
    dist.init_process_group("nccl" if on.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    bad = rehearse(on)
    print("rehearsal:", "ok" if not bad else f"{bad} rows are bad", flush=True)
    os._exit(bool(bad))  # threads of a failed engine must not keep the process
