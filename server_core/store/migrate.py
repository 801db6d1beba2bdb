"""Brings a store's schema up to date, with Alembic."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import Engine, exc, inspect

from outrider.errors import InvalidInput
from outrider.failpoints import failpoint
from server_core.store.commits import Commit


@contextlib.contextmanager
def _without_entry_points() -> Iterator[None]:
    """While Alembic is imported: it looks for plugins of its own then, and the store has no use for any. That look
    raises for all of them when the metadata of a single distribution, of whomever, is damaged."""
    found = importlib.metadata.entry_points
    importlib.metadata.entry_points = lambda **_: ()  # type: ignore[assignment]
    try:
        yield
    finally:
        importlib.metadata.entry_points = found


with _without_entry_points():
    from alembic import command
    from alembic.config import Config
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory
    from alembic.util.exc import CommandError


def refuse_foreign(engine: Engine) -> None:
    """Raise InvalidInput if the file is not a store, or has a schema that is not known here. Writes nothing."""
    scripts = _scripts()
    with engine.connect() as connection:
        tables = inspect(connection).get_table_names()
        current = MigrationContext.configure(connection).get_current_revision()
    if current is None and tables:
        raise InvalidInput(
            f"{engine.url.database} is not a store of Outrider: it has tables of something else",
            code="store_foreign",
            hint="move it away and run `outrider server init`, or give another data_dir",
        )
    if current is not None and current not in {revision.revision for revision in scripts.walk_revisions()}:
        raise InvalidInput(
            f"the store was written by a newer version: it has schema {current}, this program knows up to "
            f"{scripts.get_current_head()}",
            code="store_too_new",
            hint="run the newer version, or restore a backup made by this one",
        )


def upgrade(engine: Engine, *, copy: Path | None = None) -> None:
    """Apply the migrations that are missing, all or none; a store that has some before is copied to ``copy`` first.

    Raises InvalidInput if one can't be applied.
    """
    head = _scripts().get_current_head()
    with engine.connect() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
    if current == head:
        return
    if current is not None and copy is not None:
        _copy(Path(str(engine.url.database)), copy, current)
    config = _config()
    try:
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            failpoint(Commit.SCHEMA_UPGRADE.before)
    except (exc.SQLAlchemyError, CommandError, OSError) as error:
        raise InvalidInput(
            f"the store can't be brought from schema {current or 'none'} to {head}: {getattr(error, 'orig', error)}",
            code="store_upgrade_failed",
            hint="it is as it was; look at the disk, or run the former version",
        ) from error
    failpoint(Commit.SCHEMA_UPGRADE.after)


def _copy(path: Path, copy: Path, current: str) -> None:
    """Whoever has to go back to the former version finds the store as it was."""
    temporary = copy.with_name(copy.name + ".part")
    try:
        temporary.unlink(missing_ok=True)
        os.close(os.open(temporary, os.O_CREAT | os.O_RDWR, 0o600))
        with (
            contextlib.closing(sqlite3.connect(path)) as source,
            contextlib.closing(sqlite3.connect(temporary)) as target,
        ):
            source.backup(target)
        os.replace(temporary, copy)
    except (OSError, sqlite3.Error) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise InvalidInput(
            f"the store can't be copied to {copy} before its schema {current} is brought up to date: {error}",
            code="store_upgrade_failed",
            hint="make room for it; the store is as it was",
        ) from error


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config
