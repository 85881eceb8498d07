"""Trains with an optimizer of one's own, in every ZeRO stage, and compares the stages with plain PyTorch.

    python examples/launch.py --standalone --nproc-per-node 2 examples/custom_optimizer.py
    torchrun --nproc-per-node 2 examples/custom_optimizer.py --stages 0 3 --steps 200

The optimizer is `Lion`, below: a subclass of torch.optim.Optimizer that knows nothing of Partita. For each stage the
program trains a small language model, then goes on once more from a checkpoint in the middle, and says whether that
gave the same weights. Started again after Ctrl-C or a crash, it goes on where it was.
Writes into --out: stage-N.csv, and losses.png.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import partita
import torch
import torch.distributed as dist
from common.arguments import Parser, add_checkpoint_arguments, device, folder, number, seed
from common.job import config_from, device_of_this_rank, process_group, run_job
from common.report import BLUE, GREY, ORANGE, Curve, Row
from common.terminal import Interrupts
from language.models import LSTM, ModelConfig
from language.text import Corpus, read_text, split, standard_library_text, unigram_entropy
from language.training import Phase, held_out_loss, held_out_samples, train_phase
from matplotlib.figure import Figure
from partita.checkpoint import checkpoints
from partita.config import load_config
from partita.files import file_to_write
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import default_collate


class Lion(Optimizer):
    """Steps of one size, in the direction of the sign of a momentum (Chen et al. 2023, arXiv:2302.06675).

    Every operation treats every element by itself. So it may run over parts of parameters, and Partita may shard it.
    """

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum, (mixed, kept) = state["momentum"], group["betas"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(momentum.lerp(parameter.grad, 1 - mixed).sign_(), alpha=-group["lr"])
                momentum.lerp_(parameter.grad, 1 - kept)


def parse_arguments() -> argparse.Namespace:
    """What the user asks for; a bad value is a `JobError`."""
    parser = Parser(str(__doc__).partition("\n")[0])
    count, rate = number(int, 1), number(float, 0.0, open_end=True)
    parser.add_argument("--stages", type=int, nargs="+", choices=range(4), default=[0, 1, 2, 3], help="of ZeRO")
    parser.add_argument("--steps", type=number(int, 2), default=100, help="optimizer steps of each run")
    parser.add_argument("--batch-size", type=count, default=8, help="windows in a batch of one rank")
    parser.add_argument("--lr", type=rate, default=5e-3, help="learning rate of Lion")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="train on this file; without it: Python's standard library"
    )
    parser.add_argument("--megabytes", type=rate, default=2.0, help="use at most this much of the text")
    parser.add_argument("--context", type=count, default=64, help="bytes that the model sees at once")
    parser.add_argument("--width", type=count, default=64, help="size of the hidden states")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="type of the parameters")
    parser.add_argument("--device", type=device, choices=("cpu", "cuda"), default="cpu", help="what computes")
    parser.add_argument("--seed", type=seed, default=0, help="of the weights and the order of the data")
    what = "JSON (or YAML) whose keys replace those of the engine's config"
    parser.add_argument("--config", type=Path, metavar="FILE", help=what)
    parser.add_argument("--out", type=folder, default=Path("runs/custom_optimizer"), help="folder for the results")
    add_checkpoint_arguments(parser, "checkpoints/custom_optimizer", save_every=50)
    return parser.parse_args()


class Comparison:
    """The runs, over the same batches. All ranks do the same."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        load_config(self.config(args.stages[0]))  # what is wrong is said before anything is trained
        max_bytes = int(args.megabytes * 1e6)
        text = standard_library_text(max_bytes) if args.text is None else read_text(args.text, max_bytes)
        size = args.batch_size * self.ranks
        self.corpus: Corpus = split(text, args.context, train_windows=size, held_out_windows=self.ranks)
        held_out = self.corpus.held_out
        self.samples = held_out_samples(held_out, 64, self.ranks)
        self.baseline = unigram_entropy(self.corpus.train.data, held_out.targets(self.samples), 256)
        self.interrupts = Interrupts(saves=bool(args.checkpoints), speaks=self.rank == 0)

    def config(self, stage: int, *, saves: bool = True) -> dict[str, Any]:
        """Of the engine: the optimizer is not in it."""
        args = self.args
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": args.batch_size,
            "zero_optimization": {"stage": stage},
            "steps_per_print": 0,
            **({args.precision: {"enabled": True}} if args.precision != "fp32" else {}),
        }
        if args.checkpoints and saves:
            folder = str(Path(args.checkpoints, f"stage-{stage}"))
            config["checkpoint"] = {"dir": folder, "interval_steps": args.save_every, "keep_last": args.keep}
        return {**config, **config_from(args.config)}

    def model(self, seed: int) -> LSTM:
        """The same weights for the same seed."""
        torch.manual_seed(seed)
        sizes = ModelConfig(vocabulary=256, context=self.args.context, layers=1, width=self.args.width)
        return LSTM(sizes).to(device_of_this_rank(self.args.device))

    def batch(self, step: int) -> list[Tensor]:
        """That of all ranks, [ranks * batch_size, context] twice. The step alone decides it: nothing is to be saved."""
        random = torch.Generator().manual_seed(self.args.seed * 1_000_003 + step)
        chosen = torch.randint(len(self.corpus.train), (self.args.batch_size * self.ranks,), generator=random)
        batch: list[Tensor] = default_collate([self.corpus.train[int(i)] for i in chosen])
        return batch

    def batches(self, first: int) -> Iterator[list[Tensor]]:
        """This rank's, from a step on."""
        size = self.args.batch_size
        mine = slice(self.rank * size, (self.rank + 1) * size)
        return ([part[mine] for part in self.batch(step)] for step in itertools.count(first))

    def plain(self) -> tuple[Curve, float]:
        """Without an engine, one process with the batches of all ranks: its losses, and the last one on the held-out
        text."""
        model, device = self.model(self.args.seed), device_of_this_rank(self.args.device)
        optimizer = Lion(model.parameters(), lr=self.args.lr)
        losses = []
        for step in range(self.args.steps):
            loss = model(*(part.to(device) for part in self.batch(step)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append((step + 1, loss.item()))
        held_out = default_collate([self.corpus.held_out[i] for i in self.samples])
        with torch.no_grad():
            return Curve("plain PyTorch", losses), model(*(part.to(device) for part in held_out)).item()

    def engine(self, config: dict[str, Any], seed: int) -> partita.Engine:
        """`Lion` is given as torch's own optimizers are: as an object, or as a function of the parameters."""
        engine, *_ = partita.initialize(
            self.model(seed), optimizer=functools.partial(Lion, lr=self.args.lr), config=config
        )
        return engine

    def train(self, stage: int) -> tuple[list[Row], dict[str, Tensor]] | None:
        """The rows of metrics and the weights; None if Ctrl-C ended it."""
        engine = self.engine(self.config(stage), self.args.seed)
        phase = Phase(
            name=f"stage {stage}",
            steps=self.args.steps,
            log_every=1,
            eval_every=self.args.steps,
            step_tokens=self.args.batch_size * self.ranks * self.args.context,
            bytes_per_token=1.0,
            validate=lambda engine: held_out_loss(engine, self.corpus.held_out, self.samples),
        )
        table = self.args.out / f"stage-{stage}.csv"
        rows, interrupted = train_phase(engine, self.batches(engine.global_steps), phase, table, self.interrupts)
        weights = engine.module_state_dict()
        engine.destroy()
        return None if interrupted else (rows, weights)

    def again(self, stage: int, weights: dict[str, Tensor]) -> str:
        """Goes on from a checkpoint in the middle with a new engine; what became of the weights."""
        folder = self.config(stage).get("checkpoint", {}).get("dir")
        tags = [] if folder is None else [one.tag for one in checkpoints(Path(folder))]
        steps = sorted(int(tag.removeprefix("global_step")) for tag in tags)
        if not steps or steps[0] == self.args.steps:
            return "no checkpoint in the middle"
        engine = self.engine(self.config(stage, saves=False), self.args.seed + 1)
        engine.load_checkpoint(folder, tag=f"global_step{steps[0]}")
        for batch in itertools.islice(self.batches(steps[0]), self.args.steps - steps[0]):
            engine.backward(engine(*(part.to(engine.device) for part in batch)))
            engine.step()
        again = engine.module_state_dict()
        engine.destroy()
        same = all(torch.equal(again[name], value) for name, value in weights.items())
        return f"resumed at step {steps[0]}: {'the same bits' if same else 'OTHER WEIGHTS'}"

    def run(self) -> bool:
        """True if Ctrl-C ended it."""
        (plain, held_out), curves = self.plain(), []
        self.say(f"predicting by frequency alone (unigram entropy): {self.baseline:.3f} nats per byte")
        self.say(f"plain PyTorch, one process: held out {held_out:.3f}")
        for stage in self.args.stages:
            trained = self.train(stage)
            if trained is None:
                return True
            rows, weights = trained
            curves.append(Curve(f"stage {stage}", [(row.step, row.loss) for row in rows if row.loss is not None]))
            resumed = self.again(stage, weights)
            self.say(f"stage {stage}, {self.ranks} ranks: held out {rows[-1].val_loss:.3f}; {resumed}")
        if self.rank == 0:
            title = f"Lion on {self.ranks} ranks, ZeRO stages beside plain PyTorch"
            plot(plain, curves, self.baseline, title, file_to_write(self.args.out / "losses.png"))
        return False

    def say(self, line: str) -> None:
        """On rank 0."""
        if self.rank == 0:
            print(line, flush=True)


def plot(plain: Curve, stages: list[Curve], baseline: float, title: str, file: Path) -> None:
    """The training losses of all runs, and below how far each stage is from plain PyTorch."""
    figure = Figure(figsize=(8, 6), dpi=100, layout="constrained")
    losses, differences = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    losses.plot(*zip(*plain.points, strict=True), color=BLUE, linewidth=5, alpha=0.35, label=plain.name)
    known = dict(plain.points)
    for curve, style in zip(stages, ("-", "--", "-.", ":"), strict=False):
        losses.plot(*zip(*curve.points, strict=True), color=ORANGE, linewidth=1.4, linestyle=style, label=curve.name)
        apart = [(step, abs(loss - known[step])) for step, loss in curve.points]
        differences.plot(*zip(*apart, strict=True), color=ORANGE, linewidth=1.4, linestyle=style, label=curve.name)
    losses.axhline(baseline, color=GREY, linewidth=1.2, linestyle="--", label="by frequency alone")
    losses.set_title(title, loc="left", fontsize=11)
    losses.set_ylabel("training loss (nats per byte)")
    differences.set(xlabel="optimizer step", ylabel="|stage - plain| (nats)")
    differences.set_ylim(bottom=0)
    for axes in (losses, differences):
        axes.grid(color="#e3e5e8", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=GREY)
    losses.legend(frameon=False)
    figure.savefig(file)


def job() -> bool:
    """The work of a rank."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    with process_group(args.device):
        try:
            return Comparison(args).run()
        except partita.Preempted:
            return True


def main() -> int:
    """The exit status."""
    return run_job("custom_optimizer.py", job)


if __name__ == "__main__":
    sys.exit(main())
