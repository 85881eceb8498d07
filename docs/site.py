"""What mkdocs.yml leaves to code: pages made from files beside docs/ and from the source's errors, and the pages of a
folder in the navigation."""

from __future__ import annotations

import ast
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
    files.append(File.generated(config, "messages.md", content=_all_messages(ROOT / "python" / "partita")))
    return files


def _moved(text: str) -> str:
    """A page's links, as they are from within docs/."""
    text = re.sub(r"\]\(docs/", "](", text)
    for name, page in {**BESIDE, "LICENSE": "license.md"}.items():
        text = text.replace(f"]({name})", f"]({page})")
    return text


def _all_messages(package: Path) -> str:
    """A page of the errors that the source raises, by room, with … where something is put in."""
    rooms: dict[str, list[str]] = {}
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                text = _text(node.exc.args[0]).replace("\n", " ").replace("|", "/").replace("`", "'").strip()
                if len(text.replace("…", "").strip(": ;")) > 10:
                    rooms.setdefault(room, []).append(f"| {ast.unparse(node.exc.func)} | `{text}` |")
    parts = ["# All messages\n\nThe errors of the source, by room; … is what differs from case to case."]
    for room, rows in rooms.items():
        parts.append(f"## {room}\n\n| error | message |\n|---|---|\n" + "\n".join(dict.fromkeys(rows)))
    return "\n\n".join(parts) + "\n"


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return "…"


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
