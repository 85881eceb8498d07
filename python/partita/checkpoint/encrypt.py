"""A plain checkpoint becomes an encrypted one: its files are copied, encrypted, and take the place of the old ones."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from partita.checkpoint import audit
from partita.checkpoint.commit import Staging
from partita.checkpoint.disk import GROUP, OWNER, write_durably
from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.folder import Found, open_file
from partita.checkpoint.manifest import MANIFEST, FileRecord, manifest_text
from partita.checkpoint.protection import Protection
from partita.checkpoint.sealing import Cipher
from partita.checkpoint.transfer import digest_text
from partita.checkpoint.user_key import UserKey
from partita.files import file_to_write


def encrypt(found: Found, key: UserKey) -> Iterator[int]:
    """Encrypts a checkpoint; gives the bytes of each chunk. Until the end it is there as it was.

    The time of its creation stays, and so its place among others, and what a program has put beside its files. The old
    files are removed. That does not erase what a disk had of them.

    Raises:
        CheckpointError: it is encrypted already, or damaged; or the audit log has another key. Nothing has changed.
        OSError: it cannot be written; nothing has changed.
    """
    if found.manifest.encryption is not None:
        raise CheckpointError(f"'{found.path}' is encrypted already: `partita checkpoint rekey` gives it another key")
    directory, tag = found.path.parent, found.tag
    if audit.has_log(directory):
        audit.read_key(directory, key)
    mode = stat.S_IMODE((found.path / MANIFEST).stat().st_mode)
    protection = Protection(GROUP if mode & 0o040 else OWNER, key)
    cipher = protection.cipher_in(protection.new_envelope())
    assert cipher is not None
    staging = Staging(directory, tag, protection.access)
    try:
        staging.create()
        records: dict[str, FileRecord] = {}
        for name, record in found.manifest.files.items():
            with file_to_write(staging.path / name).open("xb") as file:
                os.fchmod(file.fileno(), protection.access.file)
                chunks: list[tuple[int, str]] = []
                seals: list[str] = []
                for data, seal in _sealed(found.path, name, record, cipher):
                    file.write(data)
                    chunks.append((len(data), digest_text(data)))
                    seals.append(seal.hex())
                    yield len(data)
                file.flush()
                os.fsync(file.fileno())
            records[name] = FileRecord(size=record.size, chunks=chunks, seals=seals)
        manifest = found.manifest.model_copy(update={"files": records, "tag": tag})
        sealed = protection.sealed(directory, manifest, cipher, "encrypted")
        with protection.telling(directory, tag, cipher):
            write_durably(staging.path / MANIFEST, manifest_text(sealed).encode(), protection.access.file)
            staging.publish(is_latest=False)  # `latest` names a tag, which stays
    finally:
        staging.discard()  # which does nothing to a published one


def _sealed(folder: Path, name: str, record: FileRecord, cipher: Cipher) -> Iterator[tuple[bytes, bytes]]:
    """The encrypted chunks of a file, with their seals."""
    begin = 0
    with os.fdopen(open_file(folder, name), "rb") as file:
        for length, digest in record.chunks:
            data = file.read(length)
            if digest_text(data) != digest:
                raise CheckpointError(
                    f"'{folder / name}', bytes {begin:,} to {begin + length:,}: these are not the bytes that were saved"
                )
            yield cipher.seal_bytes(name, begin, data)
            begin += length
