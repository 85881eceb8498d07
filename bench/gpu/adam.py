"""The kernels of the step against the copy bandwidth of the same run, and Adam against torch's fused AdamW.

    python bench/gpu/adam.py [--numel 100000000,1000000000] [--json FILE]

All subjects take turns within one process per group and size; figures are medians over rounds. Bytes are those that the
work must read and write: Adam on 16-bit gradients and weights with fp32 masters and moments reads 14 and writes 14 per
parameter. Values stay what they are, however often the work is repeated: the learning rate is 0, which no kernel treats
in another way, and moments are those of such gradients.
"""

from __future__ import annotations

import prelude  # isort: skip  # noqa: F401  (the helpers of the peers can be imported after it)
import argparse
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import cases
import torch
from device import copy_gb_per_s, elapsed_ms, release
from partita import _core
from partita.device import kernels
from torch import Tensor

Action = Callable[[], object]
PIECES = 100  # tensors that are packed into a flat buffer
GROUPS = ("adam", "others")
GRADIENT, WEIGHT = 1e-3, 0.02  # how large such numbers are
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Subject:
    """Work on `numel` elements; `build` gives the function that does it once."""

    name: str
    bytes_per_element: float
    build: Callable[[int, torch.device], Action]


def control_on(device: torch.device) -> Tensor:
    """The control block of a step that scales nothing and skips nothing."""
    control = torch.zeros(_core.StepControl.nbytes, dtype=torch.uint8)
    _core.StepControl(grad_norm=1.0, grad_scale=1.0, skip=False, step=10).write(control.data_ptr())
    return control.to(device)


