"""Pretrains a small language model with Partita, on one process or on many ranks.

    torchrun --nproc-per-node 2 examples/pretrain_lm.py
    python examples/launch.py --standalone --nproc-per-node 2 examples/pretrain_lm.py
    python examples/pretrain_lm.py --text book.txt --tokenizer bpe --vocabulary 4000 --autoencoder --compare

Saves checkpoints into --checkpoints, and goes on from the last one: after Ctrl-C, a crash, or with other ranks.
Writes into --out: model.safetensors, model.json (what it is), tokenizer.json (of --tokenizer bpe), config.json (the
engine's), metrics.csv, metrics.jsonl (for `partita plot`), loss.png, sample.txt; of --autoencoder embedding.csv, of
--compare cold.csv and the folder cold for `partita plot`.
"""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import partita
import torch
import torch.distributed as dist
from common.job import config_from, device_of_this_rank, run_on_ranks
from common.report import Row
from common.terminal import Interrupts
from language import autoencoder
from language.models import MODELS, ModelConfig
from language.options import parse_arguments
from language.results import (
    DESCRIPTION,
    TOKENIZER,
    Baseline,
    describe,
    gain,
    plot,
    require_same_run,
    sample,
    summary,
    title,
    write_description,
)
from language.text import Corpus, cut, read_text, split, standard_library_text, unigram_entropy
from language.tokens import Bytes, Tokenizer, same_on_all_ranks
from language.training import Phase, held_out_loss, held_out_samples, make_engine, train_phase
from partita.config import load_config
from partita.files import file_to_write
from torch import Tensor

WARMUP = 0.05  # of all steps
FILES = ("model.safetensors", DESCRIPTION, "config.json", "metrics.csv", "metrics.jsonl", "loss.png", "sample.txt")


def engine_config(args: argparse.Namespace) -> dict[str, Any]:
    """The engine's config: from the command line, then from --config."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": args.batch_size,
        "gradient_accumulation_steps": args.accumulate,
        "optimizer": {"type": "AdamW", "params": {"lr": args.lr, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": args.steps,
                "warmup_num_steps": max(2, round(WARMUP * args.steps)),
                "warmup_type": "linear",
                "cos_min_ratio": 0.02,
            },
        },
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": args.stage},
        "seed": args.seed,
        "steps_per_print": 0,  # the progress bar says it
        "monitor": {"dir": str(args.out), "interval_steps": args.log_every},
    }
    if args.checkpoints:
        config["checkpoint"] = {
            "dir": args.checkpoints,
            "interval_steps": args.save_every,
            "keep_last": args.keep,
            "fallback": True,
        }
    if args.precision != "fp32":
        config[args.precision] = {"enabled": True}
    return {**config, **config_from(args.config)}


def checkpoint_folder(config: dict[str, Any]) -> Path | None:
    folder = (config.get("checkpoint") or {}).get("dir")
    return Path(folder) if folder else None


def beside(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The config of another phase, whose checkpoints and metrics are in folders of their own below the run's."""
    sections = {key: dict(config.get(key) or {}) for key in ("checkpoint", "monitor")}
    with_folder = {key: values for key, values in sections.items() if values.get("dir")}
    return {**config, **{key: {**values, "dir": str(Path(values["dir"], name))} for key, values in with_folder.items()}}


def load_corpus(args: argparse.Namespace, folder: Path | None) -> Corpus:
    """The text in tokens. A run that has checkpoints in `folder` keeps its tokenizer."""
    max_bytes = int(args.megabytes * 1e6)
    text = standard_library_text(max_bytes) if args.text is None else read_text(args.text, max_bytes)
    ranks = dist.get_world_size()
    tokenizer: Tokenizer = Bytes()
    if args.tokenizer == "bpe":
        kept = None if folder is None else folder / TOKENIZER
        tokenizer = same_on_all_ranks(cut(text)[0], args.vocabulary, kept)
    windows = args.batch_size * ranks
    return split(text, args.context, train_windows=windows, held_out_windows=ranks, tokenizer=tokenizer)


