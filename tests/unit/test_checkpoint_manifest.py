"""checkpoint/manifest.py and strict_json.py: what a manifest says, and one clear line about what it may not say."""

from __future__ import annotations

import json
from typing import Any

import pytest
from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.layout import MIN_CHUNK_BYTES
from partita.checkpoint.manifest import FileRecord, Manifest, manifest_text, parse_manifest, plain_name
from partita.checkpoint.strict_json import parse_json
from pydantic import ValidationError

DIGEST = "0123456789abcdef"
FACTS: dict[str, Any] = {
    "tag": "step12",
    "step": 12,
    "samples": 384,
    "world_size": 2,
    "created": "2026-01-31T12:00:00.123456+00:00",
    "engine": {"partita": "0.1.0", "stage": 3, "parameters": 2**40, "hosts": ["h\u00f6st", None, True, 0.5]},
}


def manifest(**changes: Any) -> Manifest:
    record = FileRecord(size=30, chunks=[(8, DIGEST), (22, "f" * 16)])
    files = {"model.safetensors": record, "empty": FileRecord(size=0, chunks=[])}
    return Manifest(**{**FACTS, "files": files, **changes})


def content(**changes: Any) -> bytes:
    return json.dumps({**json.loads(manifest_text(manifest())), **changes}).encode()


def refused(data: bytes) -> str:
    with pytest.raises(CheckpointError) as error:
        parse_manifest(data, "c/step12/manifest.json")
    text = str(error.value)
    assert text.startswith("c/step12/manifest.json: ")
    assert text.isprintable()
    return text.removeprefix("c/step12/manifest.json: ")


def test_what_is_written_is_read():
    text = manifest_text(manifest())
    assert parse_manifest(text.encode(), "here") == manifest()
    assert manifest_text(parse_manifest(text.encode(), "here")) == text
    assert (manifest().format, manifest().version) == ("partita-checkpoint", 1)


def test_a_checkpoint_without_files_is_read():
    assert parse_manifest(manifest_text(manifest(files={})).encode(), "here").files == {}


def test_the_text_has_a_line_per_fact_and_per_file():
    lines = manifest_text(manifest()).splitlines()
    assert lines[1:4] == [' "format": "partita-checkpoint",', ' "version": 1,', ' "tag": "step12",']
    assert f'  "model.safetensors": {{"size":30,"chunks":[[8,"{DIGEST}"],[22,"{"f" * 16}"]]}},' in lines


def test_a_manifest_does_not_change():
    with pytest.raises(ValidationError):
        manifest().step = 13
    with pytest.raises(ValidationError):
        manifest().files["empty"].size = 1


def test_two_hundred_thousand_chunks_are_read():
    """70 billion parameters: bf16 weights, and masters and two moments in fp32."""
    record = FileRecord(size=2000 * MIN_CHUNK_BYTES, chunks=[(MIN_CHUNK_BYTES, DIGEST)] * 2000)
    large = manifest(files={f"optimizer-{i:05d}-of-00100.safetensors": record for i in range(100)})
    assert parse_manifest(manifest_text(large).encode(), "here") == large


