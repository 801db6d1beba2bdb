"""What of a database's newest commits is lost: told from what a crash leaves, which is no loss."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from outrider.sqlite_loss import COMMITS, CommitMark, commits_lost, damage_of_log, mark_of
from tests.faults import damage


class Database:
    """One in use, with a row for each of its commits. ``left`` is what a kill leaves of it."""

    def __init__(self, path: Path, *, page_bytes: int = 4096) -> None:
        self.path = path
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.connection.execute(f"PRAGMA page_size={page_bytes}")
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "cache_size=10"):
            self.connection.execute(f"PRAGMA {pragma}")
        self.connection.execute("CREATE TABLE IF NOT EXISTS rows (content BLOB)")
        self.mark = CommitMark(path, counted(path))

    def commit(self, *, rows: int = 3) -> None:
        self.connection.execute("BEGIN IMMEDIATE")
        for _ in range(rows):
            self.connection.execute("INSERT INTO rows VALUES (randomblob(3000))")
        self.connection.execute(self.mark.counting)
        self.connection.execute("COMMIT")
        self.mark.committed()

    def left(self, name: str) -> Path:
        return damage.leave(self.path, self.path.parent / name / "a.db")

    def close(self) -> None:
        self.connection.close()
        self.mark.close()


def counted(path: Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        return int(db.execute(COMMITS).fetchone()[0])


def lost(path: Path) -> str | int:
    """What is found to be lost when it is opened: what is wrong with the log, or so many commits."""
    return damage_of_log(path) or commits_lost(path, counted(path))


@pytest.fixture
def database(tmp_path: Path) -> Database:
    made = Database(tmp_path / "a.db")
    for _ in range(20):
        made.commit()
    return made


def test_what_a_kill_or_a_stop_leaves_has_lost_nothing(database: Database) -> None:
    assert lost(database.left("killed")) == 0
    database.close()
    assert lost(database.path) == 0
    again = Database(database.path)
    again.commit()
    assert counted(again.path) == 21
    assert lost(again.left("again")) == 0
    again.close()


@pytest.mark.parametrize("page_bytes", [512, 4096, 65536])
def test_a_bit_that_flips_in_the_log_is_found_wherever_it_is(page_bytes: int, tmp_path: Path) -> None:
    database = Database(tmp_path / "a.db", page_bytes=page_bytes)
    for _ in range(5):
        database.commit()
    whole = damage.log_of(database.path).read_bytes()
    for place in [0, 9, 17, 31, *random.Random(3).sample(range(32, len(whole)), 40)]:
        left = database.left(f"flipped-{place}")
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        damage.log_of(left).write_bytes(flipped)
        assert lost(left), place
    database.close()


@pytest.mark.parametrize("way", [name for name in damage.WAYS if name.startswith("log ")])
def test_a_log_that_lost_its_end_is_found(way: str, database: Database) -> None:
    left = database.left(way)
    damage.WAYS[way](left)
    assert lost(left)
    database.close()


def test_more_than_one_commit_that_can_not_be_read_is_found_without_the_mark(database: Database) -> None:
    left = database.left("no mark")
    mark_of(left).unlink()
    damage.flip_in_log(left)
    assert "its write-ahead log is damaged at frame" in damage_of_log(left)
    database.close()


def test_a_commit_that_a_power_cut_tore_is_no_damage(database: Database) -> None:
    before = database.left("before")
    begun = damage.current_frames(before)
    database.commit()
    for frame in range(begun, damage.current_frames(database.path)):  # whichever of its blocks was not written yet
        after = database.left(f"torn-{frame}")
        damage.flip_in_log(after, frame)
        assert damage_of_log(after) == ""
        assert lost(after) == 1  # as long as nobody says that it was not on the disk
        torn = database.left(f"torn-{frame}-unsynced")
        damage.flip_in_log(torn, frame)
        mark_of(torn).write_bytes(mark_of(before).read_bytes())
        assert lost(torn) == 0
        assert counted(torn) == 20
    database.close()


def test_a_log_that_ends_anywhere_in_a_commit_under_way_is_no_damage(database: Database) -> None:
    before = database.left("before")
    database.commit()
    whole = damage.log_of(database.path).read_bytes()
    size = damage.log_of(before).stat().st_size
    for cut in random.Random(5).sample(range(size, len(whole)), 20):
        damage.leave(before, before.parent / f"{cut}" / "a.db")
        torn = before.parent / f"{cut}" / "a.db"
        damage.log_of(torn).write_bytes(whole[:cut])
        assert lost(torn) == 0
    database.close()


def test_what_an_undone_transaction_leaves_in_the_log_is_no_damage(database: Database) -> None:
    frames = damage.current_frames(database.path)
    database.connection.execute("BEGIN IMMEDIATE")
    for _ in range(100):  # more than its cache holds, so that it goes to the log before the end
        database.connection.execute("INSERT INTO rows VALUES (randomblob(3000))")
    assert damage.current_frames(database.path) > frames + 50
    assert lost(database.left("under way")) == 0
    database.connection.execute("ROLLBACK")
    database.commit()
    assert lost(database.left("undone")) == 0
    database.close()


def test_what_former_uses_of_the_log_leave_in_it_is_no_damage(database: Database) -> None:
    database.connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
    assert lost(database.left("at its beginning")) == 0
    database.commit()
    left = database.left("begun anew")
    assert 0 < damage.current_frames(left) < damage.log_of(left).stat().st_size // damage.LOG_FRAME
    assert lost(left) == 0
    database.close()


def test_a_mark_that_is_not_whole_says_nothing(database: Database) -> None:
    database.close()
    mark = mark_of(database.path)
    whole = mark.read_bytes()
    for content in (b"", b"\n", whole[:-3], whole.replace(b"20 ", b"90 "), b"\xff" * 20):
        mark.write_bytes(content)
        assert commits_lost(database.path, 3) == 0
    mark.write_bytes(whole)
    assert commits_lost(database.path, 3) == 17


def test_an_older_database_in_its_place_is_behind_the_mark(database: Database) -> None:
    older = damage.leave(database.path, database.path.parent / "older" / "a.db")
    for _ in range(3):
        database.commit()
    mark_of(older).write_bytes(mark_of(database.path).read_bytes())
    assert lost(older) == 3
    database.close()


def test_the_count_begins_anew_after_its_last_number(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with closing(sqlite3.connect(path)) as db:
        mark = CommitMark(path, 2**31 - 1)
        db.execute(mark.counting)
        mark.committed()
        mark.close()
    assert counted(path) == 0
    assert commits_lost(path, 0) == 0
    assert commits_lost(path, 2**31 - 3) == 3
