"""checkpoint/: keys and their sources, modes of files under any umask, an audit log in which nothing changes unseen."""

from __future__ import annotations

import base64
import json
import os
import stat
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from checkpoints import content, manifest_bytes
from partita.checkpoint import GROUP, OWNER, CheckpointError, KeySource, audit, check_audit, checkpoints, new_key
from partita.checkpoint.commit import Staging, write_durably
from partita.checkpoint.disk import Access
from partita.checkpoint.reads import Chunk, Reads
from partita.checkpoint.sealing import TAG_BYTES, Cipher, unwrapped
from partita.checkpoint.transfer import Transfer
from partita.checkpoint.user_key import UserKey, parse_key
from resumed import config_for, engine_for, take_steps

KEY, OTHER = new_key(), new_key()


def user_key(text: str = KEY) -> UserKey:
    return parse_key(text, "the key")


# -- keys


def test_a_key_is_hex_or_base64():
    data = bytes.fromhex(KEY)
    for text in (
        KEY,
        KEY.upper(),
        f" {KEY}\n",
        base64.b64encode(data).decode(),
        base64.urlsafe_b64encode(data).decode(),
    ):
        assert parse_key(text, "the key").data == data
    assert KEY not in repr(user_key()) and repr(data) not in repr(user_key())


@pytest.mark.parametrize(
    "text",
    ["", " \n", KEY[:-1], KEY + "0", "correct horse battery staple", "0" * 64, "ab" * 32, "A" * 43 + "="],
)
def test_what_is_no_random_key_is_refused_and_not_shown(text):
    with pytest.raises(CheckpointError) as raised:
        parse_key(text, "the key")
    assert "new-key" in str(raised.value) and "\n" not in str(raised.value)
    assert not text.strip() or text.strip() not in str(raised.value)


def test_the_three_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", KEY)
    file = tmp_path / "key"
    file.write_text(KEY)
    file.chmod(0o600)
    for source in (KeySource(env="A_KEY"), KeySource(file=str(file)), KeySource(command=f"cat '{file}'")):
        assert source.read().data == bytes.fromhex(KEY)
    for given in ({}, {"env": "A", "file": "b"}):
        with pytest.raises(ValueError, match="one source"):
            KeySource(**given)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_file_that_others_can_read_is_refused(tmp_path, mode):
    file = tmp_path / "key"
    file.write_text(KEY)
    file.chmod(mode)
    with pytest.raises(CheckpointError, match="chmod 600"):
        KeySource(file=str(file)).read()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (KeySource(env="NOT_SET_AT_ALL"), "NOT_SET_AT_ALL, which is to hold the key, is not set"),
        (KeySource(file="/no/where"), "'/no/where' cannot be read"),
        (KeySource(file="/dev/zero"), "no regular file"),
        (KeySource(command="false secret"), "'false' failed with exit code 1"),
        (KeySource(command="no-such-program secret"), "'no-such-program' cannot be run"),
        (KeySource(command="echo 'secret"), "'echo' is no command"),
        (KeySource(command="head -c 9999 /dev/zero"), "'head' holds no key"),
    ],
)
def test_a_source_that_gives_nothing_is_named(source, words):
    with pytest.raises(CheckpointError) as raised:
        source.read()
    assert words in str(raised.value) and "secret" not in str(raised.value)


# -- seals


def test_a_chunk_opens_at_its_place_and_nowhere_else():
    cipher, other, random = Cipher.new(), Cipher.new(), Random(1)
    for length in (1, 15, 16, 17, 1000):
        data = random.randbytes(length)
        sealed, seal = cipher.seal_bytes("a", 100, data)
        assert len(sealed) == length and cipher.open_bytes("a", 100, sealed, seal) == data
        for file, offset in (("b", 100), ("a", 101), ("a", 0)):
            assert cipher.open_bytes(file, offset, sealed, seal) is None
        assert other.open_bytes("a", 100, sealed, seal) is None
        assert cipher.open_bytes("a", 100, sealed[:-1], seal) is None
        for place in range(28):
            wrong = bytearray(seal)
            wrong[place] ^= 1 << random.randrange(8)
            assert cipher.open_bytes("a", 100, sealed, bytes(wrong)) is None


