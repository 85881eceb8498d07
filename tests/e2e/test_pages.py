"""README.md and the pages of docs/: their code blocks run, their configs are right, what they link to is there."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
from pages import ROOT, SHELL, Reader, blocks, commands, pages
from partita.config import load_config
from partita.config.models import Config

sys.path.insert(0, str(ROOT / "bench"))
from front_page import PICTURE, draw, front_ratios

SLOW = {f"docs/{name}.md" for name in ("quick-start", "migration")}  # many runs
SLOW |= {
    f"docs/how-to/{name}.md"
    for name in ("custom-optimizer", "data", "huggingface", "lightning", "profiling", "trainer")
}
INLINE = re.compile(r'`("(\w+)": [^`]+)`')
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
NAMED = re.compile(r"`((?:bench|cpp|cuda|docs|examples|python|tests|\.ci)/[\w./-]*\w)`")


def of_pages(names: list[str]) -> list[object]:
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in names]


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory, python) -> Callable[[str], Reader]:
    """read(page): what became of doing what the page says, once."""
    done: dict[str, Reader] = {}

    def read(page: str) -> Reader:
        if page not in done:
            done[page] = Reader(page, tmp_path_factory.mktemp("page"), python)
            done[page].read()
        return done[page]

    return read


@pytest.mark.parametrize("page", of_pages([page for page in pages() if blocks(page)]))
def test_what_a_page_says_can_be_done(read, page):
    read(page)


@pytest.mark.parametrize("page", pages())
def test_its_programs_are_python_and_its_configs_are_right(page):
    """Those in the text too: what stands between backquotes and begins with a key of the config."""
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, f"{page}:{block.line}", "exec", dont_inherit=True)
    zero = Config.model_fields["zero_optimization"].annotation
    for text, key in INLINE.findall((ROOT / page).read_text()):
        if key in Config.model_fields:
            load_config(json.loads("{" + text + "}"))
        elif key in zero.model_fields:
            load_config({"zero_optimization": {"stage": 3, **json.loads("{" + text + "}")}})


def test_the_quick_start_learns_and_goes_on_with_more_ranks(read):
    first, second = read("README.md").outputs
    found = re.findall(r"rank (\d): ([\d.]+) bits per byte", first + second)
    assert [rank for rank, _ in sorted(found)] == ["0", "0", "1"]
    assert all(float(bits) < 3.8 for _, bits in found), found
    assert "step 200 " in first and "global_step200" in second and "step 50 " not in second


def test_stage_3_gives_whole_parameters_on_any_number_of_ranks(read):
    page = read("docs/concepts/stages.md")
    assert [output.count("gradient of shape (64, 64)") for output in page.outputs[:2]] == [1, 2]
    weights = safetensors.torch.load_file(page.folder / "model.safetensors")
    assert len(weights) == 8 and not weights["3.0.bias"].any() and weights["3.0.weight"].any()


def test_a_run_goes_on_on_another_number_of_ranks(read):
    page = read("docs/how-to/saving.md")
    first, second = page.outputs[:2]
    assert "goes on" not in first
    assert f"rank 0: goes on from {page.folder}/checkpoints/global_step20, with {{'note': 'mine'}}\n" in second
    assert "global_step10" in page.outputs[2]  # `inspect`, before `prune`
    assert {path.name for path in (page.folder / "checkpoints").iterdir()} == {"global_step20", "latest"}


def test_the_pipeline_learns(read):
    (output, *_) = read("docs/pipelines.md").outputs
    found = sorted(re.findall(r"rank (\d): stages \[(\d, \d)\], loss ([\d.]+)", output))
    assert [(rank, stages) for rank, stages, _ in found] == [("0", "0, 2"), ("1", "1, 3")]
    assert len({loss for *_, loss in found}) == 1 and float(found[0][2]) < 0.2  # it begins above 1


@pytest.mark.slow
def test_lightning_trains_and_a_second_run_is_complete(read):
    page = read("docs/how-to/lightning.md")
    found = [re.findall(r"(\d+) steps, val ([\d.]+)", output) for output in page.outputs]
    assert found[0] == found[1] and [steps for ((steps, _),) in found] == ["48", "48"]
    assert float(found[0][0][1]) < 1  # it begins near 16
    assert {path.name for path in (page.folder / "checkpoints").iterdir()} >= {"last.ckpt"}


def test_the_first_table_has_the_measured_ratios():
    said = re.findall(r"\*\*([\d.]+)x\*\*", (ROOT / "README.md").read_text())
    assert said == [f"{value:.2f}" for value in front_ratios().values()]


def test_the_picture_is_drawn_from_the_results(tmp_path):
    """Its texts, which matplotlib writes into comments too: the step times among them."""
    draw(tmp_path / "front.svg")
    texts = [re.findall("<!-- (.*?) -->", path.read_text()) for path in (tmp_path / "front.svg", PICTURE)]
    assert texts[0] == texts[1] and "DeepSpeed 3" in texts[0]
    assert PICTURE.stat().st_size < 150_000


@pytest.mark.slow
def test_programs_of_the_examples_have_the_options_that_pages_give_them(python):
    given: dict[str, set[str]] = {}
    for block in (block for page in pages() for block in blocks(page) if block.language in SHELL):
        for words in commands(block):
            scripts = [i for i, word in enumerate(words) if word.startswith("examples/") and "launch" not in word]
            for place in scripts[:1]:
                options = {word.partition("=")[0] for word in words[place:] if word.startswith("--")}
                given.setdefault(words[place], set()).update(options)
    for script, options in given.items():
        done = subprocess.run(
            [*python.command, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        missing = options - set(re.findall(r"--[\w-]+", done.stdout))
        assert done.returncode == 0 and not missing, f"{script} has no {missing}\n{done.stdout}{done.stderr}"


def test_every_make_command_exists():
    if shutil.which("make") is None:
        pytest.skip("no make on this machine")
    text = "".join((ROOT / page).read_text() for page in (*pages(), "CONTRIBUTING.md"))
    targets = set(re.findall(r"(?:`|^)(?:\w+=\S+ )*make ([a-z][a-z-]*)", text, re.M))
    assert {"train", "test", "bench", "site"} <= targets
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [*pages(), "CONTRIBUTING.md", "CHANGELOG.md"])
def test_whatever_a_page_links_to_or_names_is_there(page):
    path = ROOT / page
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    links = [link for link in LINK.findall(text) if "://" not in link]
    missing = [link for link in links if not _leads_somewhere(path, link)]
    missing += [name for name in NAMED.findall(text) if not (ROOT / name).exists()]
    assert not missing, f"{page}: {missing}"


def _leads_somewhere(page: Path, link: str) -> bool:
    """Whether the file is there, and has the heading."""
    name, _, anchor = link.partition("#")
    path = page.parent / name if name else page
    return path.exists() and (not anchor or anchor in _anchors(path))


def _anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", pages())
def test_blocks_with_commands_say_that_they_have_some(page):
    words = ("$", "make", "partita", "pip", "python", "torchrun")
    for block in blocks(page):
        if block.language == "":
            assert not block.text.startswith(tuple(f"{word} " for word in words)), f"{page}:{block.line}: write ```sh"


def test_the_messages_of_the_troubleshooting_page_are_in_the_source():
    """Their fixed words, in one file: a message that is put together from several strings is there in parts."""
    sources = [_strings(path) for path in sorted((ROOT / "python").rglob("*.py"))]
    sources += [path.read_text() for path in (ROOT / "cpp" / "src").rglob("*.cpp")]
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = [
        message for row in re.findall(r"^\| (`.*?) \|", page, re.M) for message in re.findall(r"`([^`]+)`", row)
    ]
    assert len(messages) > 100
    of_torch = {"must have the same dtype"}
    unknown = [message for message in messages if message not in of_torch and not _is_said(message, sources)]
    assert not unknown


def _is_said(message: str, sources: list[str]) -> bool:
    parts = [part.strip() for part in re.split("…", message) if part.strip()]
    return any(all(part in source for part in parts) for source in sources)


def _strings(path: Path) -> str:
    """The literals of a module, each on a line, with … where something is put in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return "\n".join(found)


def test_the_site_is_built_without_a_dead_link(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    calls = (tmp_path / "site" / "api" / "engine" / "index.html").read_text()
    assert all(f'id="partita.{name}"' in calls for name in ("initialize", "Engine.backward", "Engine.save_checkpoint"))
    html = "".join(page.read_text() for page in (tmp_path / "site").rglob("*.html"))
    assert not re.findall(r'<(?:script|link|img)[^>]* (?:src|href)="https?:[^"]*"', html)  # it works without a network