def spread(numel: int, scale: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of that size, as those of a training run: no zeros, and not one number throughout."""
    return torch.empty(numel, dtype=dtype, device=device).normal_().mul_(scale)


def adam(dtype: torch.dtype, split: bool = False) -> Callable[[int, torch.device], Action]:
    def build(numel: int, device: torch.device) -> Action:
        buffers: dict[str, Tensor | None] = {
            "grads": spread(numel, GRADIENT, dtype, device),
            "exp_avg": spread(numel, GRADIENT, torch.float32, device),
            "exp_avg_sq": torch.full((numel,), GRADIENT**2, dtype=torch.float32, device=device),
            "params": None if dtype is torch.float32 else spread(numel, WEIGHT, dtype, device),
            "master": None if split else spread(numel, WEIGHT, torch.float32, device),
        }
        if split:
            buffers["remainder"] = torch.zeros(numel, dtype=torch.int16, device=device)
        segments = _core.Segments([(0, numel, 0)])
        groups = [_core.AdamGroup(0.0, 0.9, 0.999, 1e-8, 0.01, True)]
        control = control_on(device)
        part: Callable[..., kernels.Part[_core.AdamPart]] = kernels.adam_part
        parts = [part(**buffers, segments=segments)]

        def action(keep_alive: dict[str, Tensor | None] = buffers) -> None:
            kernels.adam(parts, groups, control)

        return action

    return build


def torch_adam(numel: int, device: torch.device) -> Action:
    parameter = torch.nn.Parameter(spread(numel, WEIGHT, FP32, device))
    parameter.grad = spread(numel, GRADIENT, FP32, device)
    return torch.optim.AdamW([parameter], lr=0.0, fused=True).step


def norm(dtype: torch.dtype) -> Callable[[int, torch.device], Action]:
    def build(numel: int, device: torch.device) -> Action:
        values = spread(numel, GRADIENT, dtype, device)
        total = torch.zeros(1, dtype=torch.float64, device=device)
        segments = _core.Segments([(0, numel, 0)])
        return lambda: kernels.sum_of_squares(total, [kernels.norm_part(values, segments)])

    return build


def cast(numel: int, device: torch.device) -> Action:
    source = spread(numel, WEIGHT, FP32, device)
    target = torch.zeros(numel, dtype=torch.bfloat16, device=device)
    return lambda: kernels.cast(target, source)


def pack(destination: torch.dtype, accumulate: bool, without: int = 0) -> Callable[[int, torch.device], Action]:
    """`PIECES` bf16 tensors into a flat buffer; the first ones are those of parameters `without` a gradient."""

    def build(numel: int, device: torch.device) -> Action:
        piece = numel // PIECES
        flat = torch.zeros(piece * PIECES, dtype=destination, device=device)
        tensors = [spread(piece, GRADIENT, BF16, device) for _ in range(without, PIECES)]
        spans = [_core.Span(0, piece, _core.DType.bf16)] * without + [kernels.span(tensor) for tensor in tensors]
        offsets = [i * piece for i in range(PIECES)]

        def action(keep_alive: list[Tensor] = tensors) -> None:
            kernels.pack(flat, spans, offsets, scale=1.0, accumulate=accumulate)

        return action

    return build


SUBJECTS = {
    "adam": [
        Subject("adam bf16", 28, adam(BF16)),
        Subject("torch fused AdamW fp32", 28, torch_adam),
        Subject("adam bf16 split masters", 26, adam(BF16, split=True)),
        Subject("adam fp32", 28, adam(FP32)),
        Subject("adam fp16", 28, adam(torch.float16)),
    ],
    "others": [
        Subject("norm bf16", 2, norm(BF16)),
        Subject("norm fp32", 4, norm(FP32)),
        Subject("cast fp32 to bf16", 6, cast),
        Subject("pack bf16", 4, pack(BF16, accumulate=False)),
        Subject("pack bf16, half of it without gradients", 3, pack(BF16, accumulate=False, without=PIECES // 2)),
        Subject("pack bf16 into fp32, accumulating", 10, pack(FP32, accumulate=True)),
    ],
}


def turn_ms(subject: Subject, numel: int, times: int, device: torch.device) -> float:
    """Builds the subject's buffers anew: all of them at once need not fit into memory."""
    action = subject.build(numel, device)
    action()
    ms = elapsed_ms(device, action, times)
    del action
    release(device)
    return ms


def measure(case: str, arguments: argparse.Namespace) -> cases.Answer:
    group, numel = case.split()[0], int(case.split()[1])
    copies: list[float] = []
    ms: dict[str, list[float]] = {}
    errors: dict[str, str] = {}
    answer: cases.Answer = {}
    for _ in range(arguments.rounds):
        copies.append(copy_gb_per_s(arguments.device, arguments.copy_mib * 2**20))
        release(arguments.device)
        for subject in SUBJECTS[group]:
            if subject.name in errors:
                continue
            try:
                ms.setdefault(subject.name, []).append(turn_ms(subject, numel, arguments.times, arguments.device))
            except Exception as error:
                errors[subject.name] = f"{type(error).__name__}: {str(error)[:300]}"
                ms.pop(subject.name, None)
                release(arguments.device)
        answer = {"numel": numel, "copy_gb_per_s": copies, "ms": ms, "errors": errors}
        answer |= {"figures": figures(SUBJECTS[group], ms, numel, median(copies))}
        cases.give(arguments, answer)
    return answer


def figures(
    subjects: list[Subject], ms: dict[str, list[float]], numel: int, copy: float
) -> dict[str, dict[str, float]]:
    """GB/s and fraction of the copy bandwidth by subject; of torch's Adam per byte, where that ran."""
    speed = {s.name: s.bytes_per_element * numel / median(ms[s.name]) / 1e6 for s in subjects if ms.get(s.name)}
    peer = speed.get("torch fused AdamW fp32")
    return {
        name: {"gb_per_s": value, "of_copy": value / copy} | ({"of_torch_per_byte": value / peer} if peer else {})
        for name, value in speed.items()
    }


def main() -> None:
    parser = cases.new_parser(__doc__)
    parser.add_argument("--numel", type=cases.names, default=["100000000", "1000000000"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--times", type=int, default=10, help="runs in a row at each turn")
    parser.add_argument("--copy-mib", type=int, default=4096)
    arguments = parser.parse_args()
    wanted = [f"{group} {numel}" for numel in arguments.numel for group in GROUPS]
    cases.run(arguments, lambda case: measure(case, arguments), lambda runner: runner.take_turns(wanted, 1))


if __name__ == "__main__":
    main()
