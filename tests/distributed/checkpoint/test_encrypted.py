"""C8: encrypted checkpoints: other ranks and stages read the same bits; whatever was changed or swapped is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import partita
import pytest
from partita.checkpoint import CheckpointError
from resumed import Model, config_for, differences, engine_for, take_steps, train_and_save, whole_state

KEY, OTHER_KEY = bytes(range(32)).hex(), bytes(range(32, 64)).hex()
NAME = "PARTITA_TEST_KEY"
TAG = "global_step3"
SEALED = {"checkpoint": {"encryption": {"key_env": NAME}}}


def with_key(key: str | None, function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function with this key in the environment."""
    os.environ.pop(NAME, None)
    if key is not None:
        os.environ[NAME] = key
    try:
        return function(*args)
    finally:
        os.environ.pop(NAME, None)


def config(ranks: int, stage: int, precision: str = "split", sealed: bool = True) -> dict[str, Any]:
    return config_for(ranks, stage, precision, **(SEALED if sealed else {}))


def save(folder: str, ranks: int, stage: int, steps: int) -> dict[str, Any]:
    return with_key(KEY, train_and_save, folder, config(ranks, stage), "AdamW", steps)  # type: ignore[no-any-return]


def _load(folder: str, ranks: int, stage: int) -> dict[str, Any]:
    engine = engine_for(config(ranks, stage), seed=2)
    engine.load_checkpoint(folder)
    state = whole_state(engine, "AdamW")
    engine.destroy()
    return state


def load(folder: str, ranks: int, stage: int) -> dict[str, Any]:
    return with_key(KEY, _load, folder, ranks, stage)  # type: ignore[no-any-return]


def _at_the_start() -> str:
    with pytest.raises(CheckpointError) as raised:
        partita.initialize(model=Model(seed=1), config=config(2, 2))
    return str(raised.value)


def said_at_the_start(key: str | None) -> str:
    return with_key(key, _at_the_start)  # type: ignore[no-any-return]


def _refused(folder: str, sealed: bool) -> tuple[str, list[str]]:
    engine = engine_for(config(2, 2, sealed=sealed), seed=2)
    take_steps(engine, 1)
    before = whole_state(engine, "AdamW")
    with pytest.raises(CheckpointError) as raised:
        engine.load_checkpoint(folder, TAG)
    changed = differences(whole_state(engine, "AdamW"), before)
    engine.destroy()
    return str(raised.value), changed


