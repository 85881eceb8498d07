"""What protects checkpoints from other people: who may read the files, the key, and the audit log."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partita.checkpoint import audit
from partita.checkpoint.agreement import together
from partita.checkpoint.disk import GROUP, OWNER, Access
from partita.checkpoint.errors import CheckpointError, DamagedError
from partita.checkpoint.folder import Found
from partita.checkpoint.manifest import ENCRYPTED_VERSION, MANIFEST, AuditMark, Encryption, Manifest, content_of
from partita.checkpoint.sealing import Cipher, require_library, unwrapped
from partita.checkpoint.strict_json import parse_json
from partita.checkpoint.user_key import KeySource, UserKey
from partita.comm import Communicator

if TYPE_CHECKING:
    from partita.config.checkpoint_keys import CheckpointConfig

logger = logging.getLogger("partita")


@dataclass(frozen=True)
class Protection:
    """access: who may read files. key: checkpoints are encrypted, and nothing else is loaded; None: they are not."""

    access: Access = OWNER
    key: UserKey | None = None

    def new_envelope(self) -> str:
        """What all ranks need for a new checkpoint, without being secret; "": it is not encrypted."""
        if self.key is None:
            return ""
        cipher = Cipher.new()
        return json.dumps([cipher.id.hex(), cipher.wrapped_for(self.key).hex()])

    def cipher_in(self, envelope: str) -> Cipher | None:
        """The cipher of a new checkpoint, on each rank.

        Raises:
            CheckpointError: the key of this rank is not that of rank 0.
        """
        if not envelope or self.key is None:
            return None
        checkpoint_id, wrapped = map(bytes.fromhex, json.loads(envelope))
        cipher = unwrapped(wrapped, checkpoint_id, self.key)
        if cipher is None:
            raise CheckpointError(f"{self.key.source} holds another key than on rank 0")
        return cipher

    def sealed(
        self, directory: Path, manifest: Manifest, cipher: Cipher | None, what: audit.What = "saved"
    ) -> Manifest:
        """The manifest of a new checkpoint as it is written. The audit log says from now on that it was saved, or what
        else was done.

        Raises:
            CheckpointError, OSError: nothing can be added to the log.
        """
        if self.key is None or cipher is None:
            return manifest
        mark = audit.append(directory, self.key, audit.Event(what, manifest.tag, cipher.id.hex()), self.access)
        return sealed_manifest(manifest, cipher, cipher.wrapped_for(self.key), mark)

    def opened(self, found: Found) -> Cipher | None:
        """What opens a checkpoint, all of whose manifest is as it was saved. None: it is not encrypted.

        Raises:
            CheckpointError: the key is missing, or another one; the manifest was changed, or is of another tag; or the
                checkpoint is not encrypted, although there is a key.
        """
        encryption = found.manifest.encryption
        if encryption is None:
            if self.key is None:
                return None
            raise CheckpointError(
                f"'{found.path}' is not encrypted, so anybody may have made it, and a key was given: if you "
                "trust this checkpoint, `partita checkpoint encrypt` it, or leave the key out"
            )
        if self.key is None:
            raise CheckpointError(f"'{found.path}' is encrypted, and no key was given")
        return opened_manifest(found, encryption, self.key)

    @contextmanager
    def telling(self, directory: Path, tag: str, cipher: Cipher | None) -> Iterator[None]:
        """If the block fails, which saves, the log says so."""
        try:
            yield
        except BaseException:
            self.tell(directory, audit.Event("failed", tag, "" if cipher is None else cipher.id.hex()))
            raise

    def tell(self, directory: Path, event: audit.Event) -> None:
        """Adds a line to the audit log, if there is a log and a key. What cannot be added becomes a warning."""
        if self.key is None or not audit.has_log(directory):
            return
        try:
            audit.append(directory, self.key, event, self.access)
        except (CheckpointError, OSError) as error:
            if event.what == "refused":
                return  # the error that is raised anyway says what the key does not open
            logger.warning(f"the audit log of '{directory}' does not say that '{event.tag}' was {event.what}: {error}")


PLAIN = Protection()


def protection_for(config: CheckpointConfig, world: Communicator) -> Protection:
    """What a config says. A collective; each rank gets the key by itself, so that it goes over no network.

    Raises:
        CheckpointError: a rank has no key, or lacks the library; on all ranks.
    """
    access = GROUP if config.group_access else OWNER
    given = config.encryption
    if given is None:
        return Protection(access)
    source = KeySource(given.key_env, given.key_file, given.key_command)

    def read() -> UserKey:
        require_library()
        return source.read()

    return Protection(access, together(world, "checkpoints cannot be encrypted or opened", read))


def event_of(what: audit.What, found: Found) -> audit.Event:
    """Something that was done with a checkpoint."""
    encryption = found.manifest.encryption
    return audit.Event(what, found.tag, "" if encryption is None else encryption.id)


def sealed_manifest(manifest: Manifest, cipher: Cipher, wrapped: bytes, mark: AuditMark) -> Manifest:
    """A manifest that says how its checkpoint is encrypted, and whose hash is over all that it says."""
    old = manifest.encryption
    facts = old.facts if old is not None else cipher.seal_facts(manifest.engine).hex()
    encryption = Encryption(id=cipher.id.hex(), key=wrapped.hex(), facts=facts, audit=mark, hash="0" * 64)
    update = {"version": ENCRYPTED_VERSION, "engine": {}, "encryption": encryption}
    unhashed = manifest.model_copy(update=update)
    final = encryption.model_copy(update={"hash": _hash_of(unhashed, cipher)})
    return Manifest.model_validate(content_of(unhashed.model_copy(update={"encryption": final})))


def opened_manifest(found: Found, encryption: Encryption, key: UserKey) -> Cipher:
    """What opens an encrypted checkpoint.

    Raises:
        CheckpointError: as for `Protection.opened`.
    """
    cipher = unwrapped(bytes.fromhex(encryption.key), bytes.fromhex(encryption.id), key)
    if cipher is None:
        raise CheckpointError(f"{key.source} does not hold the key of '{found.path}', or its {MANIFEST} was changed")
    if not secrets.compare_digest(_hash_of(found.manifest, cipher), encryption.hash):
        raise DamagedError(f"'{found.path / MANIFEST}' was changed after it was saved: its hash does not fit")
    if found.manifest.tag != found.tag:
        raise CheckpointError(
            f"'{found.path}' is the checkpoint '{found.manifest.tag}' under another name: give it its name back"
        )
    return cipher


def facts_of(found: Found, key: UserKey) -> dict[str, Any]:
    """The facts about the run that saved an encrypted checkpoint.

    Raises:
        CheckpointError: as for `Protection.opened`.
    """
    cipher = Protection(key=key).opened(found)
    encryption = found.manifest.encryption
    text = None if cipher is None or encryption is None else cipher.open_facts(bytes.fromhex(encryption.facts))
    if text is None:
        raise CheckpointError(f"'{found.path / MANIFEST}' was changed: the facts are not those that were saved")
    facts: dict[str, Any] = parse_json(text, str(found.path))
    return facts


def _hash_of(manifest: Manifest, cipher: Cipher) -> str:
    content = content_of(manifest)
    del content["encryption"]["hash"]
    return cipher.hash_of(content).hex()
