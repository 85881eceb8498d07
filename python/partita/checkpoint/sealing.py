"""AES-256-GCM over the chunks of a checkpoint, and the keys for it.

[Note: keys] Each checkpoint has a random data key, which no other has. The data key is wrapped, that is encrypted, with
a key that is derived from the user's key and the checkpoint's id, and stands in the manifest like that. So another user
key needs another manifest, and not a byte of data is written anew. From the data key two keys are derived: one for
chunks and facts, one for the manifest.

A chunk is bound to the checkpoint, the file, the offset and its length, as associated data of the cipher. What the
manifest says is bound by its keyed hash. So nothing can be changed, swapped, cut, left out or taken from elsewhere.

The library `cryptography` is imported when a key is used.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.user_key import KEY_BYTES, UserKey

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

CIPHER: Literal["AES-256-GCM"] = "AES-256-GCM"
ID_BYTES = 16
NONCE_BYTES = 12
TAG_BYTES = 16
SEAL_BYTES = NONCE_BYTES + TAG_BYTES
WRAPPED_BYTES = NONCE_BYTES + KEY_BYTES + TAG_BYTES

# What bytes are for, so that none can stand in the place of others.
_CHUNK, _FACTS, _WRAP = b"partita checkpoint chunk", b"partita checkpoint facts", b"partita checkpoint key"
_CONTENT_KEY, _MANIFEST_KEY = b"partita checkpoint content", b"partita checkpoint manifest"


class Cipher:
    """Seals and opens what is in one checkpoint, see [Note: keys].

    Nonces are random. Of a checkpoint of 2^32 chunks, two have the same one with a probability of 2^-33.

    Args:
        checkpoint_id, data_key: random, of `ID_BYTES` and `KEY_BYTES`.
    """

    def __init__(self, checkpoint_id: bytes, data_key: bytes) -> None:
        self.id = checkpoint_id
        self._data_key = data_key
        self._content = _aes(derived(data_key, checkpoint_id, _CONTENT_KEY))
        self._manifest_key = derived(data_key, checkpoint_id, _MANIFEST_KEY)

    @staticmethod
    def new() -> Cipher:
        """Of a new checkpoint."""
        return Cipher(secrets.token_bytes(ID_BYTES), secrets.token_bytes(KEY_BYTES))

    def wrapped_for(self, key: UserKey) -> bytes:
        """The data key, for a manifest: `KEY_BYTES` behind a nonce, before a tag."""
        return wrap(self._data_key, key, self.id, _WRAP)

    def seal(self, file: str, offset: int, data: memoryview, into: memoryview) -> bytes:
        """Encrypts a chunk; returns its seal: the nonce and the tag.

        Args:
            into: of `TAG_BYTES` more than the chunk: the encrypted chunk and behind it the tag.
        """
        nonce = secrets.token_bytes(NONCE_BYTES)
        self._content.encrypt_into(nonce, data, self._place(file, offset, len(data)), into)
        return nonce + bytes(into[len(data) :])

    def open(self, file: str, offset: int, seal: bytes, sealed: memoryview, into: memoryview) -> bool:
        """Decrypts a chunk. False: it is not what was sealed at this place of this checkpoint; `into` has zeros then.

        Args:
            seal: as `seal()` gave it.
            sealed: the encrypted chunk, with room for a tag behind it.
        """
        from cryptography.exceptions import InvalidTag

        sealed[len(into) :] = seal[NONCE_BYTES:]
        try:
            self._content.decrypt_into(seal[:NONCE_BYTES], sealed, self._place(file, offset, len(into)), into)
        except InvalidTag:
            into[:] = bytes(len(into))  # what was decrypted before the tag was seen to be wrong
            return False
        return True

    def seal_bytes(self, file: str, offset: int, data: bytes) -> tuple[bytes, bytes]:
        """A small chunk: (encrypted, seal)."""
        into = bytearray(len(data) + TAG_BYTES)
        seal = self.seal(file, offset, memoryview(data), memoryview(into))
        return bytes(into[: len(data)]), seal

    def open_bytes(self, file: str, offset: int, sealed: bytes, seal: bytes) -> bytes | None:
        """A small chunk; None: see `open()`."""
        into = bytearray(len(sealed))
        room = bytearray(sealed) + bytes(TAG_BYTES)
        return bytes(into) if self.open(file, offset, seal, memoryview(room), memoryview(into)) else None

    def seal_facts(self, facts: Mapping[str, Any]) -> bytes:
        """What people want to know of a run, as a nonce, encrypted JSON and a tag."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._content.encrypt(nonce, json.dumps(facts).encode(), _FACTS + self.id)

    def open_facts(self, sealed: bytes) -> bytes | None:
        """The JSON of `seal_facts()`; None: it is not of this checkpoint."""
        from cryptography.exceptions import InvalidTag

        try:
            return self._content.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], _FACTS + self.id)
        except (InvalidTag, ValueError):  # ValueError: too short
            return None

    def hash_of(self, manifest: Mapping[str, Any]) -> bytes:
        """The keyed hash of what a manifest says."""
        return keyed_hash(self._manifest_key, manifest)

    def _place(self, file: str, offset: int, length: int) -> bytes:
        numbers = offset.to_bytes(8, "little") + length.to_bytes(8, "little")
        return _CHUNK + self.id + numbers + file.encode()


def unwrapped(wrapped: bytes, checkpoint_id: bytes, key: UserKey) -> Cipher | None:
    """The cipher of a checkpoint. None: the key is another one, or its manifest was changed."""
    data_key = unwrap(wrapped, key, checkpoint_id, _WRAP)
    return None if data_key is None else Cipher(checkpoint_id, data_key)


def keyed_hash(key: bytes, content: Mapping[str, Any]) -> bytes:
    """HMAC-SHA256 of JSON in its shortest form, keys sorted, in ASCII."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hmac.digest(key, text.encode("ascii"), hashlib.sha256)


def wrap(secret: bytes, key: UserKey, salt: bytes, purpose: bytes) -> bytes:
    """A secret, encrypted with a key that is derived for one purpose: a nonce, the encrypted secret and a tag."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + _aes(derived(key.data, salt, purpose)).encrypt(nonce, secret, purpose + salt)


def unwrap(wrapped: bytes, key: UserKey, salt: bytes, purpose: bytes) -> bytes | None:
    """The secret of `wrap()`; None: one of the arguments is not that of the call."""
    aes = _aes(derived(key.data, salt, purpose))
    from cryptography.exceptions import InvalidTag

    try:
        return aes.decrypt(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], purpose + salt)
    except (InvalidTag, ValueError):  # ValueError: too short
        return None


def derived(key: bytes, salt: bytes, purpose: bytes) -> bytes:
    """Another key, by HKDF-SHA256 (RFC 5869)."""
    require_library()
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), KEY_BYTES, salt=salt, info=purpose).derive(key)


def require_library() -> None:
    """Looks for the library.

    Raises:
        CheckpointError: it is not installed.
    """
    try:
        import cryptography  # noqa: F401
    except ModuleNotFoundError:
        raise CheckpointError(
            "encrypted checkpoints need the library cryptography: pip install 'partita[encryption]'"
        ) from None


def _aes(key: bytes) -> AESGCM:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key)
