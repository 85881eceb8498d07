"""Staging, write_durably() and sweep(): what becomes a checkpoint, what is never replaced, what is left and removed."""

from __future__ import annotations

import errno
import os
import re
import resource
import socket
from pathlib import Path

import pytest
from checkpoints import content, fill, save, version_of
from partita.checkpoint.commit import Staging, sweep, write_durably
from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.folder import checkpoints, find
from partita.checkpoint.manifest import MANIFEST


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(path))


# -- a save


def test_until_it_is_published_a_checkpoint_is_none(tmp_path):
    staging = Staging(tmp_path / "new" / "er", "a")
    assert names(tmp_path) == []
    staging.create()
    assert re.fullmatch(r"\.a\.partial-[0-9a-f]{8}", staging.path.name)
    assert staging.path.parent == tmp_path / "new" / "er"
    fill(staging.path, "a", 1)
    assert checkpoints(tmp_path / "new" / "er") == []
    assert staging.publish() == tmp_path / "new" / "er" / "a"
    assert names(tmp_path / "new" / "er") == ["a", "latest"]
    assert (tmp_path / "new" / "er" / "latest").read_text() == "a"
    assert version_of(find(tmp_path / "new" / "er", None)) == 1


def test_the_working_directory_may_change_during_a_save(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    staging = Staging(Path("here"), "a")
    staging.create()
    fill(staging.path, "a", 1)
    monkeypatch.chdir("/")
    assert staging.publish() == tmp_path / "here" / "a"


def test_a_checkpoint_of_the_same_tag_is_replaced_whole(tmp_path):
    save(tmp_path, "a", 1)
    save(tmp_path, "a", 2)
    assert names(tmp_path) == ["a", "latest"]
    assert names(tmp_path / "a") == sorted([*content(2), MANIFEST])
    assert version_of(find(tmp_path, "a")) == 2


def test_who_has_a_file_of_the_replaced_checkpoint_open_reads_on(tmp_path):
    save(tmp_path, "a", 1)
    with (tmp_path / "a" / "model.safetensors").open("rb") as file:
        save(tmp_path, "a", 2)
        assert file.read() == content(1)["model.safetensors"]


def test_replacing_removes_links_and_not_what_they_lead_to(tmp_path):
    directory, outside = tmp_path / "checkpoints", tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("kept")
    save(directory, "a", 1)
    (directory / "a" / "folder").symlink_to(outside)
    (directory / "a" / "link").symlink_to(outside / "file")
    save(directory, "a", 2)
    assert version_of(find(directory, "a")) == 2
    assert (outside / "file").read_text() == "kept"


def test_a_damaged_checkpoint_and_an_empty_folder_are_replaced(tmp_path):
    """A run that resumed from an older checkpoint comes by the step of the damaged one again."""
    save(tmp_path, "a", 1)
    os.truncate(tmp_path / "a" / MANIFEST, 0)
    (tmp_path / "b").mkdir()
    for tag in ("a", "b"):
        save(tmp_path, tag, 2)
        assert version_of(find(tmp_path, tag)) == 2


def test_saves_of_one_tag_at_once_do_not_mix(tmp_path):
    first, second = Staging(tmp_path, "a"), Staging(tmp_path, "a")
    for version, staging in enumerate((first, second), 1):
        staging.create()
        fill(staging.path, "a", version)
    second.publish()
    assert version_of(find(tmp_path, "a")) == 2
    first.publish()
    assert version_of(find(tmp_path, "a")) == 1
    assert names(tmp_path) == ["a", "latest"]


# -- what is not replaced

OTHERS = {
    "a file": lambda path: path.write_text("data"),
    "a link": lambda path: path.symlink_to("checkpoint"),
    "a special file": os.mkfifo,
    "is no checkpoint": lambda path: (path.mkdir(), (path / "data").write_text("data")),
}


@pytest.mark.parametrize("moment", ["before", "during"])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_checkpoint_is_not_replaced(tmp_path, kind, moment):
    """A tag that is also the name of the folder with the data must not cost the data."""
    save(tmp_path, "checkpoint", 1)
    staging = Staging(tmp_path, "a")
    if moment == "during":
        staging.create()
        fill(staging.path, "a", 2)
    OTHERS[kind](tmp_path / "a")
    before = (tmp_path / "a").lstat()
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(tmp_path / 'a'))}'.*{kind}.*give another tag"):
        staging.create() if moment == "before" else staging.publish()
    staging.discard()
    assert names(tmp_path) == ["a", "checkpoint", "latest"]
    assert (tmp_path / "a").lstat() == before
    assert find(tmp_path, None).tag == "checkpoint"


@pytest.mark.parametrize("kind", ["a link", "a folder", "a special file"])
def test_what_has_the_name_of_latest_is_seen_before_anything_is_written(tmp_path, kind):
    {**OTHERS, "a folder": Path.mkdir}[kind](tmp_path / "latest")
    with pytest.raises(CheckpointError, match=rf"latest' is {kind}, but is to be a file .*: remove it"):
        Staging(tmp_path, "a").create()
    assert names(tmp_path) == ["latest"]


@pytest.mark.parametrize("tag", ["", ".", "..", "../x", "a/b", "/a", ".hidden", "latest", "a\n", "x" * 201, None])
def test_a_tag_is_a_plain_name(tmp_path, tag):
    with pytest.raises(CheckpointError, match="tag of a checkpoint"):
        Staging(tmp_path, tag)


