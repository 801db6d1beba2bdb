"""A journal that another version of the agent wrote: an older one is brought up to date, a newer one left alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from agent_core.journal import Journal
from outrider.errors import InvalidInput

FIRST, SECOND = "CREATE TABLE one (x)", "CREATE TABLE two (x)"


def test_an_older_journal_gets_what_is_new_and_keeps_what_it_has(tmp_path: Path) -> None:
    old = Journal(tmp_path / "journal.db", [FIRST])
    old.close()
    new = Journal(tmp_path / "journal.db", [FIRST, SECOND])
    assert new.query_now("SELECT count(*) FROM one, two")[0][0] == 0
    new.close()


def test_a_newer_journal_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    Journal(path, [FIRST, SECOND]).close()
    before = hashlib.sha256(path.read_bytes()).digest()
    with pytest.raises(InvalidInput, match=r"journal.db was written by a newer version of the agent") as refused:
        Journal(path, [FIRST])
    assert refused.value.code == "journal_newer"
    assert hashlib.sha256(path.read_bytes()).digest() == before
    Journal(path, [FIRST, SECOND]).close()
