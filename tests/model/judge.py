"""Compares what the server says, what the node keeps and what the engine did. Each promise is a check here."""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

from agent_core.runtimes.base import LABEL_KIND
from outrider.v1 import control_service_pb2 as cpb
from outrider.v1 import types_pb2 as types
from tests.model.engine import Execution
from tests.model.site import NODE, TIMEOUT_S
from tests.model.world import Submitted, World

SECRET = b"hunter2-hunter2"
SETTLED = (types.RUN_STATE_SUCCEEDED, types.RUN_STATE_FAILED, types.RUN_STATE_CANCELLED)
OVER = (*SETTLED, types.RUN_STATE_UNKNOWN)
_ROUNDS = 40


def settle(world: World) -> None:
    """Mend everything, let every program end, and wait until nothing is left to do."""
    world.engine.late_s, world.engine.stubborn, world.engine.forgets = 0.0, False, False
    for process in (world.agent_process, world.server_process):
        assert process is not None
        process.dies_at = None
    world.let(1)  # whatever was dying has died
    world.heal()
    if not world.server_up:
        world.start_server()
    if not world.engine.up:
        world.start_engine()
    if not world.agent_up:
        world.start_agent()
    world.drain(undo=True)
    world.let(60)
    for asked in world.submitted:
        if not asked.run_id:
            world.submit_again(asked)
            assert asked.run_id, f"{asked.key} is refused by a server that is well"
    world.find_retries()
    for _ in range(_ROUNDS):
        for run in world.engine.running():
            world.finish(run, 0)
        world.let(15)
        if not world.engine.running() and all(asked.states and asked.states[-1] in OVER for asked in world.submitted):
            break
    world.let(700)  # until the clean-up has come by


def judge(world: World) -> None:
    """After `settle`. AssertionError says which promise is broken."""
    assert world.server_up, "the server did not stay up"
    assert world.agent_up, "the agent did not stay up"
    runs = {run.run_id: run for run in _runs(world)}
    assert len(runs) == len(world.submitted), f"{len(world.submitted)} keys made {len(runs)} runs"
    twice = [key for key, count in Counter(each.key for each in world.engine.executions).items() if count > 1]
    assert not twice, f"these attempts ran more than once: {twice}"
    assert not world.engine.collisions, f"two runs of one object at a time: {world.engine.collisions}"
    for asked in world.submitted:
        _judge_run(world, asked, runs[asked.run_id])
    _judge_objects(world, runs)
    _judge_node(world)


def _runs(world: World) -> list[types.Run]:
    found = world.do(world.control.ListRuns(cpb.ListRunsRequest(node_id=NODE, limit=1000), timeout=TIMEOUT_S), 0)
    return list(found.runs)


def _judge_run(world: World, asked: Submitted, run: types.Run) -> None:
    where = f"run {asked.run_id} ({asked.pipeline.name}, {asked.key})"
    said = types.RunState.Name(run.state)
    assert run.state in OVER, f"{where} was acknowledged and is lost: {said} {run.reason}"
    # No node of the model forgets a run, so that what was unknown once may turn out, but never goes on.
    after = [
        state
        for former, state in itertools.pairwise(asked.states)
        if former in SETTLED or (former == types.RUN_STATE_UNKNOWN and state not in OVER)
    ]
    if asked.retry_of:
        assert run.retry_of == asked.retry_of, where
    assert not after, f"{where} changed after its end: {asked.states}"
    by_name = {step.name: step for step in run.steps}
    assert set(by_name) == set(asked.pipeline.steps), where
    for name, step in by_name.items():
        tries = sorted((e for e in world.engine.executions if e.key[:2] == (run.run_id, name)), key=lambda e: e.attempt)
        if step.from_run:
            assert step.from_run == asked.retry_of, f"{where} has step {name} from {step.from_run}"
            assert not tries, f"{where} took step {name} over and ran it all the same"
            assert step.state == types.STEP_STATE_SUCCEEDED, where
        elif not asked.resolved:
            _judge_step(f"{where} step {name}", asked, step, tries, by_name)
        for each in tries:
            _judge_log(world, where, each, secret=asked.pipeline.secret)
    if asked.resolved:
        return  # what an operator says of its steps is no truth of ours
    states = {step.state for step in run.steps}
    if types.STEP_STATE_CANCELLED in states:
        expected = types.RUN_STATE_CANCELLED
    elif types.STEP_STATE_FAILED in states:
        expected = types.RUN_STATE_FAILED
    elif types.STEP_STATE_UNKNOWN in states:
        expected = types.RUN_STATE_UNKNOWN
    else:
        expected = types.RUN_STATE_SUCCEEDED
    assert run.state == expected, f"{where} is {said}, its steps {[types.StepState.Name(s) for s in states]}"
    finished = _count(world.folder / "server/store.db", "events", "type = 'run.finished' AND subject = ?", run.run_id)
    assert finished == 1, f"{where} was told to have ended {finished} times"


