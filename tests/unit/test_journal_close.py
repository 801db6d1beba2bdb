"""Closing the journal beside queries that nobody waits for any more."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest

from agent_core.journal import Journal

SLOW = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 300000) SELECT count(*) FROM n"


def test_closing_waits_for_a_query_that_still_runs(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db", [])
    begun = threading.Event()
    answers: list[int] = []

    def read() -> None:
        journal.query_now("SELECT 1")
        begun.set()
        answers.append(journal.query_now(SLOW)[0][0])

    reader = threading.Thread(target=read)
    reader.start()
    begun.wait()
    while not journal._readers[0].lock.locked() and reader.is_alive():
        pass
    journal.close()
    reader.join()
    assert answers == [300_000]


def test_a_closed_journal_is_not_opened_again_by_a_query(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db", [])
    journal.query_now("SELECT 1")
    journal.close()
    with pytest.raises(sqlite3.ProgrammingError):
        journal.query_now("SELECT 1")
