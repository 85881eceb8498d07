"""Talks to a causal language model in a terminal: one that finetune_chat.py has made, or another of transformers.

    python examples/chat.py runs/chat
    echo "What is AI?" | python examples/chat.py runs/chat --temperature 0

/reset begins anew, /quit (or the end of the input) ends. Ctrl-C stops an answer.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from typing import Any

import torch
from common.arguments import Parser, device, number, seed
from common.job import JobError, run_job
from dialogue.dialogues import Message, encode_prompt
from dialogue.generation import Sampling, answer_batch
from dialogue.model import context_of, ends_of, open_model

RESET, QUIT = "/reset", "/quit"


class TokenPrinter:
    """A streamer of transformers' `generate()`: prints an answer as its tokens come.

    Characters of several tokens appear when they are complete.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._printed = 0
        self._is_prompt = True

    def put(self, ids: torch.Tensor) -> None:
        if self._is_prompt:  # what `generate()` begins with
            self._is_prompt = False
            return
        self._ids += ids.flatten().tolist()
        self._print(self._text(), is_whole=False)

    def end(self) -> None:
        self._print(self._text(), is_whole=True)
        print(flush=True)

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True)).lstrip()

    def _print(self, text: str, *, is_whole: bool) -> None:
        if is_whole or not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[self._printed :], end="", flush=True)
            self._printed = max(self._printed, len(text))


def parse_arguments() -> argparse.Namespace:
    parser = Parser((__doc__ or "").split("\n\n")[0])
    parser.add_argument("path", help="a folder (of finetune_chat.py, or of transformers), or a hub's name")
    rate = number(float, 0.0)
    parser.add_argument("--temperature", type=rate, default=0.7, help="lower is more predictable; 0: no chance at all")
    parser.add_argument(
        "--top-p", type=number(float, 0.0, open_end=True), default=0.95, help="draw among the likeliest"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of what is drawn")
    parser.add_argument("--answer-tokens", type=number(int, 1), default=40, help="the longest answer")
    parser.add_argument("--system", metavar="TEXT", help="a system message at the beginning")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, choices=("cpu", "cuda"), default=best, help="what computes")
    return parser.parse_args()


def lines(prompt: str) -> Iterator[str]:
    """What the user types, or what comes through a pipe, without empty lines."""
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            print(prompt, end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


class Conversation:
    """A history that grows by what is said. The oldest tokens are left out once it is too long."""

    def __init__(self, model: Any, tokenizer: Any, args: argparse.Namespace) -> None:
        self._model, self._tokenizer, self._args = model, tokenizer, args
        self._ends = ends_of(model, tokenizer)
        self._room = context_of(model) - args.answer_tokens
        if self._room < 1:
            raise JobError(f"--answer-tokens {args.answer_tokens}: the model sees {context_of(model)} tokens at once")
        self._answers = 0
        self._messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        system = self._args.system
        self._messages = [{"role": "system", "content": system}] if system else []

    def say(self, text: str) -> None:
        """Prints the answer, and remembers both."""
        self._messages.append({"role": "user", "content": text})
        args, seed = self._args, f"{self._args.seed}/{self._answers}"
        self._answers += 1
        sampling = Sampling(args.answer_tokens, args.temperature, args.top_p)
        prompt = encode_prompt(self._tokenizer, self._messages, self._room)
        printer = TokenPrinter(self._tokenizer)
        try:
            (answer,) = answer_batch(self._model, [prompt], [seed], sampling, self._ends, streamer=printer)
        except KeyboardInterrupt:
            print(" ...", flush=True)
            self._messages.pop()
            return
        answered = str(self._tokenizer.decode(answer.ids, skip_special_tokens=True)).strip()
        self._messages.append({"role": "assistant", "content": answered})


def job() -> bool:
    args = parse_arguments()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # who reads the answers may have gone
    model, tokenizer = open_model(args.path)
    conversation = Conversation(model.to(args.device), tokenizer, args)
    if sys.stdin.isatty():
        print(f"{args.path}: {RESET} begins anew, {QUIT} ends, Ctrl-C stops an answer")
    for line in lines("> "):
        if line == QUIT:
            break
        if line == RESET:
            conversation.reset()
            print("(begins anew)", flush=True)
        elif line.startswith("/"):
            print(f"({line.split()[0]} is unknown: {RESET} begins anew, {QUIT} ends)", flush=True)
        else:
            conversation.say(line)
    return False


def main() -> int:
    return run_job("chat.py", job)


if __name__ == "__main__":
    sys.exit(main())