def test_what_does_not_open_leaves_nothing_in_the_clear():
    cipher = Cipher.new()
    sealed, seal = cipher.seal_bytes("a", 0, b"words" * 100)
    room, into = bytearray(sealed + bytes(TAG_BYTES)), bytearray(500)
    assert not cipher.open("a", 1, seal, memoryview(room), memoryview(into))
    assert into == bytes(500)


def test_a_data_key_opens_with_its_user_key_only():
    cipher = Cipher.new()
    wrapped = cipher.wrapped_for(user_key())
    assert unwrapped(wrapped, cipher.id, user_key()) is not None
    assert unwrapped(wrapped, cipher.id, user_key(OTHER)) is None
    assert unwrapped(wrapped, Cipher.new().id, user_key()) is None
    sealed, seal = cipher.seal_bytes("a", 0, b"data")
    opened = unwrapped(wrapped, cipher.id, user_key())
    assert opened is not None and opened.open_bytes("a", 0, sealed, seal) == b"data"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_parts_of_encrypted_chunks_are_read(tmp_path, dtype):
    """Chunks of many sizes, read whole and in parts."""
    cipher, generator = Cipher.new(), torch.Generator().manual_seed(1)
    values = torch.randint(0, 200, (5000,), generator=generator, dtype=torch.int32, device="cpu").to(dtype)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    with Transfer(1024, seals=lambda i, *rest: cipher.seal("file", *rest)) as transfer:
        transfer.write(fd, 24, values, (0, "values"))
        done = transfer.finish()
    assert all(seal for *_, seal in done) and sum(chunk[2] for chunk in done) == values.nbytes
    size = values.element_size()
    for first, last in [(0, 5000), (3, 4), (100, 3333)]:
        found = torch.empty(last - first, dtype=dtype, device="cpu")
        with Reads() as reads:
            for _, offset, length, digest, seal in done:
                begin, end = max(offset, 24 + first * size), min(offset + length, 24 + last * size)
                if begin < end:
                    part = found.view(torch.uint8)[begin - 24 - first * size : end - 24 - first * size]
                    opens = partial(cipher.open, "file", offset, bytes.fromhex(seal))
                    reads.read(Chunk(fd, offset, length, digest, "values", opens), begin - offset, part)
            reads.finish()
        assert torch.equal(found, values[first:last])
    os.close(fd)


