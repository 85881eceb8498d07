"""What mkdocs.yml leaves to code: pages made from files beside docs/, and the pages of a folder in the navigation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
BESIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_config(config: Any) -> Any:
    """A folder in `nav`, written with a slash at its end, becomes those of its pages that `nav` does not name."""
    named = set(_leaves(config.nav))
    config.nav = _with_folders(config.nav, Path(config.docs_dir), named)
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made of files beside docs/."""
    for name, page in BESIDE.items():
        files.append(File.generated(config, page, content=_moved((ROOT / name).read_text())))
    text = "# License\n\n```text\n" + (ROOT / "LICENSE").read_text() + "```\n"
    files.append(File.generated(config, "license.md", content=text))
    return files


def _moved(text: str) -> str:
    """A page's links, as they are from within docs/."""
    text = re.sub(r"\]\(docs/", "](", text)
    for name, page in {**BESIDE, "LICENSE": "license.md"}.items():
        text = text.replace(f"]({name})", f"]({page})")
    return text


def _leaves(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [leaf for entry in (nav.values() if isinstance(nav, dict) else nav) for leaf in _leaves(entry)]


def _with_folders(nav: list[Any], docs: Path, named: set[str]) -> list[Any]:
    found: list[Any] = []
    for entry in nav:
        if isinstance(entry, dict):
            found.append({k: v if isinstance(v, str) else _with_folders(v, docs, named) for k, v in entry.items()})
        elif entry.endswith("/"):
            found += sorted({path.relative_to(docs).as_posix() for path in (docs / entry).glob("*.md")} - named)
        else:
            found.append(entry)
    return found
