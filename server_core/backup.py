"""Backups: one file, made while the server serves, that says itself whether it is whole.

A zstd stream with a checksum of its own, in it a tar: `manifest.json`, `ca.pem`, `keys` where a passphrase was
given, `store.db`. The store is one snapshot, taken by SQLite itself; writers do not wait for it. What the store
holds of secrets is sealed by the master key, so a backup without a passphrase opens nothing; with one it has
everything that a new machine needs, the keys encrypted under the passphrase (scrypt, AES-256-GCM).
"""

from __future__ import annotations

import base64
import io
import json
import os
import secrets
import sqlite3
import tarfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from outrider import __version__
from outrider.errors import Conflict, InvalidInput, TemporaryError
from server_core.config import ServerConfig
from server_core.security.files import sync_directory
from server_core.store.integrity import RESTORE_HINT, sha256_of

FORMAT = 1
MIN_PASSPHRASE = 12
_SCRYPT = {"n": 2**15, "r": 8, "p": 1}
_NONCE_BYTES = 12
_PURPOSE = b"outrider backup keys"
# More is no manifest and no key of ours.
_SMALL_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a backup says of itself. ``kdf`` is None where the keys are not in it."""

    version: str
    schema: str
    server_id: str
    made_at: datetime
    store_bytes: int
    store_sha256: str
    kdf: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A backup that was read to its end and is whole."""

    manifest: Manifest
    store: Path
    ca_pem: bytes | None
    sealed_keys: bytes | None

    def keys(self, passphrase: bytes) -> dict[str, bytes]:
        """The keys by the names of their files. Raises InvalidInput if the passphrase is another."""
        assert self.sealed_keys is not None
        assert self.manifest.kdf is not None
        nonce, ciphertext = self.sealed_keys[:_NONCE_BYTES], self.sealed_keys[_NONCE_BYTES:]
        try:
            text = AESGCM(_derived(passphrase, self.manifest.kdf)).decrypt(nonce, ciphertext, _PURPOSE)
        except InvalidTag as error:
            raise InvalidInput(
                "the passphrase does not open the keys of this backup", code="passphrase_wrong"
            ) from error
        return {name: base64.b64decode(value) for name, value in json.loads(text).items()}


