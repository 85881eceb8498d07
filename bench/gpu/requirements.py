"""Says which packages the installed partita needs at run time and does not find; exit status 1 if there are any."""

from __future__ import annotations

import sys
from importlib import metadata

from packaging.requirements import Requirement


def missing(name: str) -> list[str]:
    """Requirements of a package, extras left out, that are not installed or are so in an older version."""
    requirements = [Requirement(text) for text in metadata.requires(name) or []]
    return [str(r) for r in requirements if (r.marker is None or r.marker.evaluate({"extra": ""})) and not _met(r)]


def _met(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def main() -> None:
    names = missing("partita")
    for name in names:
        print(f"missing: {name}; put its wheel, and those of what it needs, into a folder and name that in WHEELS")
    sys.exit(1 if names else 0)


if __name__ == "__main__":
    main()
