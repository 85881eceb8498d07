"""find(), checkpoints(), prune() and open_file(): every state that a folder of checkpoints can be in."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from pathlib import Path

import pytest
from checkpoints import content, save, version_of
from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.folder import checkpoints, find, open_file, prune
from partita.checkpoint.manifest import MANIFEST

ASIDE = ".a.old-0123abcd"

NO_TAGS = {
    "empty": "",
    "parent": "../x",
    "itself": ".",
    "above": "..",
    "hidden": ".hidden",
    "latest": "latest",
    "Latest": "Latest",
    "deep": "a/b",
    "absolute": "/etc",
    "backslash": "a\\b",
    "zero": "a\0b",
    "lines": "a\nb",
    "space before": " a",
    "space behind": "a ",
    "long": "a" * 201,
    "long in bytes": "é" * 101,
    "no unicode": "a\udc80",
    "leftover": ".a.partial-0123abcd",
    "number": 7,
}
TAGS = [
    "a",
    "step100",
    "ä-模型-🎵",
    "é" * 100,
    "a" * 200,
    "a b",
    "a.b",
    "-rf",
    "*",
    "~",
    "$HOME",
    "%s{}",
    "a.partial-0123abcd",
    "a.old-0123abcd",
]


def refused(directory: Path, tag: str | None, text: str) -> str:
    """find() refuses with this text, in one line."""
    with pytest.raises(CheckpointError, match=re.escape(text)) as caught:
        find(directory, tag)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("tag", TAGS)
def test_any_name_of_a_folder_can_be_a_tag(tmp_path, tag):
    assert save(tmp_path, tag, 1) == tmp_path / tag
    for asked in (tag, None):
        found = find(tmp_path, asked)
        assert (found.path, found.tag, version_of(found)) == (tmp_path / tag, tag, 1)
    assert save(tmp_path, tag, 2) == tmp_path / tag
    assert version_of(find(tmp_path, tag)) == 2
    assert sorted(os.listdir(tmp_path)) == sorted([tag, "latest"])


@pytest.mark.parametrize("tag", NO_TAGS.values(), ids=NO_TAGS)
def test_what_cannot_be_a_tag_is_not_looked_for(tmp_path, tag):
    save(tmp_path / "x", "a", 1)
    save(tmp_path / "checkpoints", "sound", 2)
    text = refused(tmp_path / "checkpoints", tag, "tag of a checkpoint")
    assert text.endswith("whole checkpoints are, newest first, 'sound': give one as tag")


# -- nothing to be found


def test_a_folder_that_is_not_there(tmp_path):
    refused(tmp_path / "gone", None, f"'{tmp_path / 'gone'}' is not there: give the folder")
    refused(tmp_path / "gone", "a", "is not there")
    assert checkpoints(tmp_path / "gone") == []
    assert prune(tmp_path / "gone", 1) == []


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", None, "file' is a file, not a folder")
    refused(tmp_path / "file" / "below", None, "is not there")
    for call in (checkpoints, lambda directory: prune(directory, 1)):
        with pytest.raises(NotADirectoryError, match=re.escape(f"'{tmp_path / 'file'}'")):
            call(tmp_path / "file")


def test_an_empty_folder(tmp_path):
    refused(tmp_path, None, f"there is no '{tmp_path / 'latest'}'; '{tmp_path}' has no whole checkpoint")
    refused(tmp_path, "a", f"there is no '{tmp_path / 'a'}'; '{tmp_path}' has no whole checkpoint")
    assert checkpoints(tmp_path) == []


def test_the_folder_itself_may_be_a_link(tmp_path):
    save(tmp_path / "real", "a", 1)
    (tmp_path / "link").symlink_to("real")
    assert version_of(find(tmp_path / "link", None)) == 1
    (tmp_path / "file").write_text("")
    (tmp_path / "link to file").symlink_to("file")
    refused(tmp_path / "link to file", None, f"'{tmp_path / 'link to file'}' is a file, not a folder")


@pytest.mark.parametrize("target", ["nowhere", "lost"])  # nothing, a circle
@pytest.mark.parametrize("below", [".", "deep", "deep/er"])
def test_a_link_to_nothing_is_named(tmp_path, target, below):
    """A disk that is not mounted, for example. The link may be one of the folder's parents."""
    (tmp_path / "lost").symlink_to(target)
    text = f"'{tmp_path / 'lost'}'"
    refused(tmp_path / "lost" / below, None, f"{text} is a link to nothing: give the folder")
    why = "Not a folder, but a link to nothing" if target == "nowhere" else "Too many levels of symbolic links"
    with pytest.raises(OSError, match=f"{why}: {re.escape(text[:-1])}"):
        save(tmp_path / "lost" / below, "a", 1)
    assert os.listdir(tmp_path) == ["lost"]


