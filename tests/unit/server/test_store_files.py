"""The store's file between two servers: a flipped byte, a newer and an older schema, somebody else's database."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import stat
from pathlib import Path

import pytest
from sqlalchemy import select

from outrider import failpoints
from outrider.errors import InvalidInput, OutriderError, PermanentError
from outrider.sqlite_loss import mark_of
from outrider.v1 import types_pb2
from server_core.security import vault
from server_core.store import envs, events, logs, migrate, nodes, objects, runs, schema
from server_core.store.commits import Commit
from server_core.store.sqlite import SqliteDatabase
from tests.faults import damage

HISTORIES = Path(__file__).parent / "histories"
HISTORY_KEY = bytes(range(32))
ARENA = types_pb2.ObjectRef(kind="game", name="arena")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store with something in it, that its server has left."""
    path = tmp_path / "store.db"
    db = SqliteDatabase(path)
    for number in range(200):
        db.write_now(
            Commit.OBJECT_SET,
            lambda c, number=number: objects.put(  # type: ignore[misc]
                c,
                types_pb2.ObjectRef(kind="game", name=f"arena-{number}"),
                {"note": "x" * 500},
                replace=False,
                expected_version=None,
            ),
        )
    db.close()
    return path


def refusal_of_opening(path: Path) -> OutriderError:
    try:
        db = SqliteDatabase(path)
    except OutriderError as error:
        return error
    db.close()
    raise AssertionError("the store was opened")


def test_any_flipped_bit_is_refused_after_a_stop_and_the_file_is_left_alone(path: Path) -> None:
    whole = path.read_bytes()
    places = random.Random(7).sample(range(len(whole)), 40)  # within values, keys, headers and free space alike
    for place in [0, 18, 24, 100, len(whole) - 1, *places]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        error = refusal_of_opening(path)
        assert isinstance(error, InvalidInput)
        assert error.code in ("store_damaged", "store_unusable", "store_too_new", "store_foreign"), (place, error)
        assert path.read_bytes() == flipped
    path.write_bytes(whole)
    SqliteDatabase(path).close()


