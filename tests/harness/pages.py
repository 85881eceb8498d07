"""The code blocks of README.md and docs/, and what a reader does with them.

Blocks are taken in their order, in one folder. A python block that begins with an import begins a program, another one
continues it. A program is saved as train.py and run by the commands of the `sh` block behind it, or by `python`. A JSON
or YAML block is a config. Other blocks are pictures. A comment `<!-- test: ... -->` before a block says otherwise:

    compiled only, REASON    python: not run
    not run, REASON          sh
    no config                JSON and YAML: not read as a config
    name NAME                saved under this name
    shown                    it is in the output of the command before; numbers may be others, and … is anything
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from warm_python import WarmPython

ROOT = Path(__file__).parents[2]
FENCE = re.compile(
    r"^(?P<indent> *)(?:<!-- test: (?P<test>[^\n]*?) -->\n\s*)?```(?P<language>[\w-]*)[^\n]*\n(?P<text>.*?)^ *```$",
    re.DOTALL | re.M,
)
NUMBER = re.compile(r"\d[\d.,]*(?:e[-+]?\d+)?")
SHELL = ("sh", "bash")
ELSEWHERE = {"bash", "cd", "cmake", "export", "git", "jupyter", "make", "mkdir", "pip", "pytest", "sbatch", "squeue"}
ELSEWHERE |= {"srun", "ssh", "tensorboard"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, without its indentation."""

    line: int
    language: str
    test: str
    text: str

    @property
    def begins_program(self) -> bool:
        return self.text.startswith(("import ", "from "))


def pages() -> list[str]:
    """README.md and what is in docs/, by paths from the root."""
    found = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    found = []
    for match in FENCE.finditer(text):
        lines = match["text"].splitlines()
        plain = "".join(line.removeprefix(match["indent"]) + "\n" for line in lines)
        found.append(Block(text.count("\n", 0, match.start("text")), match["language"], match["test"] or "", plain))
    return found


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block: words, without comments; lines that end in a backslash are joined."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        if words:
            yield words


class Reader:
    """Does in a folder what a page says. `outputs` are those of its commands, in their order."""

    def __init__(self, page: str, folder: Path, python: WarmPython) -> None:
        self.folder, self.page = folder, page
        self.outputs: list[str] = []
        self._python = python
        self._program, self._name, self._is_due = "", "train.py", False

    def read(self) -> None:
        for block in blocks(self.page):
            print(f"{self.page}:{block.line} {block.language} {block.test}")
            if block.test == "shown":
                self._compare(block)
            elif block.language == "python":
                self._take_program(block)
            elif block.language in SHELL:
                self._take_commands(block)
            elif block.language in ("json", "yaml"):
                self._take_config(block)
        self._run_if_due()

    def _take_program(self, block: Block) -> None:
        if block.test.startswith("compiled only"):
            compile(block.text, f"{self.page}:{block.line}", "exec", dont_inherit=True)
            return
        if block.begins_program:
            self._run_if_due()
            self._program, self._name = "", _name(block) or "train.py"
        self._program += block.text + "\n"
        (self.folder / self._name).write_text(self._program)
        self._is_due = True

    def _take_commands(self, block: Block) -> None:
        if block.test.startswith("not run"):
            return
        for words in commands(block):
            if words[0] in ("python", "torchrun"):
                script = next(word for word in words if word.endswith(".py"))
                if script.startswith(("examples/", "bench/")):
                    assert (ROOT / script).exists(), f"{self.page}:{block.line}: there is no {script}"
                else:
                    self._run(words)
            elif words[0] == "partita":
                if words[1] != "run":
                    self._run_if_due()
                self._run(words)
            else:
                assert words[0] in ELSEWHERE, f"{self.page}:{block.line}: what is {words[0]}?"

    def _take_config(self, block: Block) -> None:
        from partita.config import load_config

        path = self.folder / (_name(block) or f"config.{block.language}")
        path.write_text(block.text)
        if block.test != "no config":
            load_config(path)

    def _compare(self, block: Block) -> None:
        self._run_if_due()
        said = NUMBER.sub("0", self.outputs[-1])
        for line in filter(None, map(str.strip, block.text.splitlines())):
            like = ".*".join(map(re.escape, NUMBER.sub("0", line).split("…")))
            assert re.search(like, said), f"{self.page}:{block.line}: not said: {line}\n{self.outputs[-1]}"

    def _run_if_due(self) -> None:
        if self._is_due:
            self._run(["python", self._name])

    def _run(self, words: list[str]) -> None:
        self._is_due = False
        command = self._command(words)
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=300, check=False
        )
        self.outputs.append(done.stdout + done.stderr)
        assert done.returncode == 0, f"{self.page}: {shlex.join(words)}\n{self.outputs[-1]}"

    def _command(self, words: list[str]) -> list[str]:
        first, *rest = words
        if first == "python":
            return [*self._python.command, *rest]
        if first == "partita":
            return [*self._python.command, "-c", "import partita.cli; partita.cli.main()", *rest]
        script = next(index for index, word in enumerate(rest) if word == "-m" or word.endswith(".py"))
        return [*self._python.torchrun("--standalone", *rest[:script]), *rest[script:]]


def _name(block: Block) -> str:
    return block.test.removeprefix("name ") if block.test.startswith("name ") else ""
