"""Small checkpoints, written by the same calls as large ones: a version of the content per number."""

from __future__ import annotations

import hashlib
from pathlib import Path

from partita.checkpoint.commit import Staging, write_durably
from partita.checkpoint.folder import Found
from partita.checkpoint.manifest import MANIFEST, FileRecord, Manifest, manifest_text

# Files that are not of a checkpoint, and that a program has put into its folder.
FOREIGN = {"config.json": b"{}", "tokenizer.json": b"words" * 100}


def add_foreign(folder: Path) -> None:
    """Puts FOREIGN into a folder."""
    for name, data in FOREIGN.items():
        (folder / name).write_bytes(data)


def content(version: int) -> dict[str, bytes]:
    """File -> bytes. Each version has other bytes, in part of other sizes, and one file that no other version has."""
    return {
        "model.safetensors": bytes([version % 256]) * 3000,
        f"optimizer-{version}.safetensors": bytes([version % 256]) * (500 + version),
        "state.json": b'{"version": %d}' % version,
        "empty": b"",
    }


def manifest_bytes(tag: str, version: int, created: str = "2026-01-31T12:00:00Z") -> bytes:
    """The manifest of a version, whose number is the step. The digests are of the right form and nothing more."""
    files = {name: FileRecord(size=len(data), chunks=_chunks(data)) for name, data in content(version).items()}
    manifest = Manifest(
        tag=tag, step=version, samples=8 * version, world_size=2, created=created, engine={"stage": 1}, files=files
    )
    return manifest_text(manifest).encode()


def fill(folder: Path, tag: str, version: int, created: str = "2026-01-31T12:00:00Z") -> None:
    """Writes the files of a version, the manifest last."""
    for name, data in content(version).items():
        write_durably(folder / name, data)
    write_durably(folder / MANIFEST, manifest_bytes(tag, version, created))


def save(directory: Path, tag: str, version: int, created: str = "2026-01-31T12:00:00Z") -> Path:
    """A whole save; what fails leaves nothing."""
    staging = Staging(directory, tag)
    try:
        staging.create()
        fill(staging.path, tag, version, created)
        return staging.publish()
    except BaseException:
        staging.discard()
        raise


def version_of(found: Found) -> int:
    """The version that a checkpoint is; an AssertionError unless every byte of it is of that version, or is FOREIGN."""
    version = found.manifest.step
    files = {path.name: path.read_bytes() for path in found.path.iterdir()}
    manifest = files.pop(MANIFEST)
    for name in FOREIGN.keys() & files.keys():
        assert files.pop(name) == FOREIGN[name], f"{found.path / name} is changed"
    assert files == content(version), f"{found.path} is a mixture"
    assert manifest == manifest_bytes(found.tag, version, found.manifest.created)
    return version


def _chunks(data: bytes) -> list[tuple[int, str]]:
    return [(len(data), hashlib.blake2b(data, digest_size=8).hexdigest())] if data else []
