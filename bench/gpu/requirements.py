"""Says which packages the installed partita needs at run time and does not find; exit status 1 if there are any.

python bench/gpu/requirements.py [--list pyproject.toml]

With --list: what to bring to a machine that has torch alone, to build, run and test the package there.
"""

from __future__ import annotations

import argparse
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

COME_WITH_TORCH = {"torch", "numpy"}
TEST_RUNNERS = {"hypothesis", "pytest", "pytest-timeout"}  # of the extra "test", what the tests of a GPU import
ALSO = ["packaging"]  # of this script


def missing(name: str) -> list[str]:
    """Requirements of a package, extras left out, that are not installed or are so in an older version."""
    requirements = [Requirement(text) for text in metadata.requires(name) or []]
    return [str(r) for r in requirements if (r.marker is None or r.marker.evaluate({"extra": ""})) and not _met(r)]


def _met(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def to_bring(project: dict[str, Any]) -> list[str]:
    """Of a pyproject.toml: what the package needs, and what building and testing it takes."""
    tests = [text for text in project["project"]["optional-dependencies"]["test"] if _name(text) in TEST_RUNNERS]
    needed = [text for text in project["project"]["dependencies"] if _name(text) not in COME_WITH_TORCH]
    return [*needed, *project["build-system"]["requires"], *tests, *ALSO]


def _name(requirement: str) -> str:
    return Requirement(requirement).name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", type=Path)
    arguments = parser.parse_args()
    if arguments.list is not None:
        print("\n".join(to_bring(tomllib.loads(arguments.list.read_text()))))
        return
    names = missing("partita")
    for name in names:
        print(f"missing: {name}; put its wheel, and those of what it needs, into a folder and name that in WHEELS")
    sys.exit(1 if names else 0)


if __name__ == "__main__":
    main()
