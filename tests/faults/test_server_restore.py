"""A server that is lost and restored from a backup: agents come back to it, and no run is done twice or invented."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from outrider.v1 import types_pb2 as types
from server_core.store.restored import NUMBERS_STEP
from tests.faults.checker import collect, compare, read_logs
from tests.faults.launcher import OUTRIDER, Launcher
from tests.faults.rig import Rig, expected_of, pipeline, step_of


@pytest.fixture
def rig(launcher: Launcher) -> Iterator[Rig]:
    with Rig.start(launcher=launcher) as made:
        yield made


def server_command(rig: Rig, *arguments: object) -> str:
    """`outrider server …`; what it says."""
    command = [OUTRIDER, "server", *map(str, arguments), "--config", rig.folder / "server.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def events_of(rig: Rig, type_: str) -> list[str]:
    with contextlib.closing(sqlite3.connect(f"file:{rig.store}?mode=ro", uri=True, timeout=10)) as db:
        rows = db.execute("SELECT subject FROM events WHERE type = ? ORDER BY sequence", (type_,))
        return [str(subject) for (subject,) in rows]


def differences(rig: Rig, *, but: str) -> list[str]:
    """What the checker finds, but for a run whose log waits on its node."""
    found = compare(collect(rig), gaps=True)
    return [problem for problem in found if but not in problem and "rows are left in logs" not in problem]


def times_run(rig: Rig, run_id: str, step: str) -> int:
    return len((rig.marks / f"ran-{run_id}-{step}").read_text().split())


def test_runs_of_a_server_restored_from_a_backup_are_settled_with_their_nodes_and_none_is_done_twice(
    rig: Rig, tmp_path: Path
) -> None:
    word, file = tmp_path / "word", tmp_path / "backup"
    word.write_text("correct horse battery\n")
    rig.set_object("game/arena", slots=16)
    going = rig.execute(pipeline(step_of("going", held=True), step_of("last")))
    ending = rig.execute(pipeline(step_of("ending", held=True)), object_="game/arena")
    queued = rig.execute(pipeline(step_of("queued")), object_="game/arena", key="once")
    for run_id, step in ((going, "going"), (ending, "ending")):
        rig.until_running(run_id, step)
        rig.until(lambda run_id=run_id, step=step: rig.step_state(run_id, step) == types.STEP_STATE_RUNNING)  # type: ignore[misc]
    rig.until(lambda: ending in rig.run(queued).reason, what="one run queued behind the other")
    epoch = rig.node().epoch

    assert "whole" in server_command(rig, "backup", file, "--passphrase-file", word)

    # What the backup does not know: both runs of the object end, their ends are acknowledged, and another begins.
    rig.release("ending")
    assert rig.ended(ending).state == types.RUN_STATE_SUCCEEDED
    assert rig.ended(queued).state == types.RUN_STATE_SUCCEEDED
    rig.until(lambda: rig.status().get("outbox_depth") == 0, what="an empty outbox")
    stranger = rig.execute(pipeline(step_of("stranger", held=True)))
    rig.until_running(stranger, "stranger")

    rig.server.kill()
    said = server_command(rig, "restore", file, "--passphrase-file", word, "--replace")
    assert "agents register anew" in said
    rig.start_server()
    rig.until_online()
    assert rig.node().epoch > epoch + NUMBERS_STEP - 1

    # What ended since is known as it ended, because the node is asked; what waited is not done again.
    assert rig.ended(ending).state == types.RUN_STATE_SUCCEEDED
    assert rig.ended(queued).state == types.RUN_STATE_SUCCEEDED
    assert times_run(rig, ending, "ending") == times_run(rig, queued, "queued") == 1
    assert rig.execute(pipeline(step_of("queued")), object_="game/arena", key="once") == queued
    # What still runs goes on.
    assert rig.run(going).state == types.RUN_STATE_RUNNING
    rig.release("going")
    assert rig.ended(going).state == types.RUN_STATE_SUCCEEDED
    # What the server never heard of is told, and left alone.
    rig.until(lambda: stranger in events_of(rig, "run.unrecognised"), what="the stranger told")
    assert "outrider-" + stranger in rig.docker("ps", "--format", "{{.Names}}")
    rig.release("stranger")
    rig.until(lambda: not rig.status().get("runs"), what="the stranger ended")
    # New numbers are beyond all that anybody holds.
    later = rig.ended(rig.execute(pipeline(step_of("later"))))
    assert later.sequence > NUMBERS_STEP
    del rig.accepted[stranger]
    # Of their logs, what was acknowledged by the lost server is a gap; the stranger's waits on its node.
    logs = read_logs(rig, queued)
    assert [(log.data, log.gaps) for log in logs.values()] == [
        (b"", [(0, len(expected.stdout if stream == "stdout" else expected.stderr))])
        for (_, step, _, stream) in logs
        for expected in [expected_of(step)]
    ]
    rig.until(lambda: not differences(rig, but=stranger), what=f"nothing but {stranger} left over")
    for run_id in (ending, queued, going):
        assert events_of(rig, "run.finished").count(run_id) == 1
    assert events_of(rig, "store.restored") == ["store"]


@pytest.mark.parametrize("edge", [pytest.param("before", marks=pytest.mark.long), "after"])
def test_agent_killed_while_it_tells_a_restored_server_how_runs_ended_tells_it_again(
    rig: Rig, tmp_path: Path, edge: str
) -> None:
    file = tmp_path / "backup"
    run_id = rig.execute(pipeline(step_of("a", held=True)))
    rig.until_running(run_id, "a")
    rig.until(lambda: rig.step_state(run_id, "a") == types.STEP_STATE_RUNNING)
    server_command(rig, "backup", file)
    rig.release("a")
    assert rig.ended(run_id).state == types.RUN_STATE_SUCCEEDED
    rig.until(lambda: rig.status().get("outbox_depth") == 0, what="an empty outbox")
    rig.agent.kill()
    rig.server.kill()
    server_command(rig, "restore", file, "--replace")
    rig.start_server()
    assert rig.start_agent(failpoints=f"journal.run_retold.{edge}=kill").wait() == -9
    rig.start_agent()
    assert rig.ended(run_id).state == types.RUN_STATE_SUCCEEDED
    assert times_run(rig, run_id, "a") == 1
    rig.check(gaps=True)