def make(
    config: ServerConfig,
    file: Path,
    *,
    passphrase: bytes | None = None,
    as_owner: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Manifest:
    """Write a backup of the server in ``config.data_dir`` to ``file``, mode 0600, whole or not at all.

    The server may be running. ``as_owner`` is entered while the store is open. Raises Conflict if the file exists,
    InvalidInput if there is no store, it is damaged, or the passphrase is too short, TemporaryError if there is no
    room.
    """
    _check_passphrase(passphrase)
    if not config.store_file.exists():
        raise InvalidInput(
            f"{config.data_dir} is not a server's data directory", code="not_initialised", hint="give its --data-dir"
        )
    if file.exists():
        raise Conflict(f"{file} exists already", code="already_exists", hint="a backup never replaces a file")
    part, copy = (file.with_name(f".{file.name}.{secrets.token_hex(4)}.{end}") for end in ("part", "store"))
    try:
        _snapshot(config.store_file, copy, as_owner)
        sealed, kdf = _sealed_keys(config, passphrase)
        manifest = _manifest_of(copy, kdf)
        _write(part, manifest, config.ca_file, sealed, copy)
        os.link(part, file)  # unlike a rename it never replaces what appeared there meanwhile
        sync_directory(file.parent)
    except FileExistsError as error:
        raise Conflict(f"{file} exists already", code="already_exists") from error
    except OSError as error:
        raise TemporaryError(
            f"the backup can't be written to {file}: {error.strerror or error}", code="backup_unwritable"
        ) from error
    finally:
        for leftover in (part, copy):
            leftover.unlink(missing_ok=True)
    return manifest


def unpack(source: IO[bytes], directory: Path) -> Unpacked:
    """Read a backup to its end, its store into ``directory``. Raises InvalidInput unless it is whole and known here."""
    small: dict[str, bytes] = {}
    store = directory / "store.db"
    try:
        with zstandard.ZstdDecompressor().stream_reader(source, read_across_frames=False) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    content = tar.extractfile(member)
                    if content is None:
                        raise InvalidInput("the backup holds something that is no file", code="backup_damaged")
                    if member.name == store.name:
                        _copy_private(content, store)
                    elif member.size <= _SMALL_BYTES:
                        small[member.name] = content.read()
            while stream.read(1 << 20):  # the checksum stands at the end
                pass
        manifest = _read_manifest(small["manifest.json"])
    except (zstandard.ZstdError, tarfile.TarError, EOFError, KeyError, ValueError, TypeError) as error:
        raise InvalidInput(
            f"it is damaged, or no backup of a server: {error}", code="backup_damaged", hint="try another one"
        ) from error
    if not store.exists() or store.stat().st_size != manifest.store_bytes or sha256_of(store) != manifest.store_sha256:
        raise InvalidInput("the backup is damaged: its store is not whole", code="backup_damaged")
    if (manifest.kdf is None) != ("keys" not in small):
        raise InvalidInput("the backup is damaged: its keys are missing", code="backup_damaged")
    return Unpacked(manifest, store, small.get("ca.pem"), small.get("keys"))


def _snapshot(store: Path, copy: Path, as_owner: Callable[[], AbstractContextManager[None]]) -> None:
    os.close(os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
    try:
        with closing(sqlite3.connect(copy)) as target:
            # It has its file before another user takes over, who may not make files beside it.
            target.execute("PRAGMA journal_mode=OFF")
            target.execute("PRAGMA synchronous=OFF")
            with as_owner(), closing(sqlite3.connect(store, timeout=10)) as origin:
                origin.backup(target)  # one snapshot: all pages in one go
            damage = target.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.DatabaseError as error:
        if "full" in str(error):
            raise OSError(str(error)) from error
        damage = str(error)
    if damage != "ok":
        raise InvalidInput(
            f"the store {store} is damaged, so there is no backup of it: {damage}",
            code="store_damaged",
            hint=RESTORE_HINT,
        )


def _manifest_of(copy: Path, kdf: dict[str, Any] | None) -> Manifest:
    with closing(sqlite3.connect(copy)) as connection:
        schema = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        server_id = connection.execute("SELECT value FROM meta WHERE key = 'server_id'").fetchone()
    return Manifest(
        version=__version__,
        schema=schema[0] if schema else "",
        server_id=server_id[0] if server_id else "",
        made_at=datetime.now(UTC),
        store_bytes=copy.stat().st_size,
        store_sha256=sha256_of(copy),
        kdf=kdf,
    )


def _write(part: Path, manifest: Manifest, ca_file: Path, sealed: bytes | None, copy: Path) -> None:
    text = json.dumps(
        {
            "format": FORMAT,
            "version": manifest.version,
            "schema": manifest.schema,
            "server_id": manifest.server_id,
            "made_at": manifest.made_at.isoformat(),
            "store_bytes": manifest.store_bytes,
            "store_sha256": manifest.store_sha256,
            "kdf": manifest.kdf,
        }
    )
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
        with compressor.stream_writer(file, closefd=False) as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
            _add(tar, "manifest.json", text.encode())
            if ca_file.exists():
                _add(tar, "ca.pem", ca_file.read_bytes())
            if sealed is not None:
                _add(tar, "keys", sealed)
            with copy.open("rb") as store:
                info = tarfile.TarInfo("store.db")
                info.size = manifest.store_bytes
                tar.addfile(info, store)
        file.flush()
        os.fsync(file.fileno())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _sealed_keys(config: ServerConfig, passphrase: bytes | None) -> tuple[bytes | None, dict[str, Any] | None]:
    if passphrase is None:
        return None, None
    files = {"master.key": config.key_file, "ca.key": config.ca_file.with_name("ca.key")}
    keys = {name: base64.b64encode(path.read_bytes()).decode() for name, path in files.items() if path.exists()}
    kdf = {**_SCRYPT, "salt": secrets.token_hex(16)}
    nonce = secrets.token_bytes(_NONCE_BYTES)
    sealed = AESGCM(_derived(passphrase, kdf)).encrypt(nonce, json.dumps(keys).encode(), _PURPOSE)
    return nonce + sealed, kdf


def _derived(passphrase: bytes, kdf: dict[str, Any]) -> bytes:
    # Read from a file: what it asks for must not take the machine's memory.
    n, r, p = int(kdf["n"]), int(kdf["r"]), int(kdf["p"])
    if n * r * p > 2**20:
        raise InvalidInput("the backup asks for more work to open its keys than is sensible", code="backup_damaged")
    return Scrypt(salt=bytes.fromhex(kdf["salt"]), length=32, n=n, r=r, p=p).derive(passphrase)


def _check_passphrase(passphrase: bytes | None) -> None:
    if passphrase is not None and len(passphrase) < MIN_PASSPHRASE:
        raise InvalidInput(
            f"the passphrase has {len(passphrase)} characters; it guards the server's keys and needs at least "
            f"{MIN_PASSPHRASE}",
            code="passphrase_short",
        )


def _read_manifest(text: bytes) -> Manifest:
    found = json.loads(text)
    if found["format"] != FORMAT:
        raise InvalidInput(
            f"the backup has format {found['format']}, this program knows {FORMAT}",
            code="backup_too_new",
            hint=f"it was made by version {found['version']}: restore it with that or a newer one",
        )
    return Manifest(
        version=str(found["version"]),
        schema=str(found["schema"]),
        server_id=str(found["server_id"]),
        made_at=datetime.fromisoformat(found["made_at"]),
        store_bytes=int(found["store_bytes"]),
        store_sha256=str(found["store_sha256"]),
        kdf=found["kdf"],
    )


def _copy_private(content: IO[bytes], path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        for block in _blocks(content):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def _blocks(content: IO[bytes]) -> Iterator[bytes]:
    while block := content.read(1 << 20):
        yield block