@pytest.mark.parametrize("below", ["file", "file/deep", "file/deep/er"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path, below):
    (tmp_path / "file").write_text("data")
    staging = Staging(tmp_path / below, "a")
    with pytest.raises(NotADirectoryError, match=rf"Not a directory: '{re.escape(str(tmp_path / 'file'))}"):
        staging.create()
    staging.discard()
    assert names(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_written_is_named():
    """Also for root, whom no mode of a folder stops."""
    staging = Staging(Path("/proc/self"), "a")
    with pytest.raises(OSError, match=r": '/proc/(\d+|self)/\.lock-"):
        staging.create()
    staging.discard()


# -- the order of calls


def test_calls_out_of_order_are_refused(tmp_path):
    staging = Staging(tmp_path, "a")
    with pytest.raises(RuntimeError, match=r"publish\(\) when the checkpoint 'a' is not created yet"):
        staging.publish()
    staging.create()
    with pytest.raises(RuntimeError, match=r"create\(\) when the checkpoint 'a' is being written"):
        staging.create()
    with pytest.raises(RuntimeError, match=r"has no manifest\.json, which is written last"):
        staging.publish()
    fill(staging.path, "a", 1)
    staging.publish()
    with pytest.raises(RuntimeError, match=r"publish\(\) when the checkpoint 'a' is published"):
        staging.publish()
    staging.discard()
    assert version_of(find(tmp_path, "a")) == 1


def test_a_discarded_folder_is_gone_and_stays_unpublished(tmp_path):
    for calls in range(3):
        staging = Staging(tmp_path, "a")
        if calls:
            staging.create()
            fill(staging.path, "a", 1)
        if calls == 2:
            (staging.path / "link").symlink_to("/")
        staging.discard()
        staging.discard()
        assert names(tmp_path) == []
        with pytest.raises(RuntimeError, match="is discarded"):
            staging.publish()


def test_a_folder_that_somebody_removes_is_missed(tmp_path):
    staging = Staging(tmp_path, "a")
    staging.create()
    staging.path.rmdir()
    with pytest.raises(RuntimeError, match="has no manifest"):
        staging.publish()
    staging.discard()


# -- files


def test_a_file_is_written_whole_and_once(tmp_path):
    data = os.urandom(300_000)
    write_durably(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == data
    write_durably(tmp_path / "empty", b"")
    assert (tmp_path / "empty").read_bytes() == b""
    (tmp_path / "link").symlink_to("elsewhere")
    for name in ("file", "link"):
        with pytest.raises(FileExistsError, match=re.escape(str(tmp_path / name))):
            write_durably(tmp_path / name, b"other")
    assert (tmp_path / "file").read_bytes() == data
    assert names(tmp_path) == ["empty", "file", "link"]


def test_a_file_that_cannot_be_written_is_named_and_removed(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone/file"):
        write_durably(tmp_path / "gone" / "file", b"data")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=re.escape(f"File too large: '{tmp_path / 'file'}'")) as caught:
            write_durably(tmp_path / "file", bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert names(tmp_path) == []


# -- sweeping


def test_sweep_removes_what_dead_saves_left_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path, "a", 1)
    save(tmp_path, "b", 2).rename(tmp_path / ".b.partial-0123abcd")
    save(tmp_path, "a", 3).rename(tmp_path / ".a.old-0123abcd")
    save(tmp_path, "a", 4)
    (tmp_path / ".latest.partial-0123abcd").write_text("")
    (tmp_path / ".c.partial-0123abcd").symlink_to("a")
    (tmp_path / ".d.old-0123abcd").symlink_to("a")
    make_socket(tmp_path / ".e.partial-0123abcd")
    stay = [".git", ".a.partial-0123abc", ".a.partial-0123ABCD", ".a.partial-0123abcd~", ".partial-0123abcd", "..old"]
    for name in stay:
        (tmp_path / name).mkdir()
    removed = sweep(tmp_path)
    assert sorted(path.name for path in removed) == [
        ".a.old-0123abcd",
        ".b.partial-0123abcd",
        ".c.partial-0123abcd",
        ".d.old-0123abcd",
        ".e.partial-0123abcd",
        ".latest.partial-0123abcd",
    ]
    assert names(tmp_path) == sorted([*stay, "a", "latest"])
    assert version_of(find(tmp_path, None)) == 4
    assert sweep(tmp_path) == []


def test_sweep_brings_back_what_was_set_aside_for_nothing(tmp_path):
    for version, number in ((1, 5), (3, 4), (2, 6)):
        save(tmp_path, "a", version).rename(tmp_path / f".a.old-0000000{number}")
    (save(tmp_path, "a", 4) / "state.json").unlink()
    (tmp_path / "a").rename(tmp_path / ".a.old-00000007")
    save(tmp_path, "a", 5).rename(tmp_path / ".a.partial-00000008")
    assert version_of(find(tmp_path, None)) == 3
    assert len(sweep(tmp_path)) == 4
    assert names(tmp_path) == ["a", "latest"]
    assert version_of(find(tmp_path, None)) == 3


def test_sweep_does_not_bring_back_over_what_is_there(tmp_path):
    save(tmp_path, "a", 1).rename(tmp_path / ".a.old-00000001")
    (tmp_path / "a").symlink_to("nowhere")
    sweep(tmp_path)
    assert (tmp_path / "a").is_symlink()


def test_sweep_of_nothing(tmp_path):
    assert sweep(tmp_path / "gone") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        sweep(tmp_path / "file")