# -- latest


def test_without_latest_the_tags_are_named(tmp_path):
    for version in range(1, 8):
        save(tmp_path, f"step{version}", version)
    (tmp_path / "latest").unlink()
    text = refused(tmp_path, None, f"there is no '{tmp_path / 'latest'}'")
    assert text.endswith("newest first, 'step7', 'step6', 'step5', 'step4', 'step3' and 2 older ones: give one as tag")
    assert version_of(find(tmp_path, "step4")) == 4


TORN = {
    "empty": b"",
    "zeros": b"\0\0\0\0",
    "no text": b"\xff\xfe",
    "cut character": "ä".encode()[:1],
    "path": b"../a",
    "lines": b"a\na",
    "spaces": b"  \n",
    "no tag": b"latest",
    "long": b"a" * 1000,
    "huge": b"a" * 5000,
}


@pytest.mark.parametrize("text", TORN.values(), ids=TORN)
def test_a_torn_latest_is_refused_and_the_tags_are_named(tmp_path, text):
    save(tmp_path, "a", 1)
    (tmp_path / "latest").write_bytes(text)
    assert "'a': give one as tag" in refused(tmp_path, None, f"'{tmp_path / 'latest'}'")


def test_latest_may_end_with_a_line_break(tmp_path):
    save(tmp_path, "a", 1)
    (tmp_path / "latest").write_text("a\n")
    assert find(tmp_path, None).tag == "a"


def test_latest_names_what_is_not_there(tmp_path):
    save(tmp_path, "a", 1)
    (tmp_path / "latest").write_text("b")
    refused(
        tmp_path, None, f"'{tmp_path / 'latest'}' names 'b', which is not there; whole checkpoints are, newest first"
    )


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(path))


IRREGULAR = {
    "is a link, which is not followed": lambda path: path.symlink_to("elsewhere"),
    "is not a regular file": Path.mkdir,
    "'is not a regular file' (pipe)": os.mkfifo,
    "cannot be read: No such device or address": make_socket,
}


@pytest.mark.parametrize("name", ["latest", f"a/{MANIFEST}", "a/model.safetensors"])
@pytest.mark.parametrize("kind", IRREGULAR)
def test_what_is_no_regular_file_is_not_opened(tmp_path, name, kind, monkeypatch):
    """A link is refused, though a good file is behind it; nobody waits for a pipe's writer."""
    save(tmp_path, "a", 1)
    monkeypatch.chdir(tmp_path)
    place = tmp_path / name
    place.rename(place.with_name("elsewhere"))
    IRREGULAR[kind](place)
    text = refused(tmp_path, None, str(place))
    assert "link" in text if place.is_symlink() else "is not a regular file" in text or "cannot be read" in text


# -- a checkpoint that is not whole


def test_a_folder_without_a_manifest_is_none(tmp_path):
    save(tmp_path, "a", 1)
    save(tmp_path, "b", 2)
    (tmp_path / "b" / MANIFEST).unlink()
    text = refused(
        tmp_path, None, f"'{tmp_path / 'b'}' has no {MANIFEST}: it is no checkpoint, or of a save that did not"
    )
    assert "'a': give one as tag" in text
    assert [found.tag for found in checkpoints(tmp_path)] == ["a"]