@pytest.mark.parametrize("version", [3, 7, 2**62])
def test_a_newer_version_says_to_update(version):
    """Whatever else is new."""
    says = refused(content(version=version, more={"deep": [1]}, files="elsewhere"))
    assert says == (f"this checkpoint has format version {version}, this Partita reads up to 2: update Partita")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": "other"}, "no manifest of a Partita checkpoint ('format' is not 'partita-checkpoint')"),
        ({"version": 0}, "'version' is 0, not a number from 1"),
        ({"version": True}, "'version' is True, not a number from 1"),
        ({"version": "1"}, "'version' is '1', not a number from 1"),
        ({"step": -1}, "step: Input should be greater than or equal to 0"),
        ({"step": 1.0}, "step: Input should be a valid integer"),
        ({"step": "1"}, "step: Input should be a valid integer"),
        ({"step": True}, "step: Input should be a valid integer"),
        ({"step": 2**63}, "the number 9223372036854775808 has more than 64 bits"),
        ({"world_size": 0, "samples": -1}, "samples: Input should be greater than or equal to 0 (and 1 more)"),
        ({"more": 1}, "more: Extra inputs are not permitted"),
        ({"m\n\u00e9": 1}, "m\\n\\xe9: Extra inputs are not permitted"),
        ({"created": "yesterday"}, "created: 'yesterday' is no time in UTC such as 2026-01-31T12:00:00Z"),
        ({"created": "2026-02-30T12:00:00Z"}, "created: '2026-02-30T12:00:00Z' is no time in UTC"),
        ({"created": "2026-01-31T12:00:00+01:00"}, "created: '2026-01-31T12:00:00+01:00' is no time in UTC"),
        ({"tag": "../x"}, "tag: '../x' is not the name of a file in this folder"),
        ({"engine": []}, "engine: Input should be a valid dictionary"),
        ({"files": []}, "files: Input should be a valid dictionary"),
        ({"files": {"a": {"size": 0}}}, "files.a.chunks: Field required"),
        ({"files": {"a": {"size": 0, "chunks": [], "more": 1}}}, "files.a.more: Extra inputs are not permitted"),
        ({"files": {"../a": {"size": 0, "chunks": []}}}, "files: '../a' is not the name of a file in this folder"),
        ({"files": {"manifest.json": {"size": 0, "chunks": []}}}, "files: 'manifest.json' cannot have its own digest"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_a_fact_that_cannot_be_is_refused_by_name(changes, says):
    assert refused(content(**changes)).startswith(says)


@pytest.mark.parametrize("missing", ["format", "version", "tag", "step", "samples", "created", "engine", "files"])
def test_a_fact_that_is_missing_is_named(missing):
    left = json.loads(content())
    del left[missing]
    assert missing in refused(json.dumps(left).encode())


@pytest.mark.parametrize(
    ("size", "chunks", "says"),
    [
        (31, [[30, DIGEST]], "its chunks have 30 bytes, but its size is 31"),
        (1, [], "its chunks have 0 bytes, but its size is 1"),
        (0, [[0, DIGEST]], "chunk 0 has the length 0"),
        (1, [[2, DIGEST], [-1, DIGEST]], "chunk 1 has the length -1"),
        (1, [[1.0, DIGEST]], "chunk 0 has the length 1.0"),
        (1, [[True, DIGEST]], "chunk 0 has the length True"),
        (1, [[1, DIGEST.upper()]], "chunk 0 has the digest '0123456789ABCDEF', not 16 hex digits"),
        (1, [[1, DIGEST[1:]]], "chunk 0 has the digest '123456789abcdef'"),
        (1, [[1, DIGEST + "\n"]], "chunk 0 has the digest '0123456789abcdef\\n'"),
        (1, [[1, "\u0661" * 16]], "chunk 0 has the digest '\\u0661"),
        (1, [[1, 7]], "chunk 0 has the digest 7"),
        (1, [[1]], "chunk 0 is not [length, digest]"),
        (1, [[1, DIGEST, 1]], "chunk 0 is not [length, digest]"),
        (1, ["1a"], "chunk 0 is not [length, digest]"),
        (1, {"1": DIGEST}, "the chunks are no list"),
    ],
)
def test_chunks_that_are_not_the_file_are_refused(size, chunks, says):
    text = refused(content(files={"state.json": {"size": size, "chunks": chunks}}))
    assert text.removeprefix("files.state.json.chunks: ").removeprefix("files.state.json: ").startswith(says)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not JSON at byte 0: Expecting value"),
        (b"[]", "no manifest of a Partita checkpoint"),
        (b'{"a": 1, "a": 1}', "the key 'a' is written twice"),
        (b'{"x": {"b\\n": 1, "b\\n": 1}}', "the key 'b\\n' is written twice"),
        ('{"\u00e9": 1 2}'.encode(), "not JSON at byte 9: Expecting ',' delimiter"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1e999}', "the number 1e999 is no 64-bit number"),
        (b'{"a": -0}', "-0 is written, which is no integer"),
        (b'{"a": -9223372036854775809}', "the number -9223372036854775809 has more than 64 bits"),
        (b'{"a": ' + b"1" * 5000 + b"}", "the number 111111111111111111111111... has more than 64 bits"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7: invalid start byte"),
        (b'{"a": "\\ud83d"}', "not Unicode: half of a surrogate pair"),
        (b'\xef\xbb\xbf{"a": 1}', "not JSON at byte 0: Unexpected UTF-8 BOM"),
        (b"[" * 101 + b"]" * 101, "nested deeper than 100 levels"),
        (b"[" * 100_000, "nested deeper than 100 levels"),
    ],
)
def test_json_of_two_meanings_is_refused(data, says):
    assert refused(data).startswith(says)


def test_numbers_and_characters_at_the_limits_are_read():
    text = r'{"a": [9223372036854775807, -9223372036854775808, -0.0, 1e308, "\ud83d\ude00", "\\ud800"]}'
    assert parse_json(text.encode(), "here") == json.loads(text)


@pytest.mark.parametrize("fact", [float("nan"), 2**64, "\ud800", {"deep": [[[1e400]]]}])
def test_facts_that_could_not_be_read_back_are_not_written(fact):
    with pytest.raises(ValidationError, match="engine"):
        manifest(engine={"fact": fact})


@pytest.mark.parametrize(
    "name", ["a", "...", ".hidden", "model-00001-of-00002.safetensors", "a b", "\u00e9", "x" * 255]
)
def test_plain_names_are_taken(name):
    assert plain_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "/",
        "a/b",
        "/a",
        "a/",
        "..\\a",
        "a\\b",
        "a\0",
        "a\n",
        "\x7f",
        "\x85",
        "\ud800",
        "x" * 256,
        "\u00e9" * 128,
    ],
)
def test_names_of_other_places_are_refused(name):
    with pytest.raises(ValueError, match=r"name") as error:
        plain_name(name)
    assert str(error.value).isprintable()