def test_damage_says_what_to_do(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff")
    error = refusal_of_opening(path)
    assert str(path) in error.message
    assert "outrider server restore FILE" in error.hint


def test_store_that_somebody_else_changed_opens_once_its_seal_is_removed(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE objects SET version = 2 WHERE name = 'arena-1'")
    error = refusal_of_opening(path)
    seal = path.with_name("store.db.seal")
    assert str(seal) in error.hint
    seal.unlink()
    SqliteDatabase(path).close()
    assert seal.exists()


def test_seal_is_broken_while_the_store_is_open(path: Path) -> None:
    seal = path.with_name("store.db.seal")
    assert stat.S_IMODE(seal.stat().st_mode) == 0o600
    db = SqliteDatabase(path)
    assert not seal.exists()
    db.close()
    assert seal.exists()


def test_structural_damage_is_refused_also_after_a_crash(path: Path) -> None:
    path.with_name("store.db.seal").unlink()  # what a crash leaves has none
    whole = bytearray(path.read_bytes())
    page = whole.index(b"arena-150") // 4096 * 4096
    whole[page : page + 8] = b"\xff" * 8  # the header of a page of the table
    path.write_bytes(whole)
    error = refusal_of_opening(path)
    assert error.code == "store_damaged"
    assert path.read_bytes() == whole


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A store with ten objects, whose server was killed."""
    db = SqliteDatabase(tmp_path / "in-use/store.db")
    for number in range(10):
        db.write_now(
            Commit.OBJECT_SET,
            lambda c, number=number: objects.put(  # type: ignore[misc]
                c, types_pb2.ObjectRef(kind="game", name=f"arena-{number}"), {}, replace=False, expected_version=None
            ),
        )
        db.write_now(Commit.SERVER_START, lambda c: c.execute(select(schema.objects.c.name)).all())  # changes nothing
    path = damage.leave(tmp_path / "in-use/store.db", tmp_path / "store.db")
    db.close()
    return path


def objects_in(path: Path) -> int:
    db = SqliteDatabase(path)
    try:
        return len(db.write_now(Commit.SERVER_START, lambda c: objects.listed(c, "")))
    finally:
        db.close()


def test_store_of_a_killed_server_has_all_that_was_acknowledged(killed: Path) -> None:
    assert mark_of(killed).exists()
    assert objects_in(killed) == 10
    assert not mark_of(killed).exists()  # it is sealed
    assert objects_in(killed) == 10


@pytest.mark.parametrize("way", [name for name in damage.WAYS if name.startswith("log ")])
def test_store_whose_last_commits_are_lost_is_refused_after_a_crash(way: str, killed: Path) -> None:
    damage.WAYS[way](killed)
    for _ in range(2):  # and stays refused
        error = refusal_of_opening(killed)
        assert isinstance(error, InvalidInput)
        assert error.code == "store_damaged"
        assert "has lost the end of its history" in error.message
        assert str(mark_of(killed)) in error.hint
    damage.log_of(killed).unlink(missing_ok=True)
    mark_of(killed).unlink()
    SqliteDatabase(killed).close()  # as the hint says


async def test_damage_found_while_it_is_served_is_told_and_not_sealed(path: Path) -> None:
    db = SqliteDatabase(path)
    db.write_now(Commit.SERVER_START, lambda _: None)  # its writer has opened the file
    with path.open("r+b") as file:
        for start in range(0, path.stat().st_size, 4096):
            file.seek(start)
            page = file.read(4096)
            if page[0] == 13 and b"arena-1" in page:  # 13: a leaf of a table
                file.seek(start)
                file.write(b"\xff" * 8)
    with pytest.raises(PermanentError, match="is damaged") as caught:
        await db.read(lambda c: objects.listed(c, ""))
    assert caught.value.code == "store_damaged"
    db.close()
    assert not path.with_name("store.db.seal").exists()


def test_database_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE songs (name TEXT)")
    error = refusal_of_opening(path)
    assert error.code == "store_foreign"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("songs",)]


def test_newer_schema_is_refused_and_left_alone(path: Path) -> None:
    path.with_name("store.db.seal").unlink()
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    before = path.read_bytes()
    error = refusal_of_opening(path)
    assert error.code == "store_too_new"
    assert "9999" in error.message
    assert "run the newer version" in error.hint
    assert path.read_bytes() == before


several_schemas = pytest.mark.skipif(
    migrate._scripts().get_current_head() == "0001", reason="there is one schema only: nothing to bring up to date"
)


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A store of the first version, as it was written then."""
    path = tmp_path / "store.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript((HISTORIES / "store-0001.sql").read_text())
    return path


async def test_store_of_the_first_version_is_brought_up_to_date_with_all_that_is_in_it(older: Path) -> None:
    db = SqliteDatabase(older)
    try:
        run = await db.read(lambda c: runs.get(c, "r0"))
        assert (run.state, run.key, run.steps[0].outputs_json) == (
            types_pb2.RUN_STATE_SUCCEEDED, "key-0", b'{"said":"hello"}',
        )  # fmt: skip
        assert [row.run_id for row in await db.read(lambda c: runs.active_on(c, "n1"))] == ["r1", "r2"]
        assert await db.read(lambda c: nodes.current_session(c, "n1")) == ("s0", 1)
        chunks, _ = await db.read(lambda c: logs.read(c, "r0", after=0))
        assert [chunk.data for chunk in chunks] == [b"hello\n"]
        assert (await db.read(lambda c: objects.get(c, ARENA))).status_json == b'{"port":4711}'
        assert await db.read(events.last_number) >= 1
        sealed = await db.read(lambda c: envs.sealed_value(c, "builds", "KEY"))
        opened = await db.read(lambda c: vault.open_vault(c, HISTORY_KEY, 0))
        assert sealed is not None
        assert opened.open(sealed, vault.env_purpose("builds", "KEY")) == b"hunter22"
    finally:
        db.close()


@several_schemas
def test_store_is_copied_before_it_is_brought_up_to_date(older: Path) -> None:
    SqliteDatabase(older).close()
    former = older.with_name("store.db.former")
    assert stat.S_IMODE(former.stat().st_mode) == 0o600
    with contextlib.closing(sqlite3.connect(former)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("0001",)]
        assert connection.execute("SELECT count(*) FROM runs").fetchall() == [(3,)]
    before = former.read_bytes()
    SqliteDatabase(older).close()  # nothing to bring up to date any more
    assert former.read_bytes() == before


@several_schemas
def test_store_that_takes_the_place_of_one_that_was_stopped_is_not_compared_with_it(older: Path) -> None:
    db = SqliteDatabase(older)
    db.write_now(Commit.OBJECT_SET, lambda c: objects.put(c, ARENA, {"a": 1}, replace=False, expected_version=None))
    db.close()
    older.with_name("store.db.former").replace(older)
    older.with_name("store.db.seal").unlink()
    SqliteDatabase(older).close()


@several_schemas
def test_upgrade_that_fails_leaves_the_store_as_it_was(older: Path) -> None:
    failpoints.arm(f"{Commit.SCHEMA_UPGRADE.before}=fail")
    try:
        error = refusal_of_opening(older)
    finally:
        failpoints.arm("")
    assert error.code == "store_upgrade_failed"
    assert "no space left" in error.message
    with contextlib.closing(sqlite3.connect(older)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("0001",)]
    db = SqliteDatabase(older)
    assert db.write_now(Commit.SERVER_START, lambda c: c.execute(select(schema.runs.c.run_id)).scalars().all())
    db.close()


def test_every_migration_is_known_by_its_number_in_order() -> None:
    known = [revision.revision for revision in migrate._scripts().walk_revisions()]
    assert known == [f"{number:04}" for number in range(len(known), 0, -1)]
