"""A program whose ranks train with Trainer and are killed at a chosen effect on the files of a save.

It imports the libraries once and forks each job's ranks. Reads requests from standard input, a line of JSON each, and
answers each with a line.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

EFFECTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "shutil.rmtree")
IMPORTED = ("torch._dynamo", "hf_subjects", "partita.integrations.huggingface.trainer", "transformers.models.gpt2")
JOB_S = 90  # more than any job needs


class Counter:
    """Counts what this process does to files of a folder; the process ends at one of these effects, before it."""

    def __init__(self, folder: str, fatal: int | None) -> None:
        self.folder, self.fatal = os.path.realpath(folder), fatal
        self.count = 0
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in EFFECTS or not self._is_ours(event, args):
            return
        self.count += 1
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def _is_ours(self, event: str, args: tuple[Any, ...]) -> bool:
        if event == "open" and (not isinstance(args[2], int) or not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return False
        if isinstance(args[0], int):
            return event == "os.truncate"
        name = os.fsdecode(args[0])
        in_folder = any(isinstance(part, int) and part > 2 for part in args[1:])  # relative to an open folder
        return in_folder or os.path.realpath(name).startswith(self.folder)


def train(rank: int, world_size: int, request: dict[str, Any], answers: str) -> None:
    """One rank: goes on from the last checkpoint as programs do, to the end."""
    import torch.distributed as dist
    import transformers
    from hf_subjects import Subject, arguments, job, logged, model_of, pad, texts, whole_weights
    from transformers.trainer_utils import get_last_checkpoint

    sys.stdout = sys.stderr
    timeout = timedelta(seconds=20)
    dist.init_process_group(
        "gloo", init_method=f"file://{answers}/store", rank=rank, world_size=world_size, timeout=timeout
    )
    folder = request["folder"]
    with job():
        given = arguments(
            folder,
            max_steps=request["steps"],
            save_strategy="steps",
            save_steps=1,
            save_total_limit=request["limit"],
            optim="adamw_torch",
            learning_rate=0.01,
        )
        subject = Subject(**request["subject"])
        trainer = subject.trainer(
            transformers.Trainer, model_of("gpt2", resid_pdrop=0.1), given, train_dataset=texts(24), data_collator=pad
        )
        last = get_last_checkpoint(folder)
        counter = Counter(folder, request["fatal"][rank])
        trainer.train(resume_from_checkpoint=last)
        answer = {
            "began": 0 if last is None else int(last.rpartition("-")[2]),
            "effects": counter.count,
            "loss": logged(trainer, "step", "loss"),
            "sums": {name: value.double().sum().item() for name, value in whole_weights(trainer).items()},
        }
    Path(answers, f"{rank}.json").write_text(json.dumps(answer))


def fork(rank: int, world_size: int, request: dict[str, Any], answers: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        train(rank, world_size, request, answers)
        code = 0
    except BaseException:
        Path(answers, f"{rank}.error").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def wait_for(pids: list[int]) -> tuple[list[int], list[float]]:
    """Exit codes (negative: the signal), and how long after the first end each rank ended, in seconds."""
    codes, ends = [0] * len(pids), [0.0] * len(pids)
    left, began = set(range(len(pids))), time.monotonic()
    while left:
        if time.monotonic() - began > JOB_S:
            for rank in left:
                os.kill(pids[rank], signal.SIGKILL)
        for rank in sorted(left):
            pid, status = os.waitpid(pids[rank], os.WNOHANG)
            if pid:
                left.discard(rank)
                codes[rank], ends[rank] = os.waitstatus_to_exitcode(status), time.monotonic()
        time.sleep(0.02)
    return codes, [end - min(ends) for end in ends]


def main() -> None:
    import torch

    torch.set_num_threads(1)
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryDirectory() as answers:
            world_size = request["world_size"]
            codes, late = wait_for([fork(rank, world_size, request, answers) for rank in range(world_size)])
            found = {
                path.name: path.read_text() for path in Path(answers).iterdir() if path.suffix in (".json", ".error")
            }
        answer: dict[str, Any] = {"codes": codes, "late": late}
        answer["results"] = [json.loads(found.get(f"{rank}.json", "null")) for rank in range(world_size)]
        answer["errors"] = [found.get(f"{rank}.error", "") for rank in range(world_size)]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
