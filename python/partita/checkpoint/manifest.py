"""What a checkpoint consists of: every file with its size and the digests of its chunks. Pure."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainValidator,
    ValidationError,
    model_validator,
)

from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.layout import LENGTH_BYTES, MAX_CHUNK_BYTES, MAX_HEADER_BYTES
from partita.checkpoint.sealing import CIPHER, ID_BYTES, SEAL_BYTES, WRAPPED_BYTES
from partita.checkpoint.strict_json import parse_json, shown

MANIFEST = "manifest.json"
FORMAT: Literal["partita-checkpoint"] = "partita-checkpoint"
VERSION = 1
ENCRYPTED_VERSION = 2  # of a checkpoint that is encrypted
# A header is one chunk, whatever its size.
MAX_FIRST_BYTES = MAX_HEADER_BYTES + LENGTH_BYTES
# Some nine million chunks, 75 TB.
MAX_MANIFEST_BYTES = 256 * 2**20
_MAX_NAME_BYTES = 255
_HASH_BYTES = 32
_HEX = re.compile(r"[0-9a-f]*", re.ASCII)
_MOMENT = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d{1,6})?(Z|\+00:00)", re.ASCII)

Count = Annotated[int, Field(ge=0, lt=2**63)]


def plain_name(name: str) -> str:
    """The name of something that lies in a folder, if it can be no other place.

    Raises:
        ValueError: it is empty, ".", "..", longer than 255 bytes, or has a separator or a control character.
    """
    if not name or name in (".", "..") or "/" in name or "\\" in name:
        raise ValueError(f"{shown(name)} is not the name of a file in this folder")
    if any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in name):
        raise ValueError(f"the name {shown(name)} has a control character")
    if len(name.encode("utf-8")) > _MAX_NAME_BYTES:
        raise ValueError(f"the name {shown(name)} is longer than {_MAX_NAME_BYTES} bytes")
    return name


def _checked_chunks(chunks: Any) -> list[tuple[int, str]]:
    """One pass over plain lists: a model of the largest size has some 200,000 chunks."""
    if not isinstance(chunks, list | tuple):
        raise ValueError("the chunks are no list")
    for number, chunk in enumerate(chunks):
        if not isinstance(chunk, list | tuple) or len(chunk) != 2:
            raise ValueError(f"chunk {number} is not [length, digest]")
        length, digest = chunk
        if type(length) is not int or not 1 <= length <= (MAX_CHUNK_BYTES if number else MAX_FIRST_BYTES):
            raise ValueError(f"chunk {number} has the length {shown(length)}")
        if not isinstance(digest, str) or len(digest) != 16 or not _HEX.fullmatch(digest):
            raise ValueError(f"chunk {number} has the digest {shown(digest)}, not 16 hex digits")
    return [(length, digest) for length, digest in chunks]


def _checked_seals(seals: Any) -> list[str]:
    if not isinstance(seals, list | tuple):
        raise ValueError("the seals are no list")
    for number, seal in enumerate(seals):
        if not isinstance(seal, str) or len(seal) != 2 * SEAL_BYTES or not _HEX.fullmatch(seal):
            raise ValueError(f"chunk {number} has the seal {shown(seal)}, not {2 * SEAL_BYTES} hex digits")
    return list(seals)


def _checked_hex(text: str) -> str:
    if len(text) % 2 or not _HEX.fullmatch(text):
        raise ValueError(f"{shown(text)} is not bytes as lower-case hex digits")
    return text


def _not_null(value: Any) -> Any:
    if value is None:
        raise ValueError("null is written: leave the key out")
    return value


def _hex(nbytes: int) -> Any:
    return Annotated[str, Field(min_length=2 * nbytes, max_length=2 * nbytes), AfterValidator(_checked_hex)]


def _checked_moment(text: str) -> str:
    if found := _MOMENT.fullmatch(text):
        try:
            datetime.fromisoformat(found[1])
            return text
        except ValueError:
            pass
    raise ValueError(f"{shown(text)} is no time in UTC such as 2026-01-31T12:00:00Z")


def _checked_facts(facts: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Facts that are read back as they are written: no NaN, no half characters, no numbers beyond 64 bits."""
    try:
        parse_json(json.dumps(facts).encode(), "the facts")
    except CheckpointError as error:
        raise ValueError(str(error)) from None  # which pydantic collects
    return facts


def _checked_names(files: dict[str, FileRecord]) -> dict[str, FileRecord]:
    for name in files:
        if plain_name(name) == MANIFEST:
            raise ValueError(f"'{MANIFEST}' cannot have its own digest")
    return files


class FileRecord(BaseModel):
    """A file: its size in bytes, and its chunks (length in bytes, digest) in their order, without holes.

    A digest is XXH3-64 with seed 0 of the chunk as it is in the file, as 16 lower-case hex digits. A file of size 0 has
    no chunks. seals: of each chunk of an encrypted file, see `Cipher.seal`, in hex.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    size: Count
    chunks: Annotated[list[tuple[int, str]], PlainValidator(_checked_chunks)]
    seals: Annotated[list[str] | None, PlainValidator(_checked_seals)] = None

    @model_validator(mode="after")
    def _chunks_are_the_file(self) -> FileRecord:
        total = sum(length for length, _ in self.chunks)
        if total != self.size:
            raise ValueError(f"its chunks have {total} bytes, but its size is {self.size}")
        if self.seals is not None and len(self.seals) != len(self.chunks):
            raise ValueError(f"it has {len(self.chunks)} chunks, but {len(self.seals)} seals")
        return self


class AuditMark(BaseModel):
    """A line of the audit log: its number, from 1, and its keyed hash in hex."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    number: Annotated[int, Field(ge=1, lt=2**63)]
    hash: _hex(_HASH_BYTES)  # type: ignore[valid-type]


