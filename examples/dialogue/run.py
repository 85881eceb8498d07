"""The phases of finetune_chat.py: a first measurement, fine-tuning, rounds of self-training.

[Note: going on] Where a run is follows from the engine's step and from `client_state`: the phases that are measured,
the feedback set of the next round (its digest; the answers are in a file), and the losses so far. What a step trains
on and what is drawn are functions of seed, step and weights. So a run that was killed amid a phase's end measures and
draws the same once more, one that was killed in a round reads the answers from the file, and both end as if nothing
had been.
"""

from __future__ import annotations

import random
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import partita
import torch
from common.job import JobError, sum_over_ranks
from common.terminal import Interrupts, Progress
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from dialogue.dialogues import Encoded, History, encode, encode_prompt, shorten
from dialogue.generation import shared_out
from dialogue.packing import Arrangement, Rows
from dialogue.report import Phase, line_of
from dialogue.self_training import (
    Share,
    plan_step,
    read_feedback,
    rows_of_step,
    train_step,
    write_feedback,
)
from dialogue.trial import Asking, Drawing, Trial, draw_feedback, measure


class WholeModel(Protocol):
    """A block with a model that each rank uses as it likes. All ranks enter and leave together."""

    def __call__(self) -> AbstractContextManager[Any]: ...


@dataclass(frozen=True)
class Material:
    """The dialogues as tokens; `histories` are what the rounds draw answers to."""

    train: list[Encoded]
    histories: list[History]
    trial: Trial


@dataclass(frozen=True)
class Schedule:
    """Steps of the phases, and what a step is."""

    steps: int
    rounds: int
    round_steps: int
    rows: int  # of the data in a step, over all ranks
    histories: int  # that answers are drawn to, at most; the same in all rounds
    alpha: float
    log_every: int
    seed: int

    @property
    def phases(self) -> list[str]:
        return ["before", "fine-tuning", *(f"round {number}" for number in range(1, self.rounds + 1))]

    @property
    def total(self) -> int:
        return self.end(self.rounds + 1)

    def end(self, phase: int) -> int:
        """The step after which a phase is over."""
        return 0 if phase == 0 else self.steps + (phase - 1) * self.round_steps


