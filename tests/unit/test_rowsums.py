"""Bits that flip within the journal's rows: no other value is taken for the one that was written."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from agent_core.damage import open_journal
from agent_core.journal import Journal
from agent_core.rowsums import check
from agent_core.runtimes.fake import FakeProcess, FakeRuntime
from agent_core.state import Clock, RunRecord, State, migrations
from agent_core.transitions import Transition
from outrider.v1 import node_service_pb2 as pb
from outrider.v1 import types_pb2 as types
from tests.agent_rig import BASE_IMAGE, rig
from tests.faults import damage

RUNS = 12


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    """A journal with runs that are under way, that its agent has left."""
    path = tmp_path / "journal.db"
    journal, _ = open_journal(path, migrations())
    state = State(journal)
    for number in range(RUNS):
        run = f"run{number:02d}"
        command = pb.RunPipeline(run_id=run, lease_id=f"lease{number}", pipeline_yaml=b"x" * 800, args_json=b"{}")
        steps = [types.StepStatus(name=name, uses="x.y", reason="for a test") for name in ("a", "b")]
        await state.commit(Transition.RUN_ACCEPTED, state.accept_run(command, steps))
        await state.commit(
            Transition.ATTEMPT_INTENDED,
            state.step_plan(run, "a", '{"image": "i"}', '{"key": "value"}'),
            state.attempt_intent(run, "a", 1, f"outrider-{run}-a-1", "boot"),
        )
        await state.commit(Transition.ATTEMPT_EXITED, state.attempt_exited(run, "a", 1, 1, False))
    await state.note_time()
    journal.close()
    return path


def known(state: State) -> tuple[dict[str, RunRecord], set[str]]:
    """The runs to go on with, and those that can't be relied on."""
    records, unreadable = state.unfinished()
    return {record.command.run_id: record for record in records}, {held.run_id for held, _ in unreadable}


def opened(path: Path) -> Iterator[State]:
    journal, found = open_journal(path, migrations(), used=True)
    try:
        if found is None:
            yield State(journal)
    finally:
        journal.close()


def test_no_bit_that_flips_gives_a_run_another_past(path: Path) -> None:
    whole = path.read_bytes()
    [(before, unreadable)] = [known(state) for state in opened(path)]
    assert (len(before), unreadable) == (RUNS, set())
    # In the bytes that hold something: nine of ten are free.
    places = [place for place, byte in enumerate(whole) if byte and place >= damage.PAGE]
    draw = random.Random(11)
    doubted = 0
    for _ in range(250):
        place = draw.choice(places)
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        for state in opened(path):
            after, unreadable = known(state)
            doubted += len(unreadable)
            assert all(after[run] == before[run] for run in after), place
            assert set(after) | unreadable == set(before), place
        for left in path.parent.glob("journal.db*"):
            left.unlink()
    assert doubted > 20


def change(path: Path, sql: str, *values: object) -> None:
    """What a flipped bit does to a row, on purpose."""
    with closing(sqlite3.connect(path)) as db, db:
        assert db.execute(sql, values).rowcount == 1


async def test_a_damaged_row_stays_damaged_when_it_is_changed(path: Path) -> None:
    change(path, "UPDATE attempts SET container = 'another' WHERE run_id = 'run03'")
    change(path, "UPDATE runs SET command = x'00' WHERE run_id = 'run04'")
    journal, _ = open_journal(path, migrations())
    state = State(journal, Clock("another boot"))
    await state.note_time()  # as an agent does when it starts
    await state.commit(Transition.ATTEMPT_STARTED, state.attempt_phase("run03", "a", 1, "started"))
    records, unreadable = known(state)
    assert unreadable == {"run03", "run04"}
    assert len(records) == RUNS - 2
    journal.close()


async def test_a_run_that_seems_to_be_over_since_a_bit_flipped_is_given_up_once(path: Path) -> None:
    change(path, "UPDATE runs SET state = ? WHERE run_id = 'run05'", types.RUN_STATE_SUCCEEDED)
    journal, _ = open_journal(path, migrations())
    state = State(journal)
    assert known(state)[1] == {"run05"}
    failure = types.Failure(message="it can't be read")
    await state.commit(Transition.RUN_GIVEN_UP, *state.give_up("run05", failure))
    assert known(state)[1] == set()
    [report] = state.ends(["run05"])
    assert (report.state, report.failure.message) == (types.RUN_STATE_UNKNOWN, failure.message)
    journal.close()


