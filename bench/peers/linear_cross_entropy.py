"""The head and the loss of a language model: whole logits, DeepSpeed's shards of tokens, Partita's chunks.

python bench/peers/linear_cross_entropy.py [--dtype fp32|bf16] [--rounds 5] [--json FILE]

One forward and backward to the gradients of hidden and weight. Times: contenders take turns in one process. Memory:
each in a process of its own, the peak of resident memory over what there was before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, when torch is loaded
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.nn.functional as F
from environment import memory_mib
from partita.nn.functional import linear_cross_entropy
from report import print_table, ratio, settings_of, spread, write_json
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Times = dict[str, list[float]]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """No variable holds the logits: autograd decides what stays of them."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def deepspeed(shard_tokens: int) -> Loss:
    """`TiledFusedLogitsLoss` over shards of as many tokens as our chunks have."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        def shard_loss(_: None, x: Tensor, y: Tensor) -> Tensor:
            return plain(x, weight, y)

        shards = -(-len(hidden) // shard_tokens)
        total: Tensor = TiledFusedLogitsLoss.apply(
            shard_loss, None, hidden.unsqueeze(0), targets.unsqueeze(0), None, shards, [weight], "mean"
        )
        return total

    return loss


def contenders(words: int) -> dict[str, Loss]:
    """Those that this interpreter has."""
    found: dict[str, Loss] = {"whole logits": plain}
    with contextlib.suppress(ImportError):
        found["DeepSpeed"] = deepspeed(max(1, 2**23 // words))
    return {**found, "Partita": linear_cross_entropy}


def task(arguments: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and targets, the same in every process."""
    torch.manual_seed(0)
    dtype = DTYPES[arguments.dtype]
    hidden = torch.randn(arguments.tokens, arguments.width).to(dtype).requires_grad_()
    weight = (torch.randn(arguments.words, arguments.width) * 0.02).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, arguments.words, (arguments.tokens,))


def gradients(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[float, Tensor, Tensor]:
    hidden.grad = weight.grad = None
    value = loss(hidden, weight, targets)
    value.backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None and weight.grad is not None
    return value.item(), hidden.grad, weight.grad


def peak_mib(name: str, arguments: argparse.Namespace) -> float:
    """Of one forward and backward in this process."""
    loss, given = contenders(arguments.words)[name], task(arguments)
    few = [x[:16].detach().requires_grad_(x.is_floating_point()) for x in given]
    gradients(plain, few[0], few[1], few[2] % 16)  # libraries allocate at their first call
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory_mib("VmRSS")
    gradients(loss, *given)
    return memory_mib("VmHWM") - before


def peak_alone(name: str, arguments: argparse.Namespace) -> float:
    """The same in a fresh process."""
    options = [f"--{key}={getattr(arguments, key)}" for key in ("dtype", "tokens", "words", "width")]
    command = [sys.executable, __file__, *options, "--alone", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def times_ms(arguments: argparse.Namespace) -> tuple[Times, Times]:
    """By contender, of all rounds: by the clock, and of the processor, which a busy machine does not change as much."""
    losses, given = contenders(arguments.words), task(arguments)
    times: tuple[Times, Times] = {name: [] for name in losses}, {name: [] for name in losses}
    for number in range(arguments.rounds + 1):
        for name, loss in losses.items():
            begin = time.perf_counter(), time.process_time()
            gradients(loss, *given)
            if number:  # the first round fills caches
                times[0][name].append((time.perf_counter() - begin[0]) * 1e3)
                times[1][name].append((time.process_time() - begin[1]) * 1e3)
    return times


def errors(arguments: argparse.Namespace) -> dict[str, float]:
    """The largest error of a gradient relative to its largest element, against whole logits in fp64."""
    hidden, weight, targets = task(arguments)
    hidden, weight = (x.detach()[: arguments.checked].double().requires_grad_() for x in (hidden, weight))
    targets = targets[: arguments.checked] % len(weight)
    _, *true = gradients(lambda *x: F.cross_entropy(F.linear(x[0], x[1]), x[2]), hidden, weight, targets)
    found = {}
    for name, loss in contenders(arguments.words).items():
        own = [x.detach().to(DTYPES[arguments.dtype]).requires_grad_() for x in (hidden, weight)]
        _, *made = gradients(loss, *own, targets)
        found[name] = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(made, true, strict=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--words", type=int, default=50257)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--checked", type=int, default=2048, help="tokens and words of the comparison with fp64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone is not None:
        print(json.dumps(peak_mib(arguments.alone, arguments)))
        return
    memory = {name: peak_alone(name, arguments) for name in contenders(arguments.words)}
    (times, cpu), error = times_ms(arguments), errors(arguments)
    rows = [
        [
            name,
            f"{min(values):.0f}",
            spread(values),
            f"{ratio(values, times['whole logits']):.2f}",
            f"{ratio(cpu[name], cpu['whole logits']):.2f}",
            f"{memory[name]:.0f}",
            f"{memory[name] / memory['whole logits']:.3f}",
            f"{error[name]:.1e}",
        ]
        for name, values in times.items()
    ]
    print_table(["", "ms", "range", "x whole", "x CPU time", "peak MiB", "x whole", "error"], rows)
    write_json(
        arguments.json,
        {"arguments": settings_of(arguments), "ms": times, "cpu_ms": cpu, "peak_mib": memory, "error": error},
    )


if __name__ == "__main__":
    main()