class Encryption(BaseModel):
    """How a checkpoint is encrypted, see [Note: keys]. Bytes are in hex.

    id: random, of this checkpoint. key: the wrapped data key. facts: what `Manifest.engine` has otherwise. audit: the
    line that says that the checkpoint was saved. hash: of all else in the manifest.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    cipher: Literal["AES-256-GCM"] = CIPHER
    id: _hex(ID_BYTES)  # type: ignore[valid-type]
    key: _hex(WRAPPED_BYTES)  # type: ignore[valid-type]
    facts: Annotated[str, AfterValidator(_checked_hex)]
    audit: AuditMark
    hash: _hex(_HASH_BYTES)  # type: ignore[valid-type]


class Manifest(BaseModel):
    """What manifest.json says.

    tag: the folder's name when it was written. step: optimizer steps. samples: seen by the run. created: ISO 8601, UTC.
    engine: facts for people, which no reader needs. encryption: None, unless the version is that of encrypted ones.

    Raises:
        pydantic.ValidationError (a ValueError): a value that a manifest cannot have.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    format: Literal["partita-checkpoint"] = FORMAT
    version: Annotated[int, Field(ge=1, le=ENCRYPTED_VERSION)] = VERSION
    tag: Annotated[str, AfterValidator(plain_name)]
    step: Count
    samples: Count
    world_size: Annotated[int, Field(ge=1, lt=2**63)]
    created: Annotated[str, AfterValidator(_checked_moment)]
    engine: Annotated[dict[str, JsonValue], AfterValidator(_checked_facts)]
    encryption: Annotated[Encryption | None, BeforeValidator(_not_null)] = None
    files: Annotated[dict[str, FileRecord], AfterValidator(_checked_names)]

    @model_validator(mode="after")
    def _is_encrypted_as_a_whole(self) -> Manifest:
        encrypted = self.version == ENCRYPTED_VERSION
        if encrypted != (self.encryption is not None):
            raise ValueError(f"version {self.version} {'lacks' if encrypted else 'has'} 'encryption'")
        for name, record in self.files.items():
            if encrypted != (record.seals is not None):
                raise ValueError(f"the chunks of {shown(name)} {'lack' if encrypted else 'have'} seals")
        return self


def no_manifest(names: list[str]) -> str:
    """What a folder is that has these files and no manifest, for people."""
    if any(name.endswith("_model_states.pt") for name in names):
        return "is a checkpoint of DeepSpeed's: `partita checkpoint import SRC DEST` makes one of Partita's"
    return f"has no {MANIFEST}: it is no checkpoint, or of a save that did not finish"


def parse_manifest(data: bytes, where: str) -> Manifest:
    """The manifest that `data` is. Time and memory are linear in its size.

    Args:
        data: the content of manifest.json. Who reads the file looks first that it has at most MAX_MANIFEST_BYTES.
        where: names the file in the error.

    Raises:
        CheckpointError: it is too large, is not JSON (see `parse_json`), is of another format or of a newer version, or
            lacks, adds or garbles something.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{where}: {len(data)} bytes, where at most {MAX_MANIFEST_BYTES} are read")
    content = parse_json(data, where)
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{where}: no manifest of a Partita checkpoint ('format' is not '{FORMAT}')")
    version = content.get("version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{where}: 'version' is {shown(version)}, not a number from 1")
    if version > ENCRYPTED_VERSION:
        raise CheckpointError(
            f"{where}: this checkpoint has format version {version}, this Partita reads up to {ENCRYPTED_VERSION}: "
            "update Partita"
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(f"{where}: {_first(error)}") from None


def manifest_text(manifest: Manifest) -> str:
    """The content of manifest.json: one line per file, which people can read and tools compare."""
    content = content_of(manifest)
    files = content.pop("files")
    lines = [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in content.items()]
    records = [f"  {json.dumps(name)}: " + json.dumps(files[name], separators=(",", ":")) for name in files]
    return "\n".join(["{", *lines, ' "files": {', ",\n".join(records), " }", "}", ""])


def content_of(manifest: Manifest) -> dict[str, Any]:
    """What manifest.json says, as plain JSON."""
    content = manifest.model_dump()
    for part, key in [(content, "encryption"), *((record, "seals") for record in content["files"].values())]:
        if part[key] is None:
            del part[key]
    return content


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, in one line, and how many others are."""
    first, *others = error.errors(include_url=False, include_context=False, include_input=False)
    place = ".".join(ascii(part)[1:-1][:80] if isinstance(part, str) else str(part) for part in first["loc"])
    what = first["msg"].removeprefix("Value error, ")
    return (f"{place}: " if place else "") + what + (f" (and {len(others)} more)" if others else "")