def test_the_end_of_a_run_whose_steps_are_damaged_is_told_as_unknown(path: Path) -> None:
    change(path, "UPDATE runs SET state = ?, row_sum = NULL WHERE run_id = 'run06'", types.RUN_STATE_FAILED)
    change(path, "UPDATE steps SET position = 7 WHERE run_id = 'run06' AND name = 'a'")
    for state in opened(path):
        [report] = state.ends(["run06"])
        assert (report.state, report.failure.code) == (types.RUN_STATE_UNKNOWN, "journal_damaged")
        assert not report.steps


def test_a_pipeline_that_is_not_the_one_announced_is_not_gone_on_with(path: Path) -> None:
    command = pb.RunPipeline(run_id="run07", lease_id="l", pipeline_yaml=b"name: q", pipeline_sha256=b"p" * 32)
    blob = command.SerializeToString()
    change(path, "UPDATE runs SET command = ?, row_sum = NULL WHERE run_id = 'run07'", blob)
    for state in opened(path):
        assert known(state)[1] == {"run07"}


def test_text_that_is_none_any_more_keeps_no_other_row_from_being_read(path: Path) -> None:
    change(path, "UPDATE attempts SET container = CAST(x'ff41' AS TEXT) WHERE run_id = 'run08'")
    for state in opened(path):
        asyncio.run(state.note_time())
        records, unreadable = known(state)
        assert (len(records), unreadable) == (RUNS - 1, {"run08"})


FORM = "CREATE TABLE one (name TEXT NOT NULL, number REAL, row_sum BLOB) STRICT;"


def test_sums_go_with_the_columns_of_a_newer_form(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    journal = Journal(path, [FORM])
    sql = "INSERT INTO one (name, number) VALUES ('whole', 1.0), ('damaged', 1.0)"
    journal.submit(Transition.EVENT_NOTED, lambda db: db.execute(sql).rowcount).result()
    journal.close()
    change(path, "UPDATE one SET number = 2.0 WHERE name = 'damaged'")
    journal = Journal(path, [FORM, "ALTER TABLE one ADD COLUMN more INTEGER NOT NULL DEFAULT 5"])
    rows = {row["name"]: row for row in journal.query_now("SELECT * FROM one")}
    assert rows["whole"]["row_sum"]
    check(rows["whole"])
    with pytest.raises(ValueError, match="damaged"):
        check(rows["damaged"])
    journal.close()


async def test_a_step_that_seems_not_to_have_begun_since_a_bit_flipped_is_not_run_again(tmp_path: Path) -> None:
    runs = []

    async def program(process: FakeProcess) -> int:
        runs.append(process.spec.name)
        process.write(b"up\n")
        return 0 if "-a-" in process.spec.name else await process.signalled.wait()

    async def hold(process: FakeProcess) -> int:
        return await process.signalled.wait()

    engine = FakeRuntime({BASE_IMAGE: program, "outrider/pause:1": hold}, images=set())
    steps = '{"name": "p", "steps": [{"name": "a", "uses": "test.shell"}, {"name": "b", "uses": "test.shell"}]}'
    async with rig(tmp_path / "state", engine, node_id="n1") as first:
        run_id = await first.start(steps)
        await first.until(lambda: first.log(run_id, "b") == b"up\n")
    path = tmp_path / "state/journal.db"
    pending = types.StepStatus(name="a", uses="test.shell", state=types.STEP_STATE_PENDING).SerializeToString()
    change(path, "UPDATE steps SET status = ? WHERE run_id = ? AND name = 'a'", pending, run_id)
    change(path, "DELETE FROM attempts WHERE run_id = ? AND step = 'a'", run_id)
    async with rig(tmp_path / "state", engine, node_id="n1") as second:
        await second.until(lambda: second.told(run_id).state == "unknown")
        assert second.told(run_id).failure.code == "journal_damaged"
        await second.runs.accept(
            pb.RunPipeline(run_id=run_id, lease_id="lease-1"), command_id="again", digest=b"d"
        )  # the server asks once more
    assert len(runs) == 2
    await engine.aclose()
