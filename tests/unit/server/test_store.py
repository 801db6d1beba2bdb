"""The store: schema and migrations agree, transactions are whole, events and logs are in order."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, create_engine, func, insert, select

from outrider.errors import Conflict, InvalidInput
from outrider.v1 import control_service_pb2, types_pb2
from server_core.store import events, logs, migrate, objects, runs, schema
from server_core.store.commits import Commit
from server_core.store.sqlite import SqliteDatabase

OUT = types_pb2.LOG_STREAM_STDOUT
ANY = Commit.RUN_ACCEPT
"""The work under test is no commit of the server's: any name will do."""


@pytest.fixture
def db(tmp_path: Path) -> Iterator[SqliteDatabase]:
    db = SqliteDatabase(tmp_path / "store.db")
    yield db
    db.close()


def test_migrations_make_the_schema(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'store.db'}")
    migrate.upgrade(engine)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
    engine.dispose()


async def test_refused_work_leaves_no_trace_and_does_not_spoil_its_neighbours(db: SqliteDatabase) -> None:
    def add(key: str, twice: bool = False) -> None:
        def work(connection: Connection) -> None:
            connection.execute(insert(schema.meta).values(key=key, value="x"))
            if twice:
                connection.execute(insert(schema.meta).values(key=key, value="y"))

        writes.append(db.write(ANY, work))

    writes: list[object] = []
    for number in range(50):
        add(f"k{number}", twice=number % 10 == 0)
    answers = await asyncio.gather(*writes, return_exceptions=True)  # type: ignore[call-overload]
    assert sum(isinstance(answer, Conflict) for answer in answers) == 5
    assert await db.read(lambda c: c.execute(select(func.count()).select_from(schema.meta)).scalar()) == 45


async def test_reader_can_not_write(db: SqliteDatabase) -> None:
    with pytest.raises(Exception, match="readonly"):
        await db.read(lambda c: c.execute(insert(schema.meta).values(key="x", value="y")))


async def test_what_was_handed_in_is_stored_before_it_closes(tmp_path: Path) -> None:
    db = SqliteDatabase(tmp_path / "store.db")
    pending = [
        asyncio.ensure_future(db.write(ANY, lambda c, n=n: c.execute(insert(schema.meta).values(key=str(n), value=""))))  # type: ignore[misc]
        for n in range(200)
    ]
    await asyncio.sleep(0)
    await asyncio.to_thread(db.close)
    await asyncio.gather(*pending)
    again = SqliteDatabase(tmp_path / "store.db")
    assert await again.read(lambda c: c.execute(select(func.count()).select_from(schema.meta)).scalar()) == 200
    again.close()


async def test_object_with_a_null_loses_the_attribute_and_keeps_its_version_when_nothing_changed(
    db: SqliteDatabase,
) -> None:
    ref = types_pb2.ObjectRef(kind="game", name="arena")

    def put(values: dict[str, object], expected: int | None = None) -> types_pb2.Object:
        return db.write_now(ANY, lambda c: objects.put(c, ref, values, replace=False, expected_version=expected))

    assert put({"a": 1, "b": {"c": [2**60]}}, 0).version == 1
    assert put({"a": 1}).version == 1
    changed = put({"a": None})
    assert (changed.version, changed.attributes_json) == (2, b'{"b":{"c":[1152921504606846976]}}')
    with pytest.raises(Conflict, match="exists already, with version 2"):
        put({}, 0)


async def test_event_filters_take_prefixes_literally(db: SqliteDatabase) -> None:
    for type_ in ("run.finished", "runXfinished", "node.online"):
        db.write_now(ANY, lambda c, type_=type_: events.add(c, type_, "s", node_id="n1"))  # type: ignore[misc]
    wish = control_service_pb2.EventFilter(types=["run.", "node.on_"])
    found = await db.read(lambda c: events.after(c, 0, wish, 10))
    assert [event.type for event in found] == ["run.finished"]


@pytest.mark.parametrize(
    ("data", "lines", "expected"),
    [
        (b"a\nb\nc\n", 1, b"c\n"),
        (b"a\nb\nc\n", 2, b"b\nc\n"),
        (b"a\nb\nc", 1, b"c"),
        (b"a\nb\nc", 9, b"a\nb\nc"),
        (b"\n\n\n", 2, b"\n\n"),
        (b"", 3, b""),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 100])
def test_tail_has_the_last_lines_however_the_log_was_cut(
    db: SqliteDatabase, data: bytes, lines: int, expected: bytes, size: int
) -> None:
    accept(db)
    append(db, data, size)
    chunks, _ = db.write_now(ANY, lambda c: logs.tail(c, "r1", lines))
    assert b"".join(chunk.data for chunk in chunks) == expected


@given(data=st.binary(max_size=60), sends=st.lists(st.tuples(st.integers(0, 59), st.integers(1, 60)), max_size=20))
@settings(max_examples=40, deadline=None)
def test_log_is_always_a_prefix_of_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, sends: list[tuple[int, int]]
) -> None:
    db = SqliteDatabase(tmp_path_factory.mktemp("store") / "store.db")
    try:
        accept(db)
        end = 0
        for offset, length in sends:
            piece = data[offset : offset + length]
            chunk = types_pb2.RunLogChunk(run_id="r1", step="a", attempt=1, stream=OUT, offset=offset, data=piece)
            db.write_now(ANY, lambda c, chunk=chunk: logs.append(c, "n1", [logs.measure(chunk)]))  # type: ignore[misc]
            if offset <= end:
                end = max(end, offset + len(piece))
        chunks, _ = db.write_now(ANY, lambda c: logs.read(c, "r1", after=0))
        assert b"".join(chunk.data for chunk in chunks) == data[:end]
        assert [chunk.offset for chunk in chunks] == sorted(chunk.offset for chunk in chunks)
    finally:
        db.close()


def test_packed_chunk_that_unpacks_to_too_much_is_refused() -> None:
    import zstandard

    bomb = zstandard.ZstdCompressor().compress(bytes(logs.MAX_CHUNK_BYTES + 1))
    assert len(bomb) < 10_000
    chunk = types_pb2.RunLogChunk(run_id="r", step="a", attempt=1, stream=OUT, data=bomb, zstd=True)
    with pytest.raises(InvalidInput, match="more than"):
        logs.measure(chunk)


def accept(db: SqliteDatabase) -> None:
    new = runs.NewRun(
        "r1", "l", "operator:a", "k", b"", "p", b"", b"", "n1", None, {}, [], 0, [types_pb2.StepStatus(name="a")]
    )
    db.write_now(ANY, lambda c: runs.accept(c, new))


def append(db: SqliteDatabase, data: bytes, size: int) -> None:
    for offset in range(0, len(data), size):
        chunk = types_pb2.RunLogChunk(
            run_id="r1", step="a", attempt=1, stream=OUT, offset=offset, data=data[offset : offset + size]
        )
        db.write_now(ANY, lambda c, chunk=chunk: logs.append(c, "n1", [logs.measure(chunk)]))  # type: ignore[misc]
