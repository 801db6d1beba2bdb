"""Restoring a server from a backup: whole or not at all, and nothing that was there is lost."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from sqlalchemy import Connection

from outrider.errors import Conflict, InvalidInput, TemporaryError
from outrider.failpoints import failpoint
from server_core import backup
from server_core.backup import Manifest, Unpacked
from server_core.config import ServerConfig
from server_core.datadir import DataDirLock
from server_core.security import vault
from server_core.security.files import sync_directory, write_private
from server_core.store import restored
from server_core.store.commits import Commit
from server_core.store.common import now_us
from server_core.store.sqlite import SqliteDatabase

_STORE_FILES = ("store.db", "store.db-wal", "store.db-shm", "store.db.seal", "store.db-mark")


@dataclass(frozen=True, slots=True)
class Restored:
    """What was done. ``replaced`` is where the files lie that stood in the way, if there were any."""

    manifest: Manifest
    replaced: Path | None
    unknown_runs: tuple[str, ...]


def restore(
    config: ServerConfig, source: IO[bytes], *, passphrase: bytes | None = None, replace: bool = False
) -> Restored:
    """Make ``config.data_dir`` the server of the backup read from ``source``.

    Everything is checked and prepared beside what is there; only then it takes its place. A process that is killed on
    the way leaves either the former server or none, and doing it again finishes it. Raises Conflict if a server runs
    there, or if one is there and ``replace`` is not given; InvalidInput if the backup is damaged, is newer than this
    program, or its keys are missing; TemporaryError if there is no room.
    """
    with DataDirLock(config.data_dir, make=True):
        if config.store_file.exists() and not replace:
            raise Conflict(
                f"{config.data_dir} has a server's store already",
                code="already_initialised",
                hint="with --replace it is put aside, and nothing of it is deleted",
            )
        work = config.data_dir / ".restore"
        shutil.rmtree(work, ignore_errors=True)  # of one that was killed
        try:
            work.mkdir(mode=0o700)
            unpacked = backup.unpack(source, work)
            keys = _keys(config, unpacked, passphrase)
            unknown = _prepare(unpacked, keys[config.key_file])
            replaced = _put_in_place(config, work, keys)
        except OSError as error:
            raise TemporaryError(
                f"the backup can't be restored to {config.data_dir}: {error.strerror or error}", code="restore_failed"
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return Restored(unpacked.manifest, replaced, tuple(unknown))


def _keys(config: ServerConfig, unpacked: Unpacked, passphrase: bytes | None) -> dict[Path, bytes]:
    """What the key files are to hold: from the backup, or what lies there already."""
    ca_key = config.ca_file.with_name("ca.key")
    wanted = {config.key_file: "master.key", ca_key: "ca.key"}
    if unpacked.sealed_keys is not None:
        if passphrase is None:
            raise InvalidInput(
                "the backup has the server's keys, under a passphrase",
                code="passphrase_missing",
                hint="give it with --passphrase-file",
            )
        found = unpacked.keys(passphrase)
        keys = {path: found[name] for path, name in wanted.items() if name in found}
    else:
        missing = [str(path) for path in wanted if not path.exists()]
        if missing:
            raise InvalidInput(
                f"the backup has no keys, and there is no {' and no '.join(missing)}",
                code="keys_missing",
                hint="put the former server's there first; a backup that was made with a passphrase has them in it",
            )
        keys = {config.key_file: vault.read_master_key(config.key_file), ca_key: ca_key.read_bytes()}
        if unpacked.ca_pem is not None and config.ca_file.exists() and config.ca_file.read_bytes() != unpacked.ca_pem:
            raise InvalidInput(
                f"the CA in {config.ca_file.parent} is not that of the backup, so no agent would trust it",
                code="ca_wrong",
                hint="put the former server's ca.key and ca.pem there",
            )
    if unpacked.ca_pem is not None:
        keys[config.ca_file] = unpacked.ca_pem
    return keys


def _prepare(unpacked: Unpacked, master_key: bytes) -> list[str]:
    """Bring the store up to date and make it safe to serve. Raises InvalidInput if it is newer or the key another's."""
    db = SqliteDatabase(unpacked.store)
    try:

        def work(connection: Connection) -> list[str]:
            vault.open_vault(connection, master_key, now_us())
            return restored.make_safe(connection, unpacked.manifest.made_at)

        return db.write_now(Commit.STORE_RESTORED, work)
    finally:
        db.close()


def _put_in_place(config: ServerConfig, work: Path, keys: dict[Path, bytes]) -> Path | None:
    aside = config.data_dir / f"replaced-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"
    for path, content in keys.items():
        if path.exists() and path.read_bytes() == content:
            continue
        if path.exists():
            _keep(path, aside)
        write_private(path, content, mode=0o644 if path.suffix == ".pem" else 0o600)
    failpoint("restore.keys.after")
    for name in _STORE_FILES:
        if (config.data_dir / name).exists():
            aside.mkdir(mode=0o700, exist_ok=True)
            os.replace(config.data_dir / name, aside / name)
    failpoint("restore.aside.after")
    # The store last: it is what makes the directory a server's.
    for name in reversed(_STORE_FILES):
        if (work / name).exists():
            os.replace(work / name, config.data_dir / name)
    sync_directory(config.data_dir)
    return aside if aside.exists() else None


def _keep(path: Path, aside: Path) -> None:
    aside.mkdir(mode=0o700, exist_ok=True)
    write_private(aside / path.name, path.read_bytes())
