"""What a pretraining leaves behind: a description of the model, a sample, a summary, a picture, the gain."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import partita
import torch
from common.job import JobError
from common.report import Curve, Row, plot_losses
from torch import Tensor

from language.models import ModelConfig
from language.tokens import BPE, Bytes, Tokenizer
from language.training import bits_per_byte

DESCRIPTION, TOKENIZER = "model.json", "tokenizer.json"
COMPARED = {"architecture": "--model", "tokenizer": "--tokenizer", "vocabulary": "--vocabulary"}
COMPARED |= {"pretrained_embedding": "--autoencoder"}
COMPARED_SIZES = ("context", "layers", "heads", "width", "embedding")


@dataclass(frozen=True)
class Baseline:
    """The unigram entropy of the validated windows. bytes_per_token: of the same windows."""

    nats: float
    bytes_per_token: float

    def __str__(self) -> str:
        bits = bits_per_byte(self.nats, self.bytes_per_token)
        return f"{self.nats:.3f} nats per token = {bits:.3f} bits per byte"

    def beaten_by(self, val_loss: float) -> str:
        gain = self.nats - val_loss
        by = f"{abs(gain):.3f} nats per token = {bits_per_byte(abs(gain), self.bytes_per_token):.3f} bits per byte"
        if gain > 0:
            return f"beats the unigram entropy ({self}) by {by}"
        return f"does not beat the unigram entropy ({self}): it is {by} above"


def describe(args: argparse.Namespace, sizes: ModelConfig, *, pretrained_embedding: bool) -> dict[str, Any]:
    """What model.json says: enough to build the model, and to find what was held out."""
    return {
        "architecture": args.model,
        "sizes": asdict(sizes),
        "tokenizer": args.tokenizer,
        "vocabulary": args.vocabulary,
        "pretrained_embedding": pretrained_embedding,
        "text": {"file": None if args.text is None else str(args.text.resolve()), "megabytes": args.megabytes},
    }


def write_description(folder: Path, description: dict[str, Any], tokenizer: Tokenizer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    if isinstance(tokenizer, BPE):
        (folder / TOKENIZER).write_text(tokenizer.definition, encoding="utf-8")


def read_description(folder: Path) -> dict[str, Any] | None:
    """None where there is none."""
    try:
        read = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return read if isinstance(read, dict) else None


def read_tokenizer(folder: Path, kind: str) -> Tokenizer:
    return BPE.read(folder / TOKENIZER) if kind == BPE.kind else Bytes()


def require_same_run(folder: Path, description: dict[str, Any]) -> None:
    """Refuses checkpoints of a run that these options do not go on from: of another model, or of another text.

    With another text the model could be validated on what it has been trained on.
    """
    before, now = (_options(read or {}) for read in (read_description(folder), description))
    for option, value in before.items():
        if option in now and now[option] != value:
            raise JobError(
                f"the run in {folder} has {option[2:]} {value}, this one {now[option]}: "
                f"give the same {option}, or another folder with --checkpoints DIR"
            )


def _options(description: dict[str, Any]) -> dict[str, Any]:
    """The options that a run keeps, with their values. A text may have moved to another folder."""
    sizes, text = description.get("sizes") or {}, description.get("text") or {}
    found = {option: description[key] for key, option in COMPARED.items() if key in description}
    found |= {f"--{name}": sizes[name] for name in COMPARED_SIZES if name in sizes}
    if "file" in text:
        found["--text"] = Path(text["file"]).name if text["file"] else "the standard library's"
    return found | {f"--{name}": text[name] for name in ("megabytes",) if name in text}


def generate(
    next_logits: Callable[[Tensor], Tensor], prompt: Tensor, length: int, *, context: int, temperature: float, seed: int
) -> list[int]:
    """The prompt and `length` tokens that the model thinks may follow; the same seed draws the same ones.

    Args:
        next_logits: from token ids [1, n] to logits [vocabulary] for what follows. Where ranks share the parameters
            out, all of them call `generate`.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = prompt.tolist()
    for _ in range(length):
        logits = next_logits(torch.tensor([ids[-context:]])).float().cpu()
        ids.append(int(torch.multinomial(torch.softmax(logits / temperature, 0), 1, generator=generator)))
    return list(ids)


def sample(engine: partita.Engine, args: argparse.Namespace, tokenizer: Tokenizer) -> str:
    """All ranks call it."""
    ids = generate(
        lambda tokens: engine.eval_batch([tokens.to(engine.device)])[0, -1],
        tokenizer.encode(args.prompt.encode()),
        args.sample_length,
        context=args.context,
        temperature=args.temperature,
        seed=args.seed,
    )
    return tokenizer.decode(ids).decode(errors="replace")


def title(engine: partita.Engine, architecture: str) -> str:
    """Of a picture and a summary."""
    millions = sum(p.numel() for p in engine.module.parameters()) / 1e6
    ranks = "1 rank" if engine.world_size == 1 else f"{engine.world_size} ranks"
    stage = engine.config.zero_optimization.stage
    precision = "fp16" if engine.config.fp16.enabled else "bf16" if engine.config.bf16.enabled else "fp32"
    return f"{architecture.upper()}, {millions:.2f} M parameters, {precision}, ZeRO stage {stage}, {ranks}"


def summary(engine: partita.Engine, what: str, last: Row, baseline: Baseline) -> str:
    """A line that sums the run up."""
    assert last.val_loss is not None
    loss = "" if last.loss is None else f"loss {last.loss:.3f}, "
    return (
        f"{what}: {last.step} steps, {engine.client_state['tokens'] / 1e6:.2f} M tokens; {loss}"
        f"validation {last.val_loss:.3f} nats = {last.bits_per_byte:.3f} bits per byte; "
        f"{baseline.beaten_by(last.val_loss)}"
    )


def gain(rows: list[Row], cold: list[Row], bytes_per_token: float) -> str:
    """Two lines: the gain over a cold start at equal steps, and the steps that it saves."""
    ours = {row.step: row.val_loss for row in rows if row.val_loss is not None}
    theirs = {row.step: row.val_loss for row in cold if row.val_loss is not None}
    both = sorted(ours.keys() & theirs.keys() - {0})
    if not both:
        return "no step was validated in both runs: the autoencoder's gain is not known"
    shown = [both[0], both[len(both) // 2], both[-1]] if len(both) > 2 else both
    at = "; ".join(f"step {step}: {ours[step]:.3f}, cold {theirs[step]:.3f}" for step in shown)
    last = both[-1]
    won = theirs[last] - ours[last]
    word = "gain" if won > 0 else "no gain: loss"
    bits = bits_per_byte(abs(won), bytes_per_token)
    first = next((step for step in both if ours[step] <= theirs[last]), None)
    saved = (
        f"; it has the cold start's {theirs[last]:.3f} by step {first} of {last}" if first not in (None, last) else ""
    )
    return (
        f"validation with the autoencoder's embedding: {at}\n"
        f"{word} over a cold start at step {last}: {abs(won):.3f} nats per token = {bits:.3f} bits per byte{saved}"
    )


def plot(rows: list[Row], cold: list[Row], baseline: Baseline, heading: str, file: Path) -> None:
    """The losses over steps, with the unigram entropy and, where there is one, the cold start."""
    others = [Curve("validation of a cold start", [(r.step, r.val_loss) for r in cold if r.val_loss is not None])]
    plot_losses(
        rows,
        heading,
        file,
        others=others if cold else [],
        baseline=("unigram entropy", baseline.nats),
        bytes_per_token=baseline.bytes_per_token,
    )
