"""Retention: what goes and what stays, and that whoever reads a log that went is told."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import func, select, update

from outrider.v1 import control_service_pb2, types_pb2
from server_core.bus.local import LocalBus
from server_core.config import ServerConfig
from server_core.housekeeping import Housekeeping
from server_core.store import events, logs, requests, retention, runs, schema
from server_core.store.commits import Commit
from server_core.store.common import now_us
from server_core.store.sqlite import SqliteDatabase

DAY_US = 24 * 3600 * 1_000_000
ALL = control_service_pb2.EventFilter()


@pytest.fixture
def db(tmp_path: Path) -> Iterator[SqliteDatabase]:
    db = SqliteDatabase(tmp_path / "store.db")
    yield db
    db.close()


def keeping(db: SqliteDatabase, **settings: float) -> Housekeeping:
    return Housekeeping(db, LocalBus(), ServerConfig(**settings))  # type: ignore[arg-type]


def make_run(db: SqliteDatabase, run_id: str, *, state: int, age_days: float, size: int = 1000) -> None:
    """A run of that age, with a log on two streams."""
    steps = [types_pb2.StepStatus(name="a")]
    new = runs.NewRun(run_id, "l", "operator:a", run_id, b"", "p", b"", b"", "n1", None, {}, [], 0, steps)
    db.write_now(Commit.RUN_ACCEPT, lambda c: runs.accept(c, new))
    for stream in (1, 2):
        for offset in range(0, size, 400):
            data = b"x" * min(400, size - offset)
            chunk = types_pb2.RunLogChunk(
                run_id=run_id, step="a", attempt=1, stream=stream, offset=offset, data=data  # type: ignore[arg-type]
            )  # fmt: skip
            db.write_now(Commit.LOGS, lambda c, chunk=chunk: logs.append(c, "n1", [logs.measure(chunk)]))  # type: ignore[misc]
    then = now_us() - round(age_days * DAY_US)
    over = state not in runs.ACTIVE
    table = schema.runs
    values = {"state": state, "created_at": then, "finished_at": then if over else None}
    db.write_now(Commit.RUN_REPORT, lambda c: c.execute(update(table).where(table.c.run_id == run_id).values(**values)))


async def text_of(db: SqliteDatabase, run_id: str) -> tuple[bytes, int]:
    """What there is of a log, and how many bytes it says are missing."""
    chunks, _ = await db.read(lambda c: logs.read(c, run_id, after=0, limit=1000))
    return b"".join(chunk.data for chunk in chunks), sum(chunk.gap_bytes for chunk in chunks)


async def test_old_log_gives_way_to_a_gap_and_runs_that_are_not_over_keep_theirs(db: SqliteDatabase) -> None:
    make_run(db, "old", state=types_pb2.RUN_STATE_SUCCEEDED, age_days=40)
    make_run(db, "lost", state=types_pb2.RUN_STATE_UNKNOWN, age_days=40)
    make_run(db, "young", state=types_pb2.RUN_STATE_SUCCEEDED, age_days=20)
    make_run(db, "long", state=types_pb2.RUN_STATE_RUNNING, age_days=40)
    await keeping(db, keep_logs_days=30).once()
    for run_id in ("old", "lost"):
        assert await text_of(db, run_id) == (b"", 2000)
    for run_id in ("young", "long"):
        assert await text_of(db, run_id) == (b"x" * 2000, 0)
    assert (await db.read(lambda c: runs.get(c, "old"))).steps[0].name == "a"
    [told] = [e for e in await db.read(lambda c: events.after(c, 0, ALL, 10)) if e.type == "store.retired"]
    assert told.data_json == b'{"events":0,"runs":2,"log_bytes":4000}'
    await keeping(db, keep_logs_days=30).once()  # nothing is left to do, and nothing is said
    assert await db.read(events.last_number) == told.sequence


async def test_late_repetition_of_a_log_that_went_is_known_as_one(db: SqliteDatabase) -> None:
    make_run(db, "old", state=types_pb2.RUN_STATE_SUCCEEDED, age_days=40)
    await keeping(db, keep_logs_days=30).once()
    chunk = types_pb2.RunLogChunk(run_id="old", step="a", attempt=1, stream=1, offset=400, data=b"x" * 400)  # type: ignore[arg-type]
    appended = await db.write(Commit.LOGS, lambda c: logs.append(c, "n1", [logs.measure(chunk)]))
    assert [position.offset for position in appended.positions] == [1000]
    assert await text_of(db, "old") == (b"", 2000)


async def test_gap_of_unknown_length_stays_one(db: SqliteDatabase) -> None:
    make_run(db, "old", state=types_pb2.RUN_STATE_SUCCEEDED, age_days=40)
    chunk = types_pb2.RunLogChunk(run_id="old", step="a", attempt=1, stream=1, offset=1000, gap_bytes=-1)  # type: ignore[arg-type]
    await db.write(Commit.LOGS, lambda c: logs.append(c, "n1", [logs.measure(chunk)]))
    await keeping(db, keep_logs_days=30).once()
    chunks, _ = await db.read(lambda c: logs.read(c, "old", after=0))
    assert [(chunk.stream, chunk.gap_bytes) for chunk in chunks] == [(1, -1), (2, 1000)]


async def test_store_that_outgrew_its_size_gives_up_the_oldest_logs_first(db: SqliteDatabase) -> None:
    for number in range(6):
        make_run(db, f"r{number}", state=types_pb2.RUN_STATE_SUCCEEDED, age_days=1, size=40_000)
    used = await db.read(retention.used_bytes)
    await keeping(db, keep_logs_days=0, keep_store_bytes=used - 100_000).once()
    left = [bool((await text_of(db, f"r{number}"))[0]) for number in range(6)]
    assert left == [False, False, True, True, True, True]
    assert await db.read(retention.used_bytes) <= used - 100_000


async def test_events_go_by_age_and_by_number_whatever_the_clock_of_a_node_says(db: SqliteDatabase) -> None:
    for number in range(10):
        db.write_now(Commit.NODE_PRESENCE, lambda c, n=number: events.add(c, "node.online", f"s{n}"))  # type: ignore[misc]
        reported = types_pb2.Event(sequence=number + 1, type="container.exited", subject=f"s{number}")
        reported.time.FromSeconds(4_000_000_000)  # a node whose clock is decades ahead
        db.write_now(Commit.EVENTS, lambda c, e=reported: events.add_reported(c, "n1", [e]))  # type: ignore[misc]
    table = schema.events
    old = update(table).where(table.c.sequence <= 9, table.c.node_sequence == 0).values(time=now_us() - 100 * DAY_US)
    db.write_now(Commit.NODE_PRESENCE, lambda c: c.execute(old))
    await keeping(db, keep_events_days=90, keep_events=0).once()
    assert await db.read(lambda c: c.execute(select(func.min(table.c.sequence))).scalar()) == 10
    await keeping(db, keep_events_days=0, keep_events=5).once()
    kept = await db.read(lambda c: events.after(c, 0, ALL, 100))
    assert [event.sequence for event in kept if event.type != "store.retired"][-4:] == [17, 18, 19, 20]
    assert len(kept) == 6  # the newest five, and that older ones went


async def test_wall_clock_that_is_set_forward_makes_nothing_old(
    db: SqliteDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(db, "young", state=types_pb2.RUN_STATE_SUCCEEDED, age_days=1)
    db.write_now(Commit.REQUESTS_FORGOTTEN, lambda c: requests.keep(c, "operator:a", "request", b"d", b"answer"))
    running = keeping(db, keep_logs_days=30, keep_events_days=90)
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + 400 * DAY_US * 1000)
    await running.once()
    assert await text_of(db, "young") == (b"x" * 2000, 0)
    assert await db.read(lambda c: requests.answer_of(c, "operator:a", "request", b"d")) == b"answer"
    # As a server that is started after so long would have it: the guard is not for want of a clock.
    await keeping(db, keep_logs_days=30).once()
    assert await text_of(db, "young") == (b"", 2000)
    assert await db.read(lambda c: requests.answer_of(c, "operator:a", "request", b"d")) is None


async def test_nothing_goes_where_nothing_is_set(db: SqliteDatabase) -> None:
    make_run(db, "old", state=types_pb2.RUN_STATE_SUCCEEDED, age_days=4000)
    await keeping(db, keep_logs_days=0, keep_events_days=0, keep_events=0, keep_store_bytes=0).once()
    assert await text_of(db, "old") == (b"x" * 2000, 0)


async def test_runs_and_events_beyond_one_transaction_all_go(
    db: SqliteDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "EVENTS_AT_ONCE", 3)
    monkeypatch.setattr(retention, "RUNS_AT_ONCE", 2)
    for number in range(5):
        make_run(db, f"r{number}", state=types_pb2.RUN_STATE_FAILED, age_days=40, size=10)
        for _ in range(2):
            db.write_now(Commit.NODE_PRESENCE, lambda c: events.add(c, "node.online", "s"))
    await keeping(db, keep_logs_days=30, keep_events_days=0, keep_events=1).once()
    assert [await text_of(db, f"r{number}") for number in range(5)] == [(b"", 20)] * 5
    found = await db.read(lambda c: events.after(c, 0, ALL, 100))
    assert [event.type for event in found] == ["node.online", "store.retired"]
