"""The chat example as a user runs it: what it learns, writes and says; killed and started again; who talks to it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import chat
import finetune_chat
import pytest
import torch
from dialogue.dialogues import Dialogue
from dialogue.model import tokenizer_of, train_tokenizer
from dialogue.options import parse_arguments
from language.evaluation import is_language_model
from partita.checkpoint import checkpoints
from ranks import RankError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

SCRIPT = Path(finetune_chat.__file__)
CHAT = Path(chat.__file__)
TWO_RANKS = ("--standalone", "--nproc-per-node", "2")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
MODEL = {"model_type": "llama", **SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64}
STEPS, ROUND_STEPS = 24, 3
TINY = [
    *("--steps", STEPS, "--rounds", 2, "--round-steps", ROUND_STEPS, "--batch-size", 4, "--lr", 1e-2, "--context", 48),
    *("--vocabulary", 300, "--held-out", 0.2, "--histories", 6, "--candidates", 3, "--answer-tokens", 8),
    *("--generate-batch", 4, "--keep-answers", "best", "--log-every", 1, "--samples", 1),
]
FILES = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
FEEDBACK = [f"feedback-{number}.jsonl" for number in (1, 2, 3)]
FILES |= {"chat_template.jinja", "engine.json", "phases.json", "phases.png", *FEEDBACK}
PHASES = ["before", "fine-tuning", "round 1", "round 2"]
# The example with a pause in its steps and draws, so that there is time to kill it.
SLOW = f"""
import sys, time
sys.path.insert(0, {str(SCRIPT.parent)!r})
import partita, dialogue.run
step, draw = partita.Engine.step, dialogue.run.draw_feedback
partita.Engine.step = lambda self: (step(self), time.sleep(0.15))[0]
dialogue.run.draw_feedback = lambda *given: (time.sleep(1), draw(*given))[1]
import finetune_chat
sys.exit(finetune_chat.main())
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Options for dialogues that can be learned in a few steps, some of several turns, and a config of a tiny model."""
    folder = tmp_path_factory.mktemp("given")
    lines = []
    for i in range(30):
        turns = [("user", f"is {i} big"), ("assistant", "yes" if i > 15 else "no")]
        if i % 3 == 0:
            turns += [("user", "say it"), ("assistant", "yes it is")]
        lines.append(json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}))
    (folder / "dialogues.jsonl").write_text("\n".join(lines))
    (folder / "model.json").write_text(json.dumps(MODEL))
    return ["--data", folder / "dialogues.jsonl", "--model", folder / "model.json"]


def run(*command: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    command = tuple(str(part) for part in command)
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, **options)


def finetune(options: list[Any]) -> str:
    """The job on a rank of a pool; what it prints."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}
    before, sys.argv = sys.argv, ["finetune_chat.py", *(str(option) for option in options)]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            finetune_chat.run(parse_arguments(""))
        return output.getvalue()
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, ranks: Any, given: list[Any]) -> dict[int, tuple[Path, str]]:
    """The folder and the output of a run on one rank (stage 0), and on two (stage 3)."""
    found = {}
    for count, stage in ((1, 0), (2, 3)):
        folder = tmp_path_factory.mktemp(f"on-{count}")
        output = ranks(count).run(finetune, [*given, *TINY, "--stage", stage, *places(folder)])
        found[count] = folder, output[0]
    return found


def places(folder: Path) -> list[Any]:
    return ["--out", folder / "out", "--checkpoints", folder / "kept", "--save-every", 2]


def phases(folder: Path) -> list[dict[str, Any]]:
    """Without the times."""
    found = json.loads((folder / "out" / "phases.json").read_text())["phases"]
    return [{name: value for name, value in phase.items() if name != "seconds"} for phase in found]


def test_it_learns_and_says_each_phase_beside_the_last(runs):
    folder, output = runs[2]
    before, tuned, *rounds = phases(folder)
    assert [phase["name"] for phase in (before, tuned, *rounds)] == PHASES
    assert tuned["perplexity"] < before["perplexity"] / 5
    assert tuned["score"] > before["score"] and tuned["token_f1"] > before["token_f1"]
    assert [phase["steps"] for phase in rounds] == [STEPS + ROUND_STEPS, STEPS + 2 * ROUND_STEPS]
    assert all(phase["kept"] == phase["histories"] == 6 for phase in rounds)
    assert all(phase["score_kept"] >= phase["score_drawn"] for phase in rounds)
    said = [line for line in output.splitlines() if line.startswith("round 2: held-out: perplexity")]
    assert len(said) == 1 and f"{rounds[1]['perplexity']:.2f} (before {rounds[0]['perplexity']:.2f}" in said[0]


