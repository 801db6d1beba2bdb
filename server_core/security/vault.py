"""The vault: AES-256-GCM under a data key, which a master key wraps.

The store holds the wrapped data key and the sealed values, the master key file neither; one without the other
opens nothing. What a sealed value is for (its set and name) is authenticated with it, so that rows can't be
exchanged for each other.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import Connection, insert, select

from outrider.errors import InvalidInput, PermanentError
from server_core.security.files import write_private
from server_core.store import schema

KEY_BYTES = 32
_NONCE_BYTES = 12
_VERSION = b"\x01"


class Vault:
    """Seals and opens values with one data key."""

    def __init__(self, data_key: bytes) -> None:
        self._cipher = AESGCM(data_key)

    def seal(self, value: bytes, purpose: str) -> bytes:
        """``value`` encrypted; `open` needs the same ``purpose``."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return _VERSION + nonce + self._cipher.encrypt(nonce, value, purpose.encode())

    def open(self, sealed: bytes, purpose: str) -> bytes:
        """The value. Raises PermanentError if it was altered, or sealed for another purpose or with another key."""
        if sealed[:1] != _VERSION:
            raise PermanentError("a sealed value has a format that is not known here", code="sealed_damaged")
        nonce, ciphertext = sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES :]
        try:
            return self._cipher.decrypt(nonce, ciphertext, purpose.encode())
        except (InvalidTag, ValueError) as error:
            raise PermanentError(f"the sealed value of {purpose} can't be opened", code="sealed_damaged") from error


def env_purpose(set_name: str, name: str) -> str:
    return f"env {set_name}.{name}"


def make_master_key(path: Path) -> None:
    """Write a new master key to ``path``, mode 0600; one that is there stays."""
    if not path.exists():
        write_private(path, secrets.token_bytes(KEY_BYTES))


def read_master_key(path: Path) -> bytes:
    """The key in ``path``. Raises InvalidInput if it is missing, has another length, or others can read it."""
    try:
        mode = path.stat().st_mode
        key = path.read_bytes()
    except OSError as error:
        raise InvalidInput(
            f"the master key {path} can't be read: {error.strerror or error}",
            code="master_key_missing",
            hint="without it the env sets of this store can't be opened; restore it from where you keep it",
        ) from error
    if stat.S_IMODE(mode) & 0o077:
        raise InvalidInput(
            f"the master key {path} is open to others (mode {stat.S_IMODE(mode):04o})",
            code="master_key_open",
            hint=f"chmod 600 {path}",
        )
    if len(key) != KEY_BYTES:
        raise InvalidInput(f"the master key {path} has {len(key)} bytes instead of {KEY_BYTES}", code="master_key_bad")
    return key


def open_vault(connection: Connection, master_key: bytes, now_us: int) -> Vault:
    """The vault of a store; its data key is made on first use. Raises InvalidInput if the master key is not its own."""
    row = connection.execute(
        select(schema.data_keys.c.id, schema.data_keys.c.wrapped).order_by(schema.data_keys.c.id.desc()).limit(1)
    ).first()
    if row is None:
        data_key = os.urandom(KEY_BYTES)
        wrapped = Vault(master_key).seal(data_key, "data key")
        connection.execute(insert(schema.data_keys).values(id=1, wrapped=wrapped, created_at=now_us))
        return Vault(data_key)
    try:
        return Vault(Vault(master_key).open(row.wrapped, "data key"))
    except PermanentError as error:
        raise InvalidInput(
            "the master key does not belong to this store",
            code="master_key_wrong",
            hint="give the one it was made with",
        ) from error
