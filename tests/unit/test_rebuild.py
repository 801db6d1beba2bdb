"""What an agent makes of the loss of its journal: found out, put aside, said; and what of the runs can be known."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from agent_core.damage import REBUILD, open_journal
from agent_core.journal import distrust_file
from agent_core.rebuild import find_steps
from agent_core.runtimes.base import ContainerInfo
from agent_core.state import Clock, State, migrations
from agent_core.transitions import Transition
from outrider.errors import InvalidInput
from outrider.pipeline import Step, load_pipeline
from outrider.sqlite_loss import COMMITS
from outrider.v1 import node_service_pb2 as pb
from outrider.v1 import types_pb2 as types
from tests.faults import damage

PIPELINE = load_pipeline(
    b"""
name: test
steps:
  - {name: a, uses: x.y}
  - {name: b, uses: x.y}
"""
)
PENDING, RUNNING, WAITING = types.STEP_STATE_PENDING, types.STEP_STATE_RUNNING, types.STEP_STATE_WAITING
SUCCEEDED, UNKNOWN = types.STEP_STATE_SUCCEEDED, types.STEP_STATE_UNKNOWN


def written(path: Path, *, killed: bool = False) -> None:
    """A journal that an agent has used; ``killed``: that it did not close."""
    used = path.with_name("in-use") / path.name if killed else path
    journal, found = open_journal(used, migrations())
    assert found is None
    for number in range(50):
        journal.submit(
            Transition.EVENT_NOTED,
            lambda db, n=number: db.execute("INSERT INTO meta VALUES (?, ?)", (str(n), "x" * 2000)) and None,  # type: ignore[misc]
        ).result()
    if killed:
        damage.leave(used, path)
    journal.close()


@pytest.mark.parametrize("way", damage.WAYS)
def test_a_damaged_journal_is_found_kept_aside_and_begun_anew(way: str, tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    written(path, killed=True)
    damage.WAYS[way](path)
    left = path.read_bytes() if path.exists() else b""
    journal, found = open_journal(path, migrations(), used=True)
    assert found is not None
    assert found.reason
    if way == "removed":
        assert found.aside is None
    else:
        assert found.aside is not None
        # What is left of a log that was cut off goes into the file: the rest is missed only once SQLite has read it.
        assert way == "log cut" or found.aside.read_bytes() == left
    assert journal.query_now("SELECT 1 FROM meta WHERE key = ?", (REBUILD,))
    journal.close()
    again, found = open_journal(path, migrations(), used=True)
    assert found is None  # it is known to be new, and still to be rebuilt
    assert again.query_now("SELECT 1 FROM meta WHERE key = ?", (REBUILD,))
    again.close()


def test_a_first_start_finds_nothing_missing(tmp_path: Path) -> None:
    journal, found = open_journal(tmp_path / "journal.db", migrations(), used=False)
    assert found is None
    assert not journal.query_now("SELECT 1 FROM meta WHERE key = ?", (REBUILD,))
    journal.close()


def test_what_a_killed_agent_leaves_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    written(path, killed=True)
    journal, found = open_journal(path, migrations(), used=True)
    assert found is None
    assert journal.query_now("SELECT count(*) FROM meta WHERE length(value) = 2000")[0][0] == 50
    journal.close()


def test_a_transaction_that_changes_nothing_is_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    written(path)
    journal, _ = open_journal(path, migrations())
    before = journal.query_now(COMMITS)[0][0]
    journal.submit(Transition.FORGOTTEN, lambda db: db.execute("DELETE FROM commands")).result()
    assert journal.query_now(COMMITS)[0][0] == before
    journal.submit(Transition.FORGOTTEN, lambda db: db.execute("DELETE FROM meta")).result()
    assert journal.query_now(COMMITS)[0][0] == before + 1
    journal.close()


def test_a_kill_between_putting_aside_and_noting_it_does_not_hide_the_loss(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    written(path)
    distrust_file(path).write_text("it was torn")  # as it stands from before the file is put aside until after the note
    journal, found = open_journal(path, migrations(), used=True)
    assert found is not None
    assert found.reason == "it was torn"
    assert not distrust_file(path).exists()
    journal.close()


def test_a_journal_of_a_newer_agent_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    written(path)
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 9999")
    with pytest.raises(InvalidInput, match="newer"):
        open_journal(path, migrations(), used=True)
    assert path.exists()
    assert not list(tmp_path.glob("*.damaged*"))


def test_damage_met_while_the_journal_is_used_is_told_and_remembered(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    written(path)
    journal, _ = open_journal(path, migrations())
    told: list[str] = []
    journal.on_damage = told.append
    with path.open("r+b") as file:  # in place, beneath the open connections
        for page in range(1, path.stat().st_size // damage.PAGE):
            os.pwrite(file.fileno(), b"\x55" * damage.PAGE, page * damage.PAGE)
    with pytest.raises(sqlite3.DatabaseError):
        journal.query_now("SELECT * FROM meta")
    assert told
    assert journal.damaged
    assert distrust_file(path).exists()
    journal.close()


def container(step: str, attempt: int, *, started: bool = True) -> ContainerInfo:
    return ContainerInfo(
        id=f"{step}{attempt}",
        name=f"outrider-r-{step}-{attempt}",
        image="i",
        state="running" if started else "created",
        labels={},
        started_at=datetime.now(UTC) if started else None,
    )


def found(
    told: dict[str, tuple[int, int]],
    containers: dict[str, dict[int, ContainerInfo]] | None = None,
    begun: dict[str, int] | None = None,
    idempotent: bool = False,
) -> dict[str, tuple[int, list[tuple[int, str]]]]:
    """State and attempts by step; ``told``: state and attempt by step, as the server knows them."""
    statuses = [types.StepStatus(name=name, state=state, attempt=n) for name, (state, n) in told.items()]  # type: ignore[arg-type]

    def is_idempotent(_step: Step) -> bool:
        return idempotent

    return {
        each.status.name: (each.status.state, [(a.attempt, a.phase) for a in each.attempts])
        for each in find_steps(PIPELINE, statuses, containers or {}, begun, is_idempotent)
    }


def test_what_is_over_stays_over_and_its_leftovers_are_known_as_such() -> None:
    result = found({"a": (SUCCEEDED, 1), "b": (RUNNING, 1)}, {"a": {1: container("a", 1)}, "b": {1: container("b", 1)}})
    assert result == {"a": (SUCCEEDED, [(1, "done")]), "b": (RUNNING, [(1, "started")])}


def test_a_container_is_adopted_and_one_that_never_started_is_fenced_like_any_other() -> None:
    result = found({"a": (RUNNING, 1), "b": (PENDING, 0)}, {"a": {1: container("a", 1, started=False)}}, {"a": 1})
    assert result == {"a": (RUNNING, [(1, "intended")]), "b": (PENDING, [])}


def test_a_step_of_a_run_that_the_server_gave_up_is_adopted_again() -> None:
    result = found({"a": (UNKNOWN, 1), "b": (UNKNOWN, 0)}, {"a": {1: container("a", 1)}}, {"a": 1})
    assert result == {"a": (RUNNING, [(1, "started")]), "b": (PENDING, [])}


def test_a_step_that_was_begun_and_is_not_there_is_unknown() -> None:
    assert found({"a": (RUNNING, 1), "b": (PENDING, 0)}, {}, {"a": 1})["a"] == (UNKNOWN, [])


def test_a_step_is_unknown_where_nobody_can_tell_whether_it_was_begun() -> None:
    assert found({"a": (PENDING, 0), "b": (PENDING, 0)}) == {"a": (UNKNOWN, []), "b": (UNKNOWN, [])}


def test_a_step_that_was_begun_unseen_by_the_server_is_not_carried_out_again() -> None:
    assert found({"a": (SUCCEEDED, 1), "b": (PENDING, 0)}, {}, {"a": 1, "b": 1})["b"] == (UNKNOWN, [])


def test_the_container_of_a_former_attempt_says_nothing_of_the_one_after_it() -> None:
    result = found({"a": (RUNNING, 2), "b": (PENDING, 0)}, {"a": {1: container("a", 1)}}, {"a": 2})
    assert result["a"] == (UNKNOWN, [(1, "done")])


def test_an_idempotent_step_is_tried_again_under_the_next_number() -> None:
    result = found({"a": (RUNNING, 2), "b": (PENDING, 0)}, {}, {"a": 2}, idempotent=True)
    assert result == {"a": (WAITING, [(2, "done")]), "b": (PENDING, [])}


async def test_time_spent_before_a_reboot_counts(tmp_path: Path) -> None:
    class Boot(Clock):
        time = 1000.0

        def now(self) -> float:
            return type(self).time

    journal, _ = open_journal(tmp_path / "journal.db", migrations())
    before, after = State(journal, Boot("one")), State(journal, Boot("two"))
    command = pb.RunPipeline(run_id="r", lease_id="l")
    await before.commit(Transition.RUN_ACCEPTED, before.accept_run(command, [types.StepStatus(name="a")]))
    await before.commit(Transition.ATTEMPT_INTENDED, before.attempt_intent("r", "a", 1, "c", ""))
    Boot.time += 40
    await before.note_time()
    Boot.time += 5  # is lost: the machine goes down before the next note
    Boot.time = 7.0
    await after.note_time()  # as an agent does when it starts
    Boot.time += 20
    record = after.find("r")
    assert record is not None
    attempt = record.attempts["a"]
    assert record.spent_s + after.clock.since(record.boot_id, record.boot_clock) == 60
    assert attempt.spent_s + after.clock.since(attempt.boot_id, attempt.boot_clock) == 60
    await after.note_time()
    record = after.find("r")
    assert record is not None
    assert record.spent_s + after.clock.since(record.boot_id, record.boot_clock) == 60
    journal.close()