@pytest.mark.parametrize("count", [1, 2])
def test_the_folder_is_one_of_transformers(runs, count):
    folder = runs[count][0] / "out"
    assert {file.name for file in folder.iterdir()} == FILES
    assert is_language_model(folder)  # to evaluate.py
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items() if name in weights)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "is 20 big"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert out[0, -1] == tokenizer.eos_token_id
    assert tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).startswith(("yes", "no"))


def test_other_ranks_and_stages_draw_the_same_answers(runs):
    one, two = runs[1][0], runs[2][0]
    for name in FEEDBACK:
        texts = [[json.loads(line)["messages"] for line in (f / "out" / name).open()] for f in (one, two)]
        assert texts[0] == texts[1]
    for first, second in zip(phases(one), phases(two), strict=True):
        assert first["perplexity"] == pytest.approx(second["perplexity"], rel=1e-3)
        assert first["kept"] == second["kept"]


# -- killed, and started again


@contextmanager
def started(*command: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def output_until(process: subprocess.Popen[str], text: str) -> str:
    seen = ""
    assert process.stdout is not None
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} does not come:\n{seen}")


KILLS = {  # what the run says then, and the step that it goes on from
    "in the fine-tuning": ("step 11/", 10),
    "while it draws": ("round 1: draws", STEPS + 2),
    "in the second round's training": (f"step {STEPS + ROUND_STEPS + 2}/", STEPS + ROUND_STEPS + 1),
}


@pytest.mark.parametrize("when", [*KILLS][-1:] + [pytest.param(k, marks=pytest.mark.slow) for k in [*KILLS][:-1]])
def test_what_was_killed_goes_on_to_the_same_numbers(runs, given, ranks, python, tmp_path, when):
    (tmp_path / "slow.py").write_text(SLOW)
    with started(*python.command, tmp_path / "slow.py", *given, *TINY, "--stage", 0, *places(tmp_path)) as process:
        output_until(process, KILLS[when][0])
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    began = checkpoints(tmp_path / "kept")[0].tag
    ranks(1).run(finetune, [*given, *TINY, "--stage", 0, *places(tmp_path)])
    assert began == f"global_step{KILLS[when][1]}"
    assert phases(tmp_path) == phases(runs[1][0])
    for name in ("model.safetensors", *FEEDBACK):
        assert (tmp_path / "out" / name).read_bytes() == (runs[1][0] / "out" / name).read_bytes()


@pytest.mark.slow
def test_ctrl_c_saves_and_the_run_goes_on_with_other_ranks(runs, given, python, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    with started(*python.command, tmp_path / "slow.py", *given, *TINY, *places(tmp_path)) as process:
        output_until(process, "fine-tuning: draws")
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in output, output
    done = run(*python.torchrun(*TWO_RANKS), SCRIPT, *given, *TINY, "--stage", 2, *places(tmp_path))
    assert done.returncode == 0, done.stderr
    for first, second in zip(phases(tmp_path), phases(runs[1][0]), strict=True):
        assert first["perplexity"] == pytest.approx(second["perplexity"], rel=1e-3)


def test_a_complete_run_says_so_and_another_one_is_refused(runs, given, ranks):
    options = [*given, *TINY, "--stage", 0, *places(runs[1][0])]
    assert "complete already" in ranks(1).run(finetune, options)[0]
    with pytest.raises(RankError, match=r"is of a run with another --alpha: 0\.5, and not 0\.7"):
        ranks(1).run(finetune, [*options, "--alpha", 0.7])


# -- stages, generators, scores


@pytest.mark.parametrize(
    "options",
    [
        ["--stage", 3, "--generator", "separate"],
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                ["--stage", 1],
                ["--stage", 2, "--generator", "separate", "--bucket-mb", 1e-3],
                ["--stage", 0, "--padding", "--accumulate", 2],
                ["--stage", 3, "--precision", "bf16", "--score", "likelihood"],
            )
        ),
    ],
)
def test_it_runs_in_every_stage(runs, given, ranks, tmp_path, options):
    """What changes nothing but where things are, gives the same bits."""
    output = ranks(2).run(finetune, [*given, *TINY, *options, *places(tmp_path)])[0]
    assert "round 2: held-out" in output
    if not {"--padding", "--precision"} & set(options):
        assert phases(tmp_path) == phases(runs[2][0])


