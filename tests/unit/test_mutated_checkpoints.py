"""checkpoint/: headers and manifests that are damaged or hostile have one meaning or are refused in one line."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import PurePosixPath, PureWindowsPath
from random import Random
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import MUTATIONS
from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.layout import TensorSpec, header_nbytes, lay_out, parse_header
from partita.checkpoint.manifest import FileRecord, Manifest, manifest_text, parse_manifest
from partita.checkpoint.strict_json import MAX_DEPTH, parse_json

MANY = settings(derandomize=True, database=None, deadline=None, max_examples=400)
SEEDS = st.integers(0, 2**32 - 1)

[LAID_OUT] = lay_out(
    "model",
    [
        TensorSpec("embedding.weight", "F32", (3, 5)),
        TensorSpec("scale", "BF16", ()),
        TensorSpec("none", "I64", (0, 4)),
        TensorSpec("mask", "BOOL", (3,)),
        TensorSpec("exp_avg/\u00e9", "F32", (2, 2)),
    ],
)
HEADER = LAID_OUT.header[8:]
DATA = LAID_OUT.size - len(LAID_OUT.header)

MANIFEST = manifest_text(
    Manifest(
        tag="step12",
        step=12,
        samples=384,
        world_size=2,
        created="2026-01-31T12:00:00.123456+00:00",
        engine={"partita": "0.1.0", "stage": 3, "parameters": 1234, "loss": 2.5, "hosts": ["a", None, True]},
        files={
            "model.safetensors": FileRecord(size=30, chunks=[(8, "0123456789abcdef"), (22, "f" * 16)]),
            "state.json": FileRecord(size=7, chunks=[(7, "0" * 16)]),
            "empty": FileRecord(size=0, chunks=[]),
        },
    )
).encode()


def refusal(call: Any, *arguments: Any) -> str | None:
    """What a call refuses, None if it does not. Any other exception is a failure."""
    try:
        call(*arguments)
    except CheckpointError as error:
        text = str(error)
        assert text.isprintable() and len(text) < 400, text
        assert text.startswith("the file"), text
        return text
    return None


def check_header(head: bytes, size: int) -> bool:
    """Whether it is accepted; what is accepted says the same to the safetensors library."""
    if refusal(parse_header, head, size, "the file") is not None:
        return False
    tensors = parse_header(head, size, "the file")
    assert sum(tensor.nbytes for tensor in tensors.values()) + header_nbytes(head, size, "the file") == size
    library = dict(safetensors.deserialize(head + bytes(size - len(head))))
    assert {n: (t.dtype, list(t.shape), t.nbytes) for n, t in tensors.items()} == {
        n: (t["dtype"], t["shape"], len(t["data"])) for n, t in library.items()
    }
    return True


def check_manifest(data: bytes) -> bool:
    """Whether it is accepted; what is accepted says what JSON says, and can be written again."""
    if refusal(parse_manifest, data, "the file") is not None:
        return False
    manifest = parse_manifest(data, "the file")
    again = manifest_text(manifest)
    assert json.dumps(json.loads(again), sort_keys=True) == json.dumps(json.loads(data), sort_keys=True)
    assert parse_manifest(again.encode(), "the file") == manifest
    for name, record in manifest.files.items():
        assert PurePosixPath(name).name == PureWindowsPath(name).name == name != "manifest.json"
        assert record.size == sum(length for length, _ in record.chunks)
        assert all(length > 0 and re.fullmatch("[0-9a-f]{16}", digest) for length, digest in record.chunks)
    return True


def test_what_is_mutated_is_right_before():
    assert check_header(LAID_OUT.header, LAID_OUT.size)
    assert check_manifest(MANIFEST)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
@MANY
@given(seed=SEEDS)
def test_a_mutated_header_is_refused_or_means_what_the_library_reads(mutation, seed):
    text = mutation(Random(seed), HEADER)
    head = len(text).to_bytes(8, "little") + text
    check_header(head, len(head) + DATA)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
@MANY
@given(seed=SEEDS)
def test_a_mutated_manifest_is_refused_or_means_what_it_says(mutation, seed):
    check_manifest(mutation(Random(seed), MANIFEST))


LENGTHS = st.one_of(
    st.sampled_from([0, 1, 7, 8, len(HEADER) - 8, len(HEADER) - 1, len(HEADER) + 1, len(HEADER) + DATA]),
    st.integers(0, 63).map(lambda power: 2**power),
    st.integers(0, 2**64 - 1),
)


@MANY
@given(length=LENGTHS, size=st.one_of(st.just(LAID_OUT.size), st.integers(0, 2**64)))
def test_a_length_of_another_header_or_file_is_refused(length, size):
    """Also where the file is as large as its header says: no more is read than a header may have."""
    head = length.to_bytes(8, "little") + HEADER
    if (length, size) != (len(HEADER), LAID_OUT.size):
        assert refusal(parse_header, head, size, "the file")


@pytest.mark.parametrize("end", [*range(32), len(LAID_OUT.header) - 1])
def test_a_truncated_file_is_refused(end):
    assert refusal(parse_header, LAID_OUT.header[:end], end, "the file")
    assert refusal(parse_header, LAID_OUT.header[:end], LAID_OUT.size, "the file")


@MANY
@given(st.binary(max_size=64))
def test_any_bytes_are_refused(data):
    assert refusal(parse_manifest, data, "the file")
    assert refusal(parse_header, data, len(data), "the file") or data[8:].strip() == b"{}"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(MANY, max_examples=200)
@given(st.data())
def test_any_value_in_place_of_another_is_refused_or_means_what_it_says(data):
    content = json.loads(MANIFEST)
    key = data.draw(st.sampled_from([*content, "other"]))
    content[key] = data.draw(VALUES)
    check_manifest(json.dumps(content).encode("utf-8", "surrogatepass"))
    entries = json.loads(HEADER)
    entry = data.draw(st.sampled_from([entries, entries["scale"]]))
    entry[data.draw(st.sampled_from([*entry, "other"]))] = data.draw(VALUES)
    text = json.dumps(entries).encode()
    check_header(len(text).to_bytes(8, "little") + text, 8 + len(text) + DATA)


HOSTILE = {
    "levels": b"[" * 5_000_000,
    "closed levels": b"[" * 1_000_000 + b"]" * 1_000_000,
    "levels of objects": b'{"":' * 1_000_000,
    "a long number": b"[" + b"9" * 5_000_000 + b"]",
    "a long fraction": b"[0." + b"9" * 5_000_000 + b"]",
    "a long exponent": b"[1e" + b"9" * 5_000_000 + b"]",
    "a long name": b'{"' + b"x" * 5_000_000 + b'":1,"' + b"x" * 5_000_000 + b'":1}',
    "no end": b'{"' + b"\\u0000" * 1_000_000,
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_memory_is_a_small_multiple_of_the_file(data):
    tracemalloc.start()
    assert refusal(parse_json, data, "the file")
    assert refusal(parse_manifest, data, "the file")
    assert refusal(parse_header, len(data).to_bytes(8, "little") + data, 8 + len(data), "the file")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * len(data) + 2**20


def test_the_depth_does_not_hang_on_the_callers_stack():
    """The limit is the file's, however deep the program is."""

    def levels(count: int) -> bytes:
        return b"[" * count + b"]" * count

    def from_below(depth: int, data: bytes) -> Any:
        return from_below(depth - 1, data) if depth else parse_json(data, "the file")

    from_below(300, levels(MAX_DEPTH))
    assert refusal(from_below, 300, levels(MAX_DEPTH + 1))
    assert refusal(parse_json, levels(MAX_DEPTH + 1), "the file")
