"""Brings a store's schema up to date, with Alembic."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine

from outrider.errors import InvalidInput


def upgrade(engine: Engine) -> None:
    """Apply the migrations that are missing. Raises InvalidInput if the store has one that is not known here."""
    config = _config()
    scripts = ScriptDirectory.from_config(config)
    known = {revision.revision for revision in scripts.walk_revisions()}
    with engine.begin() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
        if current is not None and current not in known:
            raise InvalidInput(
                f"the store was written by a newer version: it has schema {current}, this program knows up to "
                f"{scripts.get_current_head()}",
                code="store_too_new",
                hint="run the newer version, or restore a backup made by this one",
            )
        if current != scripts.get_current_head():
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config
