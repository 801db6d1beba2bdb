"""A journal that another version of the agent wrote: an older one is brought up to date, a newer one left alone."""

from __future__ import annotations

import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from agent_core.damage import open_journal
from agent_core.journal import MIGRATED_AFTER, MIGRATED_BEFORE, Journal
from agent_core.state import State, migrations
from outrider.errors import InvalidInput
from outrider.failpoints import ENVIRONMENT
from outrider.v1 import node_service_pb2 as pb
from outrider.v1 import types_pb2 as types

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


def older(path: Path) -> None:
    """A journal of the first form, with a run in it."""
    Journal(path, migrations()[:1]).close()
    command = pb.RunPipeline(run_id="r", lease_id="l", pipeline_yaml=b"name: p")
    status = types.StepStatus(name="a", state=types.STEP_STATE_RUNNING, attempt=1)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(
            "INSERT INTO runs (run_id, lease_id, command, state, accepted_at, boot_id, boot_clock)"
            " VALUES ('r', 'l', ?, ?, 1, 'b', 1)",
            (command.SerializeToString(), types.RUN_STATE_RUNNING),
        )
        db.execute(
            "INSERT INTO steps (run_id, name, position, status) VALUES ('r', 'a', 0, ?)", (status.SerializeToString(),)
        )
        db.execute("INSERT INTO attempts VALUES ('r', 'a', 1, 'c', 'started', 'b', 1, 'e')")


OPEN = """
import sys
from pathlib import Path
from agent_core.damage import open_journal
from agent_core.state import migrations
open_journal(Path(sys.argv[1]), migrations(), used=True)
"""


@pytest.mark.parametrize("point", [MIGRATED_BEFORE, MIGRATED_AFTER])
@pytest.mark.parametrize("number", [1, 2, len(migrations()) - 1])
def test_an_agent_killed_while_it_brings_its_journal_up_to_date_starts_with_all_that_is_in_it(
    point: str, number: int, tmp_path: Path
) -> None:
    path = tmp_path / "journal.db"
    older(path)
    killed = subprocess.run(
        [sys.executable, "-c", OPEN, path], env=os.environ | {ENVIRONMENT: f"{point}=kill@{number}"}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        assert db.execute("PRAGMA user_version").fetchone()[0] == number + (point == MIGRATED_AFTER)
    journal, damage = open_journal(path, migrations(), used=True)
    assert damage is None
    assert journal.query_now("PRAGMA user_version")[0][0] == len(migrations())
    [run], unreadable = State(journal).unfinished()
    assert not unreadable
    assert run.command.pipeline_yaml == b"name: p"
    assert run.steps["a"].status.attempt == 1
    assert (run.attempts["a"].container, run.attempts["a"].phase, run.attempts["a"].masked) == ("c", "started", True)
    journal.close()