class ChatRun:
    """Trains and measures, phase by phase.

    Args:
        whole: gives the model for measuring and drawing.
        out: the folder of the feedback sets.

    Attributes:
        phases: what was measured so far.
        texts: greedy answers to the held-out histories, of the last measurement.
    """

    def __init__(
        self,
        engine: partita.Engine,
        material: Material,
        schedule: Schedule,
        asking: Asking,
        drawing: Drawing,
        arrangement: Arrangement,
        whole: WholeModel,
        out: Path,
    ) -> None:
        self._engine, self._material, self._schedule, self._out = engine, material, schedule, out
        self._asking, self._drawing, self._arrangement, self._whole = asking, drawing, arrangement, whole
        self._data = Rows(material.train, arrangement, f"{schedule.seed}/data")
        self._speaks = engine.global_rank == 0
        self.phases = [Phase(**phase) for phase in engine.client_state.get("phases", [])]
        self.texts: list[str] = []

    @property
    def is_complete(self) -> bool:
        return len(self.phases) > self._schedule.rounds + 1

    def run(self, progress: Progress, interrupts: Interrupts) -> bool:
        """All phases that are left; True if Ctrl-C ended it earlier."""
        for phase in range(len(self.phases), self._schedule.rounds + 2):
            started = time.perf_counter()
            rows = self._generated_rows(phase) if phase >= 2 else None
            stopped = self._train(phase, rows, progress, interrupts)
            self._end(phase, progress, started)
            if stopped:
                return True
        return False

    # -- the feedback set

    def _feedback_file(self, number: int) -> Path:
        """Of the answers that round `number` trains on."""
        return self._out / f"feedback-{number}.jsonl"

    def _draw(self, model: Any, phase: int, progress: Progress) -> dict[str, Any]:
        """Answers of the model after a phase, the best kept for the next one; returns what `Phase` says of them."""
        asked, name = self._histories(), self._schedule.phases[phase]
        count = len(asked) * self._drawing.candidates
        progress.show(self._engine.global_steps, f"{name}: draws {count:,} answers to {len(asked):,} histories")
        longest = self._arrangement.context - self._asking.max_new_tokens
        prompts = [encode_prompt(self._asking.tokenizer, history.messages, longest) for history in asked]
        drawn = draw_feedback(model, asked, prompts, f"{self._schedule.seed}/{name}", self._drawing, self._asking)
        (digest,) = shared_out(1, 1, lambda _: [write_feedback(drawn.samples, self._feedback_file(phase))])
        self._engine.client_state["feedback"] = digest
        kept = len(drawn.samples)
        return {
            "histories": drawn.histories,
            "kept": kept,
            "score_kept": sum(sample.score for sample in drawn.samples) / kept if kept else None,
            "score_drawn": drawn.score_drawn,
            "score_greedy": drawn.score_greedy,
        }

    def _histories(self) -> list[History]:
        """Those that answers are drawn to."""
        everything = self._material.histories
        choice = random.Random(f"{self._schedule.seed}/histories")
        return choice.sample(everything, min(self._schedule.histories, len(everything)))

    def _generated_rows(self, phase: int) -> Rows | None:
        """What a round trains on beside the data; None if no answer was worth it."""
        file, digest = self._feedback_file(phase - 1), self._engine.client_state["feedback"]
        (samples,) = shared_out(1, 1, lambda _: [read_feedback(file, digest)])
        encoded = [encode(self._asking.tokenizer, sample.messages, last_only=True) for sample in samples]
        short, _ = shorten(encoded, self._arrangement.context)
        seed = f"{self._schedule.seed}/generated/{phase}"
        return Rows(short, self._arrangement, seed) if short else None

    # -- training

    def _train(self, phase: int, generated: Rows | None, progress: Progress, interrupts: Interrupts) -> bool:
        """Steps up to the phase's end; True if Ctrl-C ended it earlier."""
        engine, schedule = self._engine, self._schedule
        first, last = schedule.end(phase - 1) if phase else 0, schedule.end(phase)
        share = Share(engine.global_rank, engine.world_size, engine.gradient_accumulation_steps())
        if engine.global_steps <= first:
            engine.client_state["losses"] = torch.zeros(4, dtype=torch.float64)
        losses = engine.client_state["losses"] = engine.client_state["losses"].to(engine.device)
        engine.train()
        shown, before, started = engine.global_steps, losses.clone(), time.perf_counter()
        for step in range(engine.global_steps, last):
            number = step - first if phase >= 2 else step
            of_step = rows_of_step(self._data, generated, step, number, schedule.rows)
            plan = plan_step(of_step, share, self._asking.ends.pad, engine.module.dtype)
            train_step(engine, plan, schedule.alpha, losses)
            progress.step()
            if (step + 1) % schedule.log_every and step + 1 != last:
                continue
            _, stop = sum_over_ranks(engine, 0.0, float(interrupts.ends_loop))
            rate = (step + 1 - shown) / (time.perf_counter() - started)
            progress.show(step + 1, f"{schedule.phases[phase]}: {_in_a_line(losses - before)} {rate:.1f} steps/s")
            if stop:
                return True
            shown, before, started = step + 1, losses.clone(), time.perf_counter()
        return False

    # -- measuring

    def _end(self, phase: int, progress: Progress, started: float) -> None:
        """Measures and draws, says it, and saves. `started`: when the phase did, in seconds."""
        engine, schedule = self._engine, self._schedule
        with self._whole() as model:
            found = measure(model, self._material.trial, self._drawing, self._asking, self._arrangement)
            numbers = self._draw(model, phase, progress) if phase else {}
        self.texts = found.texts
        means = _means(engine.client_state["losses"])
        result = Phase(
            name=schedule.phases[phase],
            steps=engine.global_steps,
            perplexity=found.perplexity,
            score=found.score,
            token_f1=found.token_f1,
            seconds=time.perf_counter() - started,
            loss_data=means[0],
            loss_generated=means[1],
            **numbers,
        )
        if self._speaks:
            tqdm.write(line_of(result, self.phases[-1] if self.phases else None))
        self.phases.append(result)
        engine.log({name: value for name, value in asdict(result).items() if isinstance(value, float)})
        engine.client_state["phases"] = [asdict(done) for done in self.phases]
        settings = engine.config.checkpoint
        if settings.dir is not None and engine.global_steps:
            engine.save_checkpoint(settings.dir)


def _means(losses: Tensor) -> tuple[float | None, float | None]:
    """Of the data and of generated answers, from (sum, tokens, sum, tokens)."""
    data, data_tokens, generated, generated_tokens = losses.tolist()
    return (
        data / data_tokens if data_tokens else None,
        generated / generated_tokens if generated_tokens else None,
    )


def _in_a_line(losses: Tensor) -> str:
    data, generated = _means(losses)
    return f"loss {data:.3f}" + (f" generated {generated:.3f}" if generated is not None else "")


def require_same_settings(engine: partita.Engine, settings: dict[str, str]) -> None:
    """Notes the settings in `client_state`, or compares them with those of the checkpoint that the run goes on from.

    Raises:
        JobError: one is another now; names it.
    """
    before = engine.client_state.setdefault("settings", settings)
    for name, value in settings.items():
        if before.get(name) != value:
            raise JobError(
                f"the checkpoint {engine.resumed_from} is of a run with another {name}: {before.get(name)}, and not "
                f"{value}; give that again, or another folder with --checkpoints DIR to begin anew"
            )
