"""files.py: what is no regular file is never replaced or written, whoever writes (F61)."""

from __future__ import annotations

import ast
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import partita
import pytest
from partita.cli.commands import app
from partita.config import document
from partita.files import file_to_write
from small_models import config, inputs, seeded
from typer.testing import CliRunner

PACKAGE = Path(partita.__file__).parent
Make = Callable[[Path], object]


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(path))  # an address has room for 107 bytes


IRREGULAR: dict[str, Make] = {"a pipe": os.mkfifo, "a folder": Path.mkdir, "a socket": make_socket}

# Everything that writes a file under a name, or below a folder, that a program gives.
WRITERS: dict[str, Callable[[partita.Engine, Path], object]] = {
    "save_model": lambda engine, path: engine.save_model(path),
    "save_16bit_model": lambda engine, path: engine.save_16bit_model(path.parent, path.name),
    "save_config": lambda engine, path: engine.save_config(path),
}


@pytest.fixture
def engine() -> partita.Engine:
    return partita.Engine(seeded(), config=config())


@pytest.mark.parametrize("kind", IRREGULAR)
@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_no_regular_file_is_refused_and_stays(engine, tmp_path, writer, kind):
    """F61: as root, renaming a file onto /dev/full replaced the device and said nothing."""
    path = tmp_path / "there.safetensors"
    IRREGULAR[kind](path)
    before = path.stat()
    with pytest.raises(
        OSError, match=rf"there.safetensors' is {kind}, which is not replaced by a file: give the name of a file"
    ):
        WRITERS[writer](engine, path)
    assert (path.stat().st_ino, path.stat().st_mode) == (before.st_ino, before.st_mode)
    assert [file.name for file in tmp_path.iterdir()] == ["there.safetensors"]
    engine.train_batch(inputs())


@pytest.mark.parametrize("writer", WRITERS)
def test_a_link_to_a_device_is_the_device(engine, tmp_path, writer):
    link = tmp_path / "link.safetensors"
    link.symlink_to("/dev/full")
    with pytest.raises(OSError, match="is a device"):
        WRITERS[writer](engine, link)
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)
    assert link.is_symlink()


@pytest.mark.parametrize("writer", WRITERS)
def test_a_link_to_a_file_stays_and_the_file_is_written(engine, tmp_path, writer):
    (tmp_path / "file").write_text("old")
    link = tmp_path / "link.safetensors"
    link.symlink_to("file")
    WRITERS[writer](engine, link)
    assert link.is_symlink()
    assert (tmp_path / "file").stat().st_size > 3


@pytest.mark.parametrize("name", ["model.safetensors", "folder"])
def test_a_pipe_in_the_place_of_a_file_or_a_folder_of_files(engine, tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match=rf"{name}' is a pipe"):
        engine.save_model(tmp_path / name)
    assert stat.S_ISFIFO((tmp_path / name).stat().st_mode)


def test_the_command_line_does_not_write_into_a_pipe_either(tmp_path):
    (tmp_path / "ds.json").write_text("{}")
    os.mkfifo(tmp_path / "out.json")
    done = CliRunner().invoke(app, ["config", "convert", str(tmp_path / "ds.json"), "-o", str(tmp_path / "out.json")])
    assert done.exit_code != 0 and "is a pipe" in done.output.replace("\n", " ")


def test_documents_are_not_written_into_a_pipe(tmp_path):
    os.mkfifo(tmp_path / document.MARKDOWN_NAME)
    with pytest.raises(OSError, match="is a pipe"):
        document.write_documents(tmp_path)


def test_a_folder_is_told_what_a_file_in_it_may_be_called(tmp_path):
    with pytest.raises(OSError, match=r"is a folder.*give the name of a file, such as '.*/model\.safetensors'"):
        file_to_write(tmp_path)


def test_files_have_the_mode_that_the_user_asked_for(engine, tmp_path):
    """Not that of a temporary file, which nobody else may read."""
    umask = os.umask(0o027)
    try:
        engine.save_model(tmp_path / "model.safetensors")
        engine.save_config(tmp_path / "config")
    finally:
        os.umask(umask)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o640}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_module_that_writes_files_asks_first(path):
    """The kind of F61: there is one rule, and it is in one place."""
    tree = ast.parse(path.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = [getattr(call.func, "attr", getattr(call.func, "id", "")) for call in calls]
    writes = any(name in ("write_text", "write_bytes", "save_file") for name in names) or any(
        name == "open" and any(isinstance(a, ast.Constant) and set("wax+") & set(str(a.value)) for a in call.args[-1:])
        for name, call in zip(names, calls, strict=True)
    )
    assert not writes or "file_to_write" in names, f"{path} writes a file whose place nobody looked at"