# -- what cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--alpha", 1.5], "--alpha 1.5 is above 1"),
        (["--held-out", 1], "--held-out 1.0 leaves nothing to train on"),
        (["--answer-tokens", 48], "--answer-tokens 48 leaves no room in --context 48"),
        (["--batch-size", 3, "--accumulate", 2], "--batch-size 3 rows do not divide"),
        (["--score", "nowhere:f"], "--score nowhere:f: No module named 'nowhere'"),
        (["--data", "/nowhere.jsonl"], "cannot read the dialogues /nowhere.jsonl: No such file"),
        (["--model", "/nowhere"], "there is no folder /nowhere"),
        (["--model", "/nowhere.json"], "cannot read the model's config /nowhere.json"),
        (["--context", 100], "--context 100 is more than the 64 tokens that the model sees"),
        (["--config", "/nowhere.json"], "/nowhere.json"),
        (["--generator", "other"], "invalid choice: 'other'"),
    ],
)
def test_a_mistake_is_one_line(given, tmp_path, monkeypatch, capsys, options, message):
    command = ["finetune_chat.py", *given, *TINY, "--no-checkpoints", "--out", tmp_path / "out", *options]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    assert finetune_chat.main() == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and errors[0].startswith("finetune_chat.py: error: ") and message in errors[0]


# -- the terminal


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """chat.py in this process: talk(path, options, typed="") returns its exit code."""
    handler = signal.getsignal(signal.SIGPIPE)

    def run_chat(*arguments: Any, typed: str = "") -> int:
        monkeypatch.setattr(sys, "argv", ["chat.py", *(str(argument) for argument in arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        return chat.main()

    yield run_chat
    signal.signal(signal.SIGPIPE, handler)


def test_one_can_talk_to_it_through_a_pipe(runs, talk, capsys):
    typed = "is 20 big\n\n/reset\nis 20 big\n/what\n/quit\nis 1 big\n"
    assert talk(runs[1][0] / "out", "--temperature", 0, "--answer-tokens", 8, typed=typed) == 0
    first, reset, second, unknown = capsys.readouterr().out.splitlines()
    assert first == second and first.split()[0] in ("yes", "no")
    assert reset == "(begins anew)" and unknown.startswith("(/what is unknown")


@pytest.mark.slow
def test_a_program_at_the_other_end_of_the_pipe_may_go(runs, python):
    command = [*python.command, str(CHAT), str(runs[1][0] / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()
        process.stdin.write(b"is 20 big\n" * 50)
        process.stdin.close()
        assert process.stderr.read() == b""


def test_an_answer_is_printed_token_by_token(capsys):
    class Letters:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return bytes(ids).decode(errors="replace")

    printer, seen = chat.TokenPrinter(Letters()), []
    for ids in ([[0, 1, 2]], [ord("h")], [0xC3], [0xA9], [ord("!")]):
        printer.put(torch.tensor(ids))
        seen.append(capsys.readouterr().out)
    printer.end()
    assert seen == ["", "h", "", "\u00e9", "!"] and capsys.readouterr().out == "\n"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere", "there is no folder /nowhere"),
        (str(SCRIPT.parent), "has no config.json"),
        ("a/b/c", "no folder a/b/c"),
    ],
)
def test_a_wrong_path_is_one_line(talk, capsys, path, message):
    assert talk(path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("chat.py: error: ") and message in line


def test_an_encoder_is_refused(talk, capsys, tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=300, **sizes)).save_pretrained(tmp_path)
    tokenizer_of(train_tokenizer([Dialogue(({"role": "assistant", "content": "Yes."},))], 300)).save_pretrained(
        tmp_path
    )
    assert talk(tmp_path) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"chat.py: error: {tmp_path} is a BertModel, and no causal language model"