def test_a_checkpoint_of_deepspeeds_is_named_with_what_takes_it_over(tmp_path):
    (tmp_path / "global_step1").mkdir()
    (tmp_path / "global_step1" / "mp_rank_00_model_states.pt").touch()
    refused(tmp_path, "global_step1", "is a checkpoint of DeepSpeed's: `partita checkpoint import SRC DEST`")


def damage_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes()[:-20])


def huge_manifest(folder: Path) -> None:
    os.truncate(folder / MANIFEST, 2**40)


def shorten(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 2999)


DAMAGES = {
    MANIFEST: damage_manifest,
    "more than the 268435456 bytes": huge_manifest,
    "model.safetensors' has 2999 bytes, but its manifest says 3000": shorten,
    "there is no ": lambda folder: (folder / "state.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_missing_or_short_is_named_and_skipped(tmp_path, damage):
    save(tmp_path, "a", 1)
    save(tmp_path, "b", 2)
    DAMAGES[damage](tmp_path / "b")
    assert str(tmp_path / "b") in refused(tmp_path, "b", damage)
    assert [found.tag for found in checkpoints(tmp_path)] == ["a"]


@pytest.mark.parametrize("tag", ["file", "link"])
def test_a_tag_that_is_a_file_or_a_link_is_refused(tmp_path, tag):
    save(tmp_path, "a", 1)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("a")
    refused(tmp_path, tag, {"file": "file' is not a folder", "link": "link' is a link, which is not followed"}[tag])
    assert [found.tag for found in checkpoints(tmp_path)] == ["a"]


def test_a_renamed_copy_is_a_checkpoint_of_its_new_name(tmp_path):
    save(tmp_path, "a", 1)
    shutil.copytree(tmp_path / "a", tmp_path / "best")
    assert find(tmp_path, "best").tag == "best"
    assert find(tmp_path, "best").manifest.tag == "a"


# -- what was set aside


def test_a_checkpoint_that_was_set_aside_is_found(tmp_path):
    """The state between the two renames where names cannot be exchanged."""
    save(tmp_path, "a", 1)
    (tmp_path / "a").rename(tmp_path / ASIDE)
    for asked in ("a", None):
        found = find(tmp_path, asked)
        assert (found.path, found.tag, version_of(found)) == (tmp_path / ASIDE, "a", 1)
    assert [found.tag for found in checkpoints(tmp_path)] == ["a"]


def test_of_several_that_were_set_aside_the_newest_whole_one_counts(tmp_path):
    for version, name in ((2, ".a.old-00000002"), (3, ".a.old-00000001"), (4, ".a.old-00000003")):
        save(tmp_path, "a", version).rename(tmp_path / name)
    shorten(tmp_path / ".a.old-00000003")
    assert version_of(find(tmp_path, "a")) == 3


def test_what_was_set_aside_does_not_count_beside_its_successor(tmp_path):
    save(tmp_path, "a", 1).rename(tmp_path / ASIDE)
    save(tmp_path, "a", 2)
    assert [version_of(found) for found in checkpoints(tmp_path)] == [2]
    assert find(tmp_path, "a").path == tmp_path / "a"


# -- order and pruning


def test_the_newest_comes_first_by_time_and_then_by_number(tmp_path):
    for version in (9, 10, 100, 11, 2, 1, 99, 3, 1000, 20, 4, 5):
        save(tmp_path, f"step{version}", version)
    moments = ["2026-01-31T12:00:00.000001+00:00", "2026-01-31T12:00:00.2Z", "2026-01-31T12:00:00.199999Z"]
    for number, moment in enumerate([*moments, "2026-02-01T00:00:00Z", "2025-02-01T00:00:00.9Z"]):
        save(tmp_path, f"other{number}", number, moment)
    by_number = [f"step{n}" for n in (1000, 100, 99, 20, 11, 10, 9, 5, 4, 3, 2, 1)]
    tags = ["other3", "other1", "other2", "other0", *by_number, "other4"]
    assert [found.tag for found in checkpoints(tmp_path)] == tags


def test_prune_keeps_what_was_saved_last_by_a_run_that_went_back(tmp_path):
    """Its steps are lower than those of the branch that was given up."""
    for step in (1, 2, 3, 4):
        save(tmp_path, f"step{step}", step, f"2026-01-31T12:00:00.{step:06}+00:00")
    for step in (2, 3):
        save(tmp_path, f"new{step}", step, f"2026-01-31T12:00:01.{step:06}+00:00")
    assert [found.tag for found in checkpoints(tmp_path)][:3] == ["new3", "new2", "step4"]
    prune(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["latest", "new2", "new3"]


def test_prune_keeps_the_newest_whole_ones_and_all_that_is_no_checkpoint(tmp_path):
    for version in range(1, 13):
        save(tmp_path, f"step{version}", version)
    shorten(tmp_path / "step11")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "file").write_text("")
    (tmp_path / "link").symlink_to("step1")
    removed = [found.path for found in prune(tmp_path, 2)]
    assert removed == [tmp_path / f"step{n}" for n in range(9, 0, -1)]
    assert sorted(os.listdir(tmp_path)) == ["latest", "link", "notes", "step10", "step11", "step12"]
    assert prune(tmp_path, 2) == []


def test_prune_keeps_what_latest_names(tmp_path):
    for version in (5, 4, 3, 2):
        save(tmp_path, f"step{version}", version)
    assert [found.tag for found in prune(tmp_path, 1)] == ["step4", "step3"]
    assert version_of(find(tmp_path, None)) == 2
    (tmp_path / "latest").write_text("")
    assert [found.tag for found in prune(tmp_path, 1)] == ["step2"]


def test_prune_keeps_one_at_least(tmp_path):
    save(tmp_path, "a", 1)
    with pytest.raises(ValueError, match="keep_last is 0: at least one"):
        prune(tmp_path, 0)


def test_prune_removes_links_and_not_what_they_lead_to(tmp_path):
    directory, outside = tmp_path / "checkpoints", tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("kept")
    save(directory, "a", 1)
    save(directory, "b", 2)
    (directory / "a" / "folder").symlink_to(outside)
    (directory / "a" / "link").symlink_to(outside / "file")
    (directory / "a" / "up").symlink_to("..")
    assert [found.path for found in prune(directory, 1)] == [directory / "a"]
    assert (outside / "file").read_text() == "kept"
    assert version_of(find(directory, None)) == 2


# -- opening


def test_a_file_is_opened_in_the_folder_and_nowhere_else(tmp_path):
    folder = save(tmp_path, "a", 1)
    fd = open_file(folder, "model.safetensors")
    assert os.pread(fd, 5000, 0) == content(1)["model.safetensors"]
    os.close(fd)
    (tmp_path / "outside").write_text("")
    for name in ("../outside", str(tmp_path / "outside"), "", ".", "..", "a\0"):
        with pytest.raises(CheckpointError, match=re.escape(f"'{folder}'")):
            open_file(folder, name)
    with pytest.raises(CheckpointError, match=r"there is no '.*gone'"):
        open_file(folder, "gone")
    with pytest.raises(CheckpointError, match=r"there is no '.*nowhere'"):
        open_file(tmp_path / "nowhere", "model.safetensors")


def test_nothing_stays_open(tmp_path):
    folder = save(tmp_path, "a", 1)
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("state.json")
    before = os.listdir("/proc/self/fd")
    for name in ("pipe", "link", "gone", "..", "."):
        with pytest.raises(CheckpointError):
            open_file(folder, name)
    find(tmp_path, None), checkpoints(tmp_path), save(tmp_path, "a", 2)
    with pytest.raises(OSError) as caught:
        save(Path("/proc"), "a", 1)
    assert caught.value.errno in (errno.ENOENT, errno.EPERM, errno.EACCES, errno.EROFS)
    assert os.listdir("/proc/self/fd") == before
