"""One process, but every collective over torch.distributed and stage 3 gathered, compared with the plain engine.

On a GPU this is the stream order, the resizing of storages and the waiting of several GPUs, over NCCL; collectives can
begin 1 ms later than they could, and a wait of the host is an error. On a CPU it goes over gloo, with a small model.

    PYTHONPATH=examples:tests/harness python tests/gpu/rehearsal.py [cuda or cpu] [precision]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import partita
import torch
import torch.distributed as dist
from language.models import GPT, ModelConfig
from one_as_several import as_several_ranks
from torch import Tensor, nn

PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 10}},
    "fp32": {},
    "split": {"bf16": {"enabled": True, "master_weights": "split"}},
}
TWO = ("bf16", "fp16")  # for what hardly depends on it
HOST = {"device": "cpu"}
ADAMW = {"type": "AdamW", "params": {"lr": 1e-3}}
SGD = {"type": "SGD", "params": {"lr": 1e-2, "momentum": 0.9}}  # torch's own
Outcome = tuple[Tensor, list[Tensor]]


@dataclass(frozen=True)
class Row:
    """What one run has that others have not."""

    what: str
    stage: int
    zero: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    late: bool = True
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    aside: bool = False  # modules on streams of their own
    built_in_parts: bool = False  # in zero.Init

    @property
    def name(self) -> str:
        return f"stage {self.stage}, {self.what}"


ROWS = [
    *(Row("in time", stage, late=False) for stage in (0, 1, 2, 3)),
    *(Row("late", stage) for stage in (0, 1, 2, 3)),
    *(Row("nothing overlaps", stage, {"overlap_comm": False}, late=False) for stage in (2, 3)),
    *(Row("optimizer on the host", stage, {"offload_optimizer": HOST}) for stage in (1, 2, 3)),
    Row("half of the optimizer on the host", 2, {"offload_optimizer": {**HOST, "ratio": 0.5}}),
    Row("optimizer on the host, not pinned", 3, {"offload_optimizer": {**HOST, "pin_memory": False}}),
    Row("optimizer and parameters on the host", 3, {"offload_optimizer": HOST, "offload_param": HOST}),
    *(
        Row("recomputed", stage, changes={"activation_checkpointing": {"enabled": True}}, precisions=TWO)
        for stage in (0, 3)
    ),
    *(Row("torch's optimizer", stage, changes={"optimizer": SGD}, precisions=TWO) for stage in (1, 3)),
    Row("torch's optimizer on the host", 2, {"offload_optimizer": HOST}, {"optimizer": SGD}, precisions=TWO),
    *(Row("modules on streams of their own", stage, aside=True, precisions=TWO) for stage in (2, 3)),
    Row("built in zero.Init", 3, built_in_parts=True, precisions=TWO),
    Row("built in zero.Init, parameters on the host", 3, {"offload_param": HOST}, built_in_parts=True, precisions=TWO),
]


def names(precisions: Iterable[str] = PRECISIONS) -> list[str]:
    """Of all runs that are compared."""
    return [f"{precision}, {row.name}" for precision in precisions for row in ROWS if precision in row.precisions]


@dataclass(frozen=True)
class Size:
    """Of the model and of the run; the CPU needs less for the same work."""

    model: ModelConfig
    bucket: int
    persistent: int
    steps: int


SIZES = {
    "cpu": Size(ModelConfig(vocabulary=64, context=16, layers=2, heads=2, width=32), 3000, 40, 3),
    "cuda": Size(ModelConfig(vocabulary=512, context=64, layers=4, heads=4, width=256), 300_000, 1000, 5),
}


class Aside(nn.Module):
    """A module that computes on a stream of its own, where there are streams; the program orders its inputs and its
    outputs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.stream: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cuda":
            return self.inner(x)  # type: ignore[no-any-return]
        main = torch.cuda.current_stream()
        self.stream = self.stream or torch.cuda.Stream()
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            y: Tensor = self.inner(x)
        x.record_stream(self.stream)
        main.wait_stream(self.stream)
        y.record_stream(main)
        return y


def model_on(device: torch.device, row: Row, config: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    with ExitStack() as exits:
        if row.built_in_parts:
            exits.enter_context(partita.zero.Init(config=config, dtype=torch.float32))
        exits.enter_context(torch.device(device))
        model = GPT(SIZES[device.type].model)
    if row.aside:
        first, second = model.blocks[0], model.blocks[1]
        model.blocks[0] = Aside(first)
        second.expand = Aside(second.expand)
    return model


def config_of(row: Row, precision: str, size: Size) -> dict[str, Any]:
    zero = {"reduce_bucket_size": size.bucket, "stage3_param_persistence_threshold": size.persistent}
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "steps_per_print": 0,
        "optimizer": ADAMW,
        "zero_optimization": {"stage": row.stage, **zero, **row.zero},
        **PRECISIONS[precision],
        **row.changes,
    }


def train(device: torch.device, row: Row, precision: str) -> Outcome:
    """Losses and weights. On a GPU, waiting for it is an error from the third step on."""
    size = SIZES[device.type]
    config = config_of(row, precision, size)
    engine = partita.Engine(model_on(device, row, config), config=config)
    generator = torch.Generator().manual_seed(1)
    shape = (4, size.model.context + 1)
    batches = [
        torch.randint(size.model.vocabulary, shape, generator=generator).to(device) for _ in range(2 * size.steps)
    ]
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
    weights = [value.cpu() for value in engine.module_state_dict().values()]
    engine.destroy()
    return torch.stack(losses).float().cpu(), weights


def plain(device: torch.device, precision: str, optimizer: dict[str, Any]) -> Outcome:
    """Stage 0 of one process that knows that it is alone."""
    return train(device, Row("alone", 0, changes={"optimizer": optimizer}), precision)


def verdicts(device: torch.device, precisions: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The name of each row, and whether the run has the plain engine's bits."""
    for precision in precisions:
        expected: dict[str, Outcome] = {}
        for row in (row for row in ROWS if precision in row.precisions):
            optimizer = row.changes.get("optimizer", ADAMW)
            try:
                if optimizer["type"] not in expected:
                    expected[optimizer["type"]] = plain(device, precision, optimizer)
                with as_several_ranks(device, late=row.late):
                    losses, weights = train(device, row, precision)
                expected_losses, expected_weights = expected[optimizer["type"]]
                same = torch.equal(losses, expected_losses)
                same &= all(torch.equal(a, b) for a, b in zip(weights, expected_weights, strict=True))
                verdict = "the same bits" if same else "DIFFERS"
            except Exception as error:
                verdict = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            yield f"{precision}, {row.name}", verdict


def main() -> None:
    where, *precisions = sys.argv[1:] or ["cuda"]
    on = torch.device("cuda", 0) if where == "cuda" else torch.device(where)
    if on.type == "cuda":
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # the same bits on several streams
        torch.cuda.set_device(on)
    torch.use_deterministic_algorithms(True, warn_only=True)
    dist.init_process_group("nccl" if on.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    bad = 0
    for name, verdict in verdicts(on, precisions or PRECISIONS):
        print(f"{name}: {verdict}", flush=True)
        bad += verdict != "the same bits"
    print("rehearsal:", "ok" if not bad else f"{bad} rows are bad", flush=True)
    os._exit(bool(bad))  # threads of a failed engine must not keep the process


if __name__ == "__main__":
    main()