def refused(folder: str, key: str | None, sealed: bool = True) -> tuple[str, list[str]]:
    return with_key(key, _refused, folder, sealed)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def saved(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with two encrypted checkpoints, and the state of the newer one."""
    folder = tmp_path_factory.mktemp("saved")
    ranks(2).run(save, str(folder), 2, 2, 2)
    return folder, ranks(2).run(save, str(folder), 2, 2, 3)[0]


@pytest.fixture
def copy(saved: tuple[Path, Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "copy"))


def says(ranks: Any, folder: Path, key: str | None = KEY, sealed: bool = True) -> str:
    """The one line with which all ranks refuse a checkpoint, of which nothing was loaded."""
    first, second = ranks(2).run(refused, str(folder), key, sealed)
    assert first == second and first[1] == []
    assert "\n" not in first[0]
    return str(first[0])


@pytest.mark.parametrize(("count", "stage"), [(1, 0), (2, 3), (3, 2)])
def test_other_ranks_and_stages_read_the_same_bits(ranks, saved, count, stage):
    folder, state = saved
    for there in ranks(count).run(load, str(folder), count, stage):
        assert differences(there, state) == []


def test_nothing_is_on_the_disk_in_the_clear(saved):
    folder, state = saved
    words = [name.split(" ", 1)[1].encode() for name in state if name.startswith("weight ")]
    words += [b"data_offsets", b"exp_avg", b"sections", b"client_state", b"kept", KEY.encode(), bytes.fromhex(KEY)]
    values = [v.contiguous().view(-1).numpy().tobytes()[:32] for n, v in state.items() if n.startswith("master ")]
    words += [value for value in values if len(value) == 32 and any(value)]
    for path in folder.rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        assert [word for word in words if len(word) > 3 and word in data] == [], path


def test_nonces_are_never_the_same(saved):
    nonces = []
    for path in saved[0].glob("*/manifest.json"):
        content = json.loads(path.read_bytes())
        nonces += [seal[:24] for record in content["files"].values() for seal in record["seals"]]
    assert len(nonces) > 20 and len(set(nonces)) == len(nonces)


def test_a_wrong_or_missing_key_is_one_line_on_all_ranks(ranks, saved):
    assert "does not hold the key" in says(ranks, saved[0], OTHER_KEY)
    assert "no key was given" in says(ranks, saved[0], KEY, sealed=False)


@pytest.mark.parametrize(("key", "words"), [(None, "is not set"), ("not a key", "new-key"), (KEY + "0", "new-key")])
def test_a_missing_or_malformed_key_is_found_at_the_start(ranks, key, words):
    """Not at the first save."""
    first, second = ranks(2).run(said_at_the_start, key)
    assert first == second and NAME in first and words in first
    assert "\n" not in first and (key is None or key not in first)


def _at(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def _digests_made_right(folder: Path, name: str) -> None:
    """As somebody does who has no key and knows the format."""
    import xxhash

    path = folder / "manifest.json"
    content = json.loads(path.read_bytes())
    data, end = (folder / name).read_bytes(), 0
    for chunk in content["files"][name]["chunks"]:
        chunk[1] = xxhash.xxh3_64_hexdigest(data[end : end + chunk[0]])
        end += chunk[0]
    path.write_text(json.dumps(content))


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / TAG / "manifest.json"
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


def _swap_seals(content: dict[str, Any]) -> None:
    seals = content["files"]["optimizer.safetensors"]["seals"]
    seals[1], seals[2] = seals[2], seals[1]


def _older_file(folder: Path) -> None:
    shutil.copy(folder / "global_step2" / "optimizer.safetensors", folder / TAG / "optimizer.safetensors")
    older = json.loads((folder / "global_step2" / "manifest.json").read_bytes())["files"]["optimizer.safetensors"]
    changed(folder, lambda content: content["files"].update({"optimizer.safetensors": older}))


def _older_checkpoint(folder: Path) -> None:
    shutil.rmtree(folder / TAG)
    shutil.copytree(folder / "global_step2", folder / TAG)


def _flip(folder: Path) -> None:
    path = folder / TAG / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    _digests_made_right(folder / TAG, path.name)


ATTACKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte and its digest": (_flip, "was changed"),
    "the step": (lambda f: changed(f, lambda c: c.update(step=7)), "was changed"),
    "the time": (lambda f: changed(f, lambda c: c.update(created="2030-01-01T00:00:00Z")), "was changed"),
    "the tag": (lambda f: changed(f, lambda c: c.update(tag="other")), "was changed"),
    "seals": (lambda f: changed(f, _swap_seals), "was changed"),
    "a file is left out": (lambda f: changed(f, lambda c: c["files"].pop("model.safetensors")), "was changed"),
    "the wrapped key": (lambda f: changed(f, lambda c: c["encryption"].update(key="00" * 60)), "was changed"),
    "the id": (lambda f: changed(f, lambda c: c["encryption"].update(id="00" * 16)), "was changed"),
    "an older file": (_older_file, "was changed"),
    "an older checkpoint": (_older_checkpoint, "'global_step2' under another name"),
}


FALLS_BACK = {"a byte and its digest": True, "seals": True, "the step": True, "an older checkpoint": False}
FALLS_BACK |= {"the wrapped key": False}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_was_tampered_with_is_refused(ranks, copy, name):
    attack, words = ATTACKS[name]
    attack(copy)
    message = says(ranks, copy)
    assert words in message and str(copy / TAG) in message


@pytest.mark.parametrize(("name", "falls_back"), FALLS_BACK.items())
def test_what_the_key_shows_to_be_changed_is_a_reason_to_fall_back(ranks, copy, name, falls_back):
    """What another key may have made, or what is another checkpoint, is none."""
    ATTACKS[name][0](copy)
    first, second = ranks(2).run(with_key, KEY, _fallen_back, str(copy))
    assert first == second
    assert first == ("global_step2" if falls_back else "")


def _fallen_back(folder: str) -> str:
    engine = engine_for(config(2, 2), seed=2)
    try:
        return engine.load_checkpoint(folder, TAG, fallback=True)[0].name  # type: ignore[no-any-return]
    except CheckpointError:
        return ""
    finally:
        engine.destroy()


def test_reading_back_compares_what_is_encrypted(copy):
    """Without ranks, as for the next test."""
    from partita.checkpoint import Protection, verify_together
    from partita.checkpoint.user_key import parse_key
    from partita.comm import SingleProcess

    protection = Protection(key=parse_key(KEY, "the key"))
    verify_together(SingleProcess(), copy / TAG, protection)
    _flip(copy)
    with pytest.raises(CheckpointError, match="was changed"):
        verify_together(SingleProcess(), copy / TAG, protection)


def test_a_plain_checkpoint_is_not_taken_for_an_encrypted_one(ranks, tmp_path):
    ranks(2).run(train_and_save, str(tmp_path), config(2, 2, sealed=False))
    assert "is not encrypted" in says(ranks, tmp_path)


def test_any_changed_byte_of_a_manifest_is_refused(copy):
    """Without ranks: what opens manifests is one function."""
    from partita.checkpoint import Protection, find
    from partita.checkpoint.user_key import parse_key

    protection, path = Protection(key=parse_key(KEY, "the key")), copy / TAG / "manifest.json"
    data, random = path.read_bytes(), Random(1)
    assert protection.opened(find(copy, TAG)) is not None
    for _ in range(150):
        place = random.randrange(len(data))
        other = bytes([random.choice(b"0123456789abcdef")])
        if data[place : place + 1] != other and not data[place : place + 1].isspace():
            path.write_bytes(data[:place] + other + data[place + 1 :])
            with pytest.raises(CheckpointError):
                protection.opened(find(copy, TAG))