# -- modes


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize("access", [OWNER, GROUP])
def test_modes_do_not_hang_on_the_umask(tmp_path, umask, access):
    before = os.umask(umask)
    try:
        staging = Staging(tmp_path / "new", "a", access)
        staging.create()
        for name, data in content(1).items():
            write_durably(staging.path / name, data, access.file)
        write_durably(staging.path / "manifest.json", manifest_bytes("a", 1), access.file)
        staging.publish()
    finally:
        os.umask(before)
    for path in [tmp_path / "new", *(tmp_path / "new").rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (access.folder if path.is_dir() else access.file), path
    assert len(checkpoints(tmp_path / "new")) == 1


@pytest.mark.parametrize("umask", [0o000, 0o077])
@pytest.mark.parametrize("group", [False, True])
def test_an_engine_saves_for_its_owner_or_the_group(tmp_path, monkeypatch, umask, group):
    monkeypatch.setenv("A_KEY", KEY)
    config = config_for(1, 1, "split", checkpoint={"encryption": {"key_env": "A_KEY"}, "group_access": group})
    engine = engine_for(config, seed=1)
    take_steps(engine, 1)
    before = os.umask(umask)
    try:
        engine.save_checkpoint(tmp_path / "saved")
    finally:
        os.umask(before)
    engine.destroy()
    access = GROUP if group else OWNER
    places = [tmp_path / "saved", *(tmp_path / "saved").rglob("*")]
    assert len(places) == 9
    for path in places:
        assert stat.S_IMODE(path.stat().st_mode) == (access.folder if path.is_dir() else access.file), path


# -- the audit log


def filled(folder: Path, lines: int = 6) -> list[str]:
    """A log of some lines."""
    for number in range(lines):
        audit.append(folder, user_key(), audit.Event("loaded", f"step{number}"))
    return (folder / audit.LOG).read_text().splitlines(keepends=True)


def test_a_log_says_who_did_what(tmp_path):
    filled(tmp_path)
    checked = check_audit(tmp_path, user_key())
    assert checked.problems == [] and [line.number for line in checked.lines] == [1, 2, 3, 4, 5, 6]
    line = checked.lines[3]
    assert (line.what, line.tag, line.uid, line.pid) == ("loaded", "step3", os.geteuid(), os.getpid())
    with pytest.raises(CheckpointError, match="does not hold the key"):
        check_audit(tmp_path, user_key(OTHER))
    with pytest.raises(CheckpointError, match="does not hold the key"):
        audit.append(tmp_path, user_key(OTHER), audit.Event("loaded", "a"))


def _forged(line: str) -> str:
    return json.dumps({**json.loads(line), "user": "nobody"}) + "\n"


TAMPERED: dict[str, Any] = {
    "changed": (lambda t: [*t[:2], _forged(t[2]), *t[3:]], "line 3 was changed"),
    "removed": (lambda t: [*t[:2], *t[3:]], "number 3 is missing"),
    "two removed": (lambda t: [*t[:2], *t[4:]], "numbers 3 to 4 are missing"),
    "the first is removed": (lambda t: t[1:], "number 1 is missing"),
    "inserted": (lambda t: [*t[:2], _forged(t[2]), *t[2:]], "line 3 was inserted"),
    "copied": (lambda t: [*t[:4], t[1], *t[4:]], "line 5 is number 2"),
    "moved": (lambda t: [*t[:2], t[3], t[2], *t[4:]], "number 3"),
    "cut at the end": (lambda t: t[:-1], "number 6 is missing"),
    "two cut at the end": (lambda t: t[:-2], "numbers 5 to 6 are missing"),
    "half a line at the end": (lambda t: [*t[:-1], t[-1][:50]], "line 6 was changed"),
    "all is gone": (lambda t: [], "numbers 1 to 6 are missing"),
    "garbage behind": (lambda t: [*t, "garbage\n"], "line 7 was inserted"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_what_was_done_to_a_log_is_found(tmp_path, name):
    """Also when lines were added later."""
    change, words = TAMPERED[name]
    texts = filled(tmp_path)
    (tmp_path / audit.LOG).write_text("".join(change(texts)))
    assert any(words in problem for problem in check_audit(tmp_path, user_key()).problems)
    audit.append(tmp_path, user_key(), audit.Event("saved", "later"))
    checked = check_audit(tmp_path, user_key())
    assert checked.problems and checked.lines[-1].number == 7


def test_any_changed_bit_of_a_log_is_found(tmp_path):
    filled(tmp_path)
    path, random = tmp_path / audit.LOG, Random(2)
    data = path.read_bytes()
    for _ in range(200):
        changed = bytearray(data)
        changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
        path.write_bytes(changed)
        assert check_audit(tmp_path, user_key()).problems, bytes(changed)


def test_a_line_of_a_process_that_died_before_the_head_is_taken_on(tmp_path):
    filled(tmp_path, 2)
    head = (tmp_path / audit.HEAD).read_bytes()
    audit.append(tmp_path, user_key(), audit.Event("loaded", "third"))
    (tmp_path / audit.HEAD).write_bytes(head)
    audit.append(tmp_path, user_key(), audit.Event("loaded", "fourth"))
    checked = check_audit(tmp_path, user_key())
    assert checked.problems == [] and [line.tag for line in checked.lines][2:] == ["third", "fourth"]


def test_a_changed_or_missing_head_is_refused(tmp_path):
    filled(tmp_path)
    head = json.loads((tmp_path / audit.HEAD).read_bytes())
    (tmp_path / audit.HEAD).write_text(json.dumps({**head, "number": 2}))
    with pytest.raises(CheckpointError, match="was changed"):
        check_audit(tmp_path, user_key())
    (tmp_path / audit.HEAD).unlink()
    with pytest.raises(CheckpointError, match=r"audit\.head"):
        audit.append(tmp_path, user_key(), audit.Event("loaded", "a"))


def test_a_log_can_have_another_key(tmp_path):
    filled(tmp_path)
    audit.rewrap(tmp_path, user_key(), user_key(OTHER))
    audit.append(tmp_path, user_key(OTHER), audit.Event("rekeyed", "a"), Access(0o640, 0o750))
    assert check_audit(tmp_path, user_key(OTHER)).problems == []
    with pytest.raises(CheckpointError, match="does not hold the key"):
        check_audit(tmp_path, user_key())
