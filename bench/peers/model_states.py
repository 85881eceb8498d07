"""Peak memory of stage 3 against its formula, while a model is built, taken over, loaded, trained and exported.

    torchrun --nproc-per-node 2 bench/peers/model_states.py [--transport torch] [--dtype fp32] [--json FILE]

The formula is 16 bytes per parameter (16-bit; 16 in fp32 too: weights, gradients and two moments) over the ranks, plus
two units. Memory is each rank's, where a page that several ranks have mapped counts in parts, over that of the process
before the model; the fullest rank counts. It is sampled, so what lasts less than a few milliseconds is missed.

From the first training step on it also has what computing takes, and what malloc keeps of that. As much as plain torch
takes for it, beside weights alone and with each gradient dropped as it comes, is measured first; the last column is
without it.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from environment import Ranks  # isort: skip  (it sets up the process for torch)
import partita
import torch
from partita.device.memory import FreedMemory
from partita.units import Unit
from report import print_table, settings_of, write_json
from workload import GPT, ModelConfig

SAMPLE_SECONDS = 0.004
BYTES_PER_PARAMETER = 16
VOCABULARY = 4096


def pss_mib() -> float:
    """Memory of this process; shared pages in parts, pages of files not at all: the system can drop them."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) / 1024


class Peaks:
    """The largest memory in each phase."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._baseline_mib = pss_mib()
        self.mib: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        peak, done = [pss_mib()], threading.Event()

        def sample() -> None:
            while not done.wait(SAMPLE_SECONDS):
                peak.append(max(peak.pop(), pss_mib()))

        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        try:
            yield
        finally:
            done.set()
            sampler.join()
        gc.collect()
        self._ranks.barrier()
        self.mib[name] = self._ranks.largest(max(peak[0], pss_mib()) - self._baseline_mib)


def counted_mib(engine: partita.Engine) -> float:
    """What the engine's buffers add up to, apart from those of a unit in use: without what computing takes."""
    buffers = [t for u in units_of(engine) for t in (u.own_params, u.master, u.reduced, *u.states.values())]
    own = {t.data_ptr(): t.nbytes for t in buffers if t is not None}
    return sum(own.values()) / 2**20


def units_of(engine: partita.Engine) -> list[Unit]:
    """What the engine trains."""
    units = {quantity.unit: None for quantity in engine.train_state().quantities()}
    return [unit for unit in units if isinstance(unit, Unit)]


def warm_up(config: dict[str, Any]) -> None:
    """Loads what a first step loads: libraries, their threads and buffers."""
    engine, *_ = partita.initialize(model=GPT(ModelConfig(64, 64, 2, 1, 64)), config=config)
    for _ in range(2):
        tokens = torch.randint(0, 64, (1, 16))
        engine.backward(engine(tokens, tokens))
        engine.step()
    engine.destroy()
    gc.collect()


def plain_model(arguments: argparse.Namespace) -> GPT:
    return GPT(ModelConfig(VOCABULARY, 64, arguments.layers, arguments.width // 64, arguments.width))


def random_tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (1, 16))


def computing_mib(arguments: argparse.Namespace, ranks: Ranks) -> float:
    """What plain torch's forwards and backwards take beside the weights."""
    model = plain_model(arguments).to(torch.bfloat16 if arguments.dtype == "bf16" else torch.float32)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    FreedMemory().give_back()
    peaks = Peaks(ranks)
    with peaks.phase("computing"):
        for _ in range(arguments.steps):
            tokens = random_tokens()
            model(tokens, tokens).backward()
    return peaks.mib["computing"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--transport", choices=("auto", "torch"), default="auto")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ranks = Ranks()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": arguments.dtype == "bf16"},
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 0},
        "comm": {"transport": arguments.transport, "timeout_seconds": 300},
        "steps_per_print": 0,
    }
    warm_up(config)
    computing = computing_mib(arguments, ranks)
    gc.collect()
    FreedMemory().give_back()
    peaks = Peaks(ranks)
    with peaks.phase("built (zero.Init)"), partita.zero.Init(config=config):
        model = plain_model(arguments)
    with peaks.phase("taken over (initialize)"):
        engine, *_ = partita.initialize(model=model, config=config)
    numel = sum(p.numel() for p in model.parameters())
    unit_numel = max(unit.layout.numel for unit in units_of(engine))
    with peaks.phase("trained"):
        for _ in range(arguments.steps):
            tokens = random_tokens()
            engine.backward(engine(tokens, tokens))
            engine.step()
    with tempfile.TemporaryDirectory() as folder:
        path = [folder]
        torch.distributed.broadcast_object_list(path)
        file = Path(path[0]) / "model.safetensors"
        with peaks.phase("exported (save_model)"):
            engine.save_model(file)
        with peaks.phase("exported in fp32"):
            engine.save_model(file.with_name("fp32.safetensors"), torch.float32)
        with peaks.phase("loaded (safetensors)"):
            engine.load_module_state_dict(file)
        ranks.barrier()
    element_bytes = 2 if arguments.dtype == "bf16" else 4
    states_mib = BYTES_PER_PARAMETER * numel / ranks.world_size / 2**20
    allowed_mib = states_mib + 2 * unit_numel * element_bytes / 2**20
    transport = units_of(engine)[0].communicator.transport
    if ranks.rank == 0:
        print(
            f"{numel:,} parameters, {ranks.world_size} ranks over {transport}, {arguments.dtype}: "
            f"16/N bytes are {states_mib:.0f} MiB, with two units of {unit_numel:,} elements {allowed_mib:.0f} MiB"
        )
        print(f"masters, moments, gradients and parameters of this rank, counted: {counted_mib(engine):.0f} MiB")
        print(f"plain torch's computing: {computing:.0f} MiB")
        before = list(peaks.mib).index("trained")
        rows = [
            [name, f"{mib:.0f}", f"{mib / allowed_mib:.2f}", f"{(mib - computing) / allowed_mib:.2f}" * (i >= before)]
            for i, (name, mib) in enumerate(peaks.mib.items())
        ]
        print_table(["phase", "peak MiB", "x formula", "without computing"], rows)
        measured = {"parameters": numel, "ranks": ranks.world_size, "formula_mib": allowed_mib, "peak_mib": peaks.mib}
        measured["computing_mib"] = computing
        write_json(arguments.json, {"arguments": settings_of(arguments), **measured})
    engine.destroy()
    ranks.finish()


if __name__ == "__main__":
    main()