def _judge_step(
    where: str,
    asked: Submitted,
    step: types.StepStatus,
    tries: list[Execution],
    steps: dict[str, types.StepStatus],
) -> None:
    pipeline, name = asked.pipeline, step.name
    said = types.StepState.Name(step.state)
    for former, later in itertools.pairwise(tries):
        again = (former.ended == "by itself" and former.exit_code == 75) or (
            name in pipeline.idempotent and (former.meddled or former.ended != "by itself")
        )
        assert again, f"{where} was tried again as {later.attempt} though {former.attempt} ended {former}"
    if tries and name not in pipeline.cleanup:
        bad = [need for need in pipeline.needs[name] if steps[need].state != types.STEP_STATE_SUCCEEDED]
        assert not bad, f"{where} ran though {bad} did not succeed"
    last = tries[-1] if tries else None
    truth = f"{where} is {said} ({step.reason or step.failure.message}); in truth: {last}"
    match step.state:
        case types.STEP_STATE_SUCCEEDED:
            assert last is not None, truth
            assert (last.ended, last.exit_code, last.attempt) == ("by itself", 0, step.attempt), truth
        case types.STEP_STATE_FAILED:
            told = last is not None and (last.exit_code != 0 or last.meddled)
            late = pipeline.timeout_s is not None and step.failure.code == "step_timeout"
            assert told or late, truth
        case types.STEP_STATE_SKIPPED:
            assert last is None, truth
        case types.STEP_STATE_CANCELLED:
            assert asked.cancel_asked, truth
        case types.STEP_STATE_UNKNOWN:
            assert last is not None, truth
            assert last.meddled, truth
        case _:
            raise AssertionError(f"{truth}: it has no end")


def _judge_log(world: World, where: str, run: Execution, *, secret: bool) -> None:
    async def read() -> list[types.RunLogChunk]:
        stream = world.control.StreamRunLogs(
            cpb.StreamRunLogsRequest(run_id=run.run_id, step=run.step, attempt=run.attempt), timeout=TIMEOUT_S
        )
        return [chunk async for chunk in stream if chunk.stream == types.LOG_STREAM_STDOUT]

    chunks = world.do(read(), 0)
    got, gap = b"", False
    for chunk in chunks:
        if chunk.gap_bytes:
            gap = True
            continue
        assert gap or chunk.offset == len(got), f"{where}: the log of {run.key} is out of order at {chunk.offset}"
        got += chunk.data
    expected = run.written.replace(SECRET, b"***") if secret else run.written
    if gap:
        assert run.meddled, f"{where}: the log of {run.key} has a gap for no reason"
        assert expected.startswith(got), f"{where}: {got!r} is no part of {expected!r}"
    else:
        assert got == expected, f"{where}: the log of {run.key} is {got!r}, not {expected!r}"


def _judge_objects(world: World, runs: dict[str, types.Run]) -> None:
    for name in ("a", "b"):
        ref = types.ObjectRef(kind="game", name=name)
        made = world.do(world.control.GetObject(cpb.GetObjectRequest(ref=ref), timeout=TIMEOUT_S), 0)
        wrote = [
            asked.run_id
            for asked in world.submitted
            if asked.object_name == name
            and asked.pipeline.writes
            and json.loads(runs[asked.run_id].writeback_json or b"{}")
        ]
        for asked in world.submitted:
            run = runs[asked.run_id]
            if asked.object_name == name and asked.pipeline.writes and run.state == types.RUN_STATE_SUCCEEDED:
                assert json.loads(run.writeback_json) == {asked.pipeline.writes: run.run_id}, (
                    f"{run.run_id} wrote nothing"
                )
        assert made.status_version == len(wrote), f"{name}: {made.status_version} write-backs of {len(wrote)} runs"
        if wrote:
            assert json.loads(made.status_json)["last"] == max(wrote, key=lambda run_id: runs[run_id].sequence), name


def _judge_node(world: World) -> None:
    left = [info.name for info in world.engine.step_containers()]
    assert not left, f"step containers are left over: {left}"
    pauses = [info.name for info in world.engine.all_containers() if info.labels.get(LABEL_KIND) == "pause"]
    assert len(pauses) <= 1, f"pause containers are left over: {pauses}"
    game = next(info for info in world.engine.all_containers() if info.id == world.game)
    assert game.state == "running", f"the game is {game.state}"
    agent = world.folder / "agent"
    for table in ("outbox", "logs", "network_leases"):
        assert _count(agent / "journal.db", table) == 0, f"the journal still has {_rows(agent / 'journal.db', table)}"
    for folder in ("attempts", "spool", "volumes/run"):
        entries = [path.name for path in (agent / folder).glob("*")]
        assert not entries, f"{folder} has left-overs: {entries}"


def _count(file: Path, table: str, where: str = "1", *values: Any) -> int:
    db = sqlite3.connect(file)
    try:
        return int(db.execute(f"SELECT count(*) FROM {table} WHERE {where}", values).fetchone()[0])
    finally:
        db.close()


def _rows(file: Path, table: str) -> list[Any]:
    db = sqlite3.connect(file)
    try:
        return db.execute(f"SELECT * FROM {table} LIMIT 5").fetchall()
    finally:
        db.close()
