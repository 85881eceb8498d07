"""carry_over(): what a program has put into a checkpoint's folder is also in the next checkpoint of the tag."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from checkpoints import FOREIGN, add_foreign, content, fill, save, version_of
from partita.checkpoint.carry import carry_over
from partita.checkpoint.commit import Staging
from partita.checkpoint.folder import find
from partita.checkpoint.manifest import MANIFEST


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_files_of_a_program_outlive_the_checkpoint_beside_which_they_were_put(tmp_path):
    """Such as those of tokenizer.save_pretrained(), while a run saves to one tag again and again."""
    folder = save(tmp_path, "a", 1)
    add_foreign(folder)
    inode = (folder / "config.json").stat().st_ino
    for version in (2, 3):
        save(tmp_path, "a", version)
        assert version_of(find(tmp_path, "a")) == version
        assert names(folder) == sorted([*content(version), *FOREIGN, MANIFEST])
    assert (folder / "config.json").stat().st_ino == inode, "it was copied where it could be linked"


def test_a_file_of_the_new_checkpoint_is_not_replaced_by_one_of_a_program(tmp_path):
    folder = save(tmp_path, "a", 1)
    (folder / "optimizer-2.safetensors").write_bytes(b"mine")
    save(tmp_path, "a", 2)
    assert version_of(find(tmp_path, "a")) == 2


@pytest.mark.parametrize("damage", ["cut", "gone", "no manifest"])
def test_of_a_damaged_checkpoint_the_files_of_a_program_are_kept_and_no_others(tmp_path, damage):
    folder = save(tmp_path, "a", 1)
    add_foreign(folder)
    if damage == "gone":
        (folder / "model.safetensors").unlink()
    else:
        (folder / MANIFEST).write_bytes(b"" if damage == "cut" else b"{}")
    save(tmp_path, "a", 2)
    assert names(folder) == sorted([*content(2), *FOREIGN, MANIFEST])


def test_what_is_no_visible_file_is_not_carried_over(tmp_path, caplog):
    directory = tmp_path / "checkpoints"
    (tmp_path / "outside").write_text("kept")
    folder = save(directory, "a", 1)
    (folder / ".hidden").write_text("")
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "deep").mkdir()
    (folder / "deep" / "file").write_text("")
    os.mkfifo(folder / "pipe")
    save(directory, "a", 2)
    assert names(folder) == sorted([*content(2), MANIFEST])
    for name in ("link", "deep", "pipe"):
        assert f"'{folder / name}' is not in the new checkpoint" in caplog.text
    assert ".hidden" not in caplog.text
    assert (tmp_path / "outside").read_text() == "kept"


def test_a_failed_save_leaves_the_files_where_they_are(tmp_path):
    add_foreign(save(tmp_path, "a", 1))
    staging = Staging(tmp_path, "a")
    staging.create()
    fill(staging.path, "a", 2)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    with pytest.raises(Exception, match="latest"):
        staging.publish()
    staging.discard()
    assert names(tmp_path / "a") == sorted([*content(1), *FOREIGN, MANIFEST])


def test_what_cannot_be_linked_is_copied(tmp_path):
    """Two file systems stand for one that has no hard links."""
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system")
    add_foreign(save(tmp_path, "a", 1))
    (tmp_path / "a" / "config.json").chmod(0o640)
    new = elsewhere / f"partita-{os.getpid()}"
    new.mkdir()
    try:
        carry_over(tmp_path, "a", new)
        assert {path.name: path.read_bytes() for path in new.iterdir()} == FOREIGN
        assert (new / "config.json").stat().st_mode & 0o777 == 0o640
    finally:
        for path in new.iterdir():
            path.unlink()
        new.rmdir()
