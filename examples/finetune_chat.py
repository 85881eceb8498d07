"""Fine-tunes a causal language model on dialogues, then lets it train on the best of its own answers, round by round.

    torchrun --nproc-per-node 2 examples/finetune_chat.py
    python examples/finetune_chat.py --model FOLDER --data dialogues.jsonl --stage 3 --rounds 2

Saves checkpoints into --checkpoints, and goes on from the last one: after Ctrl-C, a crash, or with other ranks.
Writes into --out a folder that transformers' from_pretrained opens (examples/chat.py talks to it), phases.json with
what was measured, and phases.png.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import math
import signal
import sys
from typing import Any

import partita
import torch.distributed as dist
from common.job import FAILED, JobError, config_from, device_of_this_rank, run_on_ranks
from common.terminal import Interrupts, Progress
from dialogue.dialogues import (
    Dialogue,
    encode,
    encode_prompt,
    histories,
    hold_out,
    read_dialogues,
    shorten,
    without_repeats,
)
from dialogue.generation import gathered, separate
from dialogue.model import context_of, ends_of, make_model, write_beside_weights
from dialogue.options import parse_arguments
from dialogue.packing import Arrangement
from dialogue.report import plot_phases, table, write_phases
from dialogue.run import ChatRun, Material, Schedule, require_same_settings
from dialogue.scores import score_named
from dialogue.trial import Asking, Drawing, Trial
from partita.checkpoint import CheckpointError
from partita.files import file_to_write

WARMUP = 0.05  # of the steps of fine-tuning
FILES = ("model.safetensors", "config.json", "tokenizer.json", "engine.json", "phases.json", "phases.png")
# What a checkpoint's run and this one have alike, as the steps of the one go on from those of the other.
FIXED = ("held_out", "context", "padding", "model", "vocabulary", "steps", "batch_size", "round_steps", "seed", "alpha")
FIXED += ("histories", "candidates", "temperature", "top_p", "score", "threshold", "keep_answers", "answer_tokens")


# -- what is trained


def engine_config(args: argparse.Namespace) -> dict[str, Any]:
    """The engine's config: from the command line, then from --config."""
    config: dict[str, Any] = {
        "train_batch_size": args.batch_size,
        "gradient_accumulation_steps": args.accumulate,
        "optimizer": {"type": "AdamW", "params": {"lr": args.lr, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "scheduler": {  # after the fine-tuning it stays where it is
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": max(3, args.steps),
                "warmup_num_steps": max(2, round(WARMUP * args.steps)),
                "warmup_type": "linear",
                "cos_min_ratio": args.round_lr,
            },
        },
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": args.stage},
        "seed": args.seed,
        "steps_per_print": 0,  # the progress bar says it
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


def make_engine(args: argparse.Namespace, model: Any) -> partita.Engine:
    try:
        engine, *_ = partita.initialize(model.to(device_of_this_rank(args.device)), config=engine_config(args))
    except CheckpointError as error:  # the folder, or what is in it, is not for this run
        raise JobError(f"{error} (--checkpoints DIR takes another folder)", FAILED) from None
    except ValueError as error:  # a ConfigError, or what the config asks for does not fit the model
        raise JobError(str(error)) from None
    assert isinstance(engine, partita.Engine)
    return engine


def load_dialogues(args: argparse.Namespace) -> list[Dialogue]:
    """Each dialogue of the file once."""
    everything = read_dialogues(args.data)[: args.limit]
    once = without_repeats(everything)
    if dist.get_rank() == 0:
        repeats = len(everything) - len(once)
        print(f"{len(once):,} dialogues from {args.data}, {repeats:,} repeats left out", file=sys.stderr, flush=True)
    return once


def material_of(args: argparse.Namespace, train: list[Dialogue], held_out: list[Dialogue], tokenizer: Any) -> Material:
    """Tokens of all dialogues; says how many were cut off."""
    encoded = [[encode(tokenizer, dialogue.messages) for dialogue in part] for part in (train, held_out)]
    (tokens, cut), (held_tokens, held_cut) = (shorten(part, args.context) for part in encoded)
    if cut + held_cut and dist.get_rank() == 0:
        what = (
            f"{cut + held_cut} dialogues have more than --context {args.context} tokens: their beginnings are left out"
        )
        print(what, file=sys.stderr, flush=True)
    asked = histories(held_out)
    prompts = [encode_prompt(tokenizer, history.messages, args.context - args.answer_tokens) for history in asked]
    return Material(tokens, histories(train), Trial(held_tokens, asked, prompts))


def settings_of(args: argparse.Namespace, dialogues: list[Dialogue]) -> dict[str, str]:
    digest = hashlib.sha256("\n".join(dialogue.key for dialogue in dialogues).encode()).hexdigest()
    options = {f"--{name.replace('_', '-')}": str(getattr(args, name)) for name in FIXED}
    return {"content of --data": digest[:12], **options}


# -- the run


def make_run(
    args: argparse.Namespace, engine: partita.Engine, twin: Any, tokenizer: Any, material: Material
) -> ChatRun:
    """The phases, as the command line wants them; `twin`: the model that answers, None for the engine's own."""
    schedule = Schedule(
        steps=args.steps,
        rounds=args.rounds,
        round_steps=args.round_steps,
        rows=args.batch_size,
        histories=args.histories,
        alpha=args.alpha,
        log_every=args.log_every,
        seed=args.seed,
    )
    asking = Asking(tokenizer, ends_of(engine.module, tokenizer), args.answer_tokens, args.generate_batch)
    drawing = Drawing(
        candidates=args.candidates,
        temperature=args.temperature,
        top_p=args.top_p,
        score=score_named(args.score),
        threshold=-math.inf if args.threshold is None else args.threshold,
        better_only=args.keep_answers == "better",
    )
    arrangement = Arrangement(args.context, packs=not args.padding)
    whole = functools.partial(gathered, engine)
    if twin is not None:
        whole = functools.partial(separate, engine, twin, int(args.bucket_mb * 2**20))
    return ChatRun(engine, material, schedule, asking, drawing, arrangement, whole, args.out)


def run(args: argparse.Namespace) -> bool:
    """The whole job; True if Ctrl-C cut it short."""
    parts = dist.get_world_size() * args.accumulate
    if args.batch_size % parts:
        raise JobError(f"--batch-size {args.batch_size} rows do not divide into ranks x --accumulate = {parts} parts")
    score_named(args.score)
    dialogues = load_dialogues(args)
    train, held_out = hold_out(dialogues, args.held_out, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        file_to_write(args.out / name)
    model, tokenizer = make_model(args.model, train, args.vocabulary, args.seed)
    if args.context > context_of(model):
        raise JobError(f"--context {args.context} is more than the {context_of(model)} tokens that the model sees")
    material = material_of(args, train, held_out, tokenizer)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # unless the engine takes it: after the last step it ends nothing
    twin = copy.deepcopy(model).to(device_of_this_rank(args.device)) if args.generator == "separate" else None
    engine = make_engine(args, model)
    settings = settings_of(args, dialogues)
    require_same_settings(engine, settings)
    chat = make_run(args, engine, twin, tokenizer, material)
    total = args.steps + args.rounds * args.round_steps
    if not begins(engine, chat, total):
        engine.destroy()
        return False
    interrupts = Interrupts(saves=engine.config.checkpoint.dir is not None, speaks=engine.global_rank == 0)
    try:
        with Progress(total, done=engine.global_steps, speaks=engine.global_rank == 0) as progress:
            interrupted = chat.run(progress, interrupts)
    except partita.Preempted:  # the engine has saved, and has said so
        engine.destroy()
        return interrupts.requested
    save_results(engine, args, chat, tokenizer, material, settings)
    engine.destroy()
    return interrupted


def begins(engine: partita.Engine, chat: ChatRun, total: int) -> bool:
    """One line on rank 0 if the run goes on from a checkpoint; False if nothing is left to do."""
    if engine.resumed_from is None:
        return True
    text = f"goes on from {engine.resumed_from}, step {engine.global_steps} of {total}, {len(chat.phases)} phases done"
    if chat.is_complete:
        text = (
            f"complete already: {engine.resumed_from} is at step {engine.global_steps} of {total}; give more --rounds "
            "to go on, or another folder with --checkpoints DIR to begin anew"
        )
    if engine.global_rank == 0:
        print(text, file=sys.stdout if chat.is_complete else sys.stderr, flush=True)
    return not chat.is_complete


def save_results(
    engine: partita.Engine,
    args: argparse.Namespace,
    chat: ChatRun,
    tokenizer: Any,
    material: Material,
    settings: dict[str, str],
) -> None:
    """The model as a folder of Hugging Face's, and what was measured. All ranks call it."""
    engine.save_model(args.out)
    if engine.global_rank:
        return
    write_beside_weights(engine.module, tokenizer, ends_of(engine.module, tokenizer), args.out)
    engine.save_config(args.out / "engine.json")
    write_phases(chat.phases, settings, args.out / "phases.json")
    millions = sum(p.numel() for p in engine.module.parameters()) / 1e6
    stage = engine.config.zero_optimization.stage
    ranks = "1 rank" if engine.world_size == 1 else f"{engine.world_size} ranks"
    title = f"{engine.module.config.model_type}, {millions:.2f} M parameters, ZeRO stage {stage}, {ranks}"
    plot_phases(chat.phases, title, args.out / "phases.png")
    print(f"\n{table(chat.phases)}\n")
    for history, text in list(zip(material.trial.histories, chat.texts, strict=True))[: args.samples]:
        print(f"> {history.messages[-1]['content']}\n  {text}\n  (held-out answer: {history.references[0]})")
    print(f"\n{title}: results in {args.out}; python examples/chat.py {args.out} talks to it", flush=True)


def main() -> int:
    return run_on_ranks("finetune_chat.py", lambda: parse_arguments((__doc__ or "").split("\n\n")[0]), run)


if __name__ == "__main__":
    sys.exit(main())