class Pretraining:
    """The phases of the job over one text. All ranks do the same."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.config = engine_config(args)
        load_config(self.config)  # what is wrong is said before anything is trained
        self.folder = checkpoint_folder(self.config)
        sizes = ModelConfig(
            context=args.context,
            layers=args.layers,
            heads=args.heads,
            width=args.width,
            embedding=args.embedding,
            chunked_loss=True,
        )
        if self.folder is not None:
            require_same_run(self.folder, self._description(sizes))
        self.corpus = load_corpus(args, self.folder)
        self.sizes = replace(sizes, vocabulary=self.corpus.tokenizer.vocabulary)
        held_out = self.corpus.held_out
        self.samples = held_out_samples(held_out, args.eval_windows, dist.get_world_size())
        targets = held_out.targets(self.samples)
        self.baseline = Baseline(
            unigram_entropy(self.corpus.train.data, targets, self.sizes.vocabulary),
            float(self.corpus.tokenizer.byte_counts()[targets].double().mean()),
        )
        self.speaks = dist.get_rank() == 0
        self.interrupts = Interrupts(saves=self.folder is not None, speaks=self.speaks)

    def embedding(self) -> Tensor | None:
        """What the autoencoder gives the model to begin with; None if Ctrl-C ended it."""
        args = self.args
        torch.manual_seed(args.seed)
        rows = autoencoder.Rows(autoencoder.neighbour_rows(self.corpus.train.data, self.sizes.vocabulary))
        model = autoencoder.Autoencoder(rows.values.shape[1], self.sizes.embedding_width)
        steps = args.autoencoder_steps
        own = len(rows) // dist.get_world_size()
        config = autoencoder.config(beside(self.config, "embedding"), steps, args.autoencoder_lr, rows_of_rank=own)
        engine, batches = make_engine(model.to(device_of_this_rank(args.device)), rows, config)
        phase = Phase(
            name="autoencoder",
            steps=steps,
            log_every=args.log_every,
            eval_every=args.eval_every,
            step_tokens=engine.train_batch_size(),
            bytes_per_token=None,
            validate=lambda engine: autoencoder.lost_variance(engine, rows),
        )
        table, interrupted = train_phase(engine, batches, phase, args.out / "embedding.csv", self.interrupts)
        values = None if interrupted else autoencoder.embedding_of(engine, rows)
        if self.speaks and values is not None:
            kept = 1 - table[-1].val_loss
            print(
                f"autoencoder: {self.sizes.vocabulary:,} tokens, {rows.values.shape[1]:,} -> {values.shape[1]} -> "
                f"{rows.values.shape[1]:,}; after {engine.global_steps} steps it keeps {kept:.1%} of the variance",
                file=sys.stderr,
                flush=True,
            )
        engine.destroy()
        return values

    def language_model(self, embedding: Tensor | None, table: Path, *, cold: list[Row] | None) -> list[Row] | None:
        """Trains the model from this embedding; None if Ctrl-C ended it.

        Args:
            cold: the rows of the run that is compared with, empty for none; None: this is that run.
        """
        args, is_cold = self.args, cold is None
        torch.manual_seed(args.seed)
        model = MODELS[args.model](self.sizes)
        if embedding is not None:
            autoencoder.begin_with(model.tokens, embedding)
        config = beside(self.config, "cold") if is_cold else self.config
        engine, batches = make_engine(model.to(device_of_this_rank(args.device)), self.corpus.train, config)
        if self.speaks and self.folder is not None:
            write_description(self.folder, self._description(self.sizes), self.corpus.tokenizer)
        phase = Phase(
            name="cold start" if is_cold else "",
            steps=args.steps,
            log_every=args.log_every,
            eval_every=args.eval_every,
            step_tokens=engine.train_batch_size() * args.context,
            bytes_per_token=self.baseline.bytes_per_token,
            validate=lambda engine: held_out_loss(engine, self.corpus.held_out, self.samples),
        )
        begun = engine.global_steps
        if self.speaks and begun < args.steps and (is_cold or not args.compare):
            print(f"to beat: the unigram entropy, {self.baseline}", file=sys.stderr, flush=True)
        rows, interrupted = train_phase(engine, batches, phase, table, self.interrupts)
        if not is_cold and begun < args.steps:
            self._save(engine, rows, cold or [], interrupted=interrupted)
        engine.destroy()
        return None if interrupted else rows

    def _save(self, engine: partita.Engine, rows: list[Row], cold: list[Row], *, interrupted: bool) -> None:
        """Writes the files of --out but for the metrics, and prints the sample and a summary. All ranks call it."""
        out = self.args.out
        engine.save_model(out / "model.safetensors")
        text = sample(engine, self.args, self.corpus.tokenizer)
        if not self.speaks:
            return
        write_description(out, self._description(self.sizes), self.corpus.tokenizer)
        engine.save_config(out / "config.json")
        (out / "sample.txt").write_text(text, encoding="utf-8")
        heading = title(engine, self.args.model)
        plot(rows, cold, self.baseline, heading, out / "loss.png")
        line = summary(engine, heading, rows[-1], self.baseline)
        print(f"\n{text}\n\n{'interrupted; ' if interrupted else ''}{line}; results in {out}", flush=True)

    def _description(self, sizes: ModelConfig) -> dict[str, Any]:
        return describe(self.args, sizes, pretrained_embedding=self.args.autoencoder)


def run(args: argparse.Namespace) -> bool:
    """The whole job; True if Ctrl-C cut it short."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # unless an engine takes it: after the last step it ends nothing
    job = Pretraining(args)
    args.out.mkdir(parents=True, exist_ok=True)
    more = (TOKENIZER, "embedding.csv", "cold.csv")
    for name in (*FILES, *more):
        file_to_write(args.out / name)
    try:
        embedding = job.embedding() if args.autoencoder else None
        if args.autoencoder and embedding is None:
            return True
        cold = job.language_model(None, args.out / "cold.csv", cold=None) if args.compare else []
        rows = None if cold is None else job.language_model(embedding, args.out / "metrics.csv", cold=cold)
    except partita.Preempted:  # the engine has saved, and has said so
        return job.interrupts.requested
    if cold and rows and job.speaks:
        print(gain(rows, cold, job.baseline.bytes_per_token), flush=True)
    return rows is None


def main() -> int:
    return run_on_ranks("pretrain_lm.py", lambda: parse_arguments((__doc__ or "").split("\n\n")[0]), run)


if __name__ == "__main__":
    sys.exit(main())
