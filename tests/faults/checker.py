"""The one checker of all fault tests: reads server, agent, engine and disk, compares them, and tells every difference.

`check(rig)` waits until nothing is under way any more, collects `Facts`, and fails with what `compare` finds:

- every run that a caller was told of exists, once, and is terminal, as are its steps, with one end told;
- one container per attempt was ever started, by the engine's events and by the mark that each step leaves;
- every byte of every step's log is there once, in order, without a gap;
- agent and server hold the same; nothing waits in outbox or spool;
- no container, directory, volume, lease or identity of a finished run is left over.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import zstandard

from agent_core.replacing import base_of
from outrider.v1 import control_service_pb2 as cs
from outrider.v1 import types_pb2 as types

if TYPE_CHECKING:
    from tests.faults.rig import Expected, Rig

OVER = {
    types.STEP_STATE_SUCCEEDED,
    types.STEP_STATE_FAILED,
    types.STEP_STATE_SKIPPED,
    types.STEP_STATE_CANCELLED,
    types.STEP_STATE_UNKNOWN,
}
RUN_OVER = {
    types.RUN_STATE_SUCCEEDED,
    types.RUN_STATE_FAILED,
    types.RUN_STATE_CANCELLED,
    types.RUN_STATE_UNKNOWN,
}
_STREAMS = {types.LOG_STREAM_STDOUT: "stdout", types.LOG_STREAM_STDERR: "stderr"}
LogOf = tuple[str, str, int, str]  # run, step, attempt, stream


@dataclass
class Log:
    """One stream of one attempt as the server gives it out."""

    data: bytes = b""
    gaps: list[tuple[int, int]] = field(default_factory=list)  # offset, bytes missing (-1: not known how many)
    wrong: list[str] = field(default_factory=list)  # chunks that do not follow on one another


@dataclass
class Facts:
    """What was found, wherever it came from; a soak or a model may fill it by other means."""

    accepted: Mapping[str, Mapping[str, Expected]]  # run -> step -> what it writes
    runs: Mapping[str, types.Run] = field(default_factory=dict)  # the server's
    finished_events: Counter[str] = field(default_factory=Counter)  # run.finished, by run
    logs: Mapping[LogOf, Log] = field(default_factory=dict)
    starts: Mapping[str, list[str]] = field(default_factory=dict)  # container name -> ids, one for each start
    marks: Mapping[tuple[str, str], list[int]] = field(default_factory=dict)  # (run, step) -> attempts that ran
    containers: list[tuple[str, str, str]] = field(default_factory=list)  # name, kind, state
    held: Mapping[str, int] = field(default_factory=dict)  # runs in the agent's journal, and their state
    rows: Mapping[str, int] = field(default_factory=dict)  # what is left in tables that should be empty
    leftovers: list[str] = field(default_factory=list)  # paths
    warm: int = 1  # pause containers that may wait
    managed: Collection[str] = ()  # names of the managed containers that should be there
    restarted: Collection[str] = ()  # names of managed containers that somebody had restarted, each of them once


def compare(facts: Facts, *, gaps: bool = False, logs: bool = True) -> list[str]:
    """Every difference, as a sentence. ``gaps``: whether a log may miss something, if it says so; ``logs``: whether
    logs are compared at all."""
    found = [*_runs(facts), *_attempts(facts), *_leftovers(facts)]
    for run in facts.runs.values() if logs else ():
        for step in run.steps:
            for attempt in range(1, step.attempt + 1):
                found += _log(facts, run.run_id, step, attempt, gaps)
    return found


def _runs(facts: Facts) -> list[str]:
    found = []
    for run_id in facts.accepted:
        run = facts.runs.get(run_id)
        if run is None:
            found.append(f"run {run_id} was accepted and is lost: the server does not know it")
            continue
        if run.state not in RUN_OVER:
            found.append(f"run {run_id} is not over: {types.RunState.Name(run.state)} {run.reason}")
            continue
        ends = facts.finished_events[run_id]
        if ends != 1:
            found.append(f"the end of run {run_id} was told {ends} times")
        for step in run.steps:
            if step.state not in OVER:
                state = types.StepState.Name(step.state)
                found.append(f"run {run_id} is over and its step {step.name} is not: {state}")
        states = {step.state for step in run.steps}
        if run.state == types.RUN_STATE_SUCCEEDED and states - {types.STEP_STATE_SUCCEEDED, types.STEP_STATE_SKIPPED}:
            found.append(f"run {run_id} succeeded though its steps did not: {_names(states)}")
    for run_id, run in facts.runs.items():
        if run_id not in facts.accepted:
            found.append(f"run {run_id} exists and nobody was told of it ({run.pipeline}, key {run.key!r})")
    for run_id, held in facts.held.items():
        if held not in RUN_OVER:
            found.append(f"the agent still holds run {run_id} as {types.RunState.Name(held)}")  # type: ignore[arg-type]
    return found


def _attempts(facts: Facts) -> list[str]:
    found = []
    for name, ids in facts.starts.items():
        if name in facts.restarted:
            wrong = [times for times in Counter(ids).values() if times != 2]
            found += [f"{name} was restarted once and started {times} times" for times in wrong]
        elif len(ids) != 1:
            found.append(f"{name} was started {len(ids)} times")
    for (run_id, step), attempts in facts.marks.items():
        twice = sorted(attempt for attempt, times in Counter(attempts).items() if times != 1)
        if twice:
            found.append(f"step {step} of run {run_id} was carried out more than once in attempt {twice}")
    for run_id, expected in facts.accepted.items():
        run = facts.runs.get(run_id)
        for status in run.steps if run is not None else ():
            prefix = f"outrider-{run_id}-{status.name}-"
            started = {int(name.removeprefix(prefix)) for name in facts.starts if name.startswith(prefix)}
            where = f"step {status.name} of run {run_id}"
            if beyond := sorted(number for number in started if number > status.attempt):
                found.append(f"attempt {beyond} of {where} ran, and the server knows of {status.attempt}")
            if status.state != types.STEP_STATE_SUCCEEDED or status.from_run:
                continue  # what was taken over from the run that this one repeats ran there
            if status.attempt not in started:
                found.append(f"{where} succeeded, and its container was never started")
            if status.name in expected and status.attempt not in facts.marks.get((run_id, status.name), []):
                found.append(f"{where} succeeded, and left no mark")
    return found


def _log(facts: Facts, run_id: str, step: types.StepStatus, attempt: int, gaps: bool) -> list[str]:
    found = []
    expected = facts.accepted.get(run_id, {}).get(step.name)
    for stream in ("stdout", "stderr"):
        log = facts.logs.get((run_id, step.name, attempt, stream), Log())
        where = f"the {stream} of {run_id} {step.name} attempt {attempt}"
        found += [f"{where}: {problem}" for problem in log.wrong]
        if log.gaps and not gaps:
            found.append(f"{where} has a gap: {log.gaps}")
        if log.gaps or attempt != step.attempt:
            continue  # what an attempt that was cut short has written is its own affair
        told = step.stdout_bytes if stream == "stdout" else step.stderr_bytes
        if step.state in OVER and told != len(log.data):
            found.append(f"{where} has {len(log.data)} bytes, and the step says {told}")
        if expected is not None and step.state == types.STEP_STATE_SUCCEEDED:
            wanted = expected.stdout if stream == "stdout" else expected.stderr
            if log.data != wanted:
                found.append(f"{where} is not what it wrote: {_first_difference(log.data, wanted)}")
    return found


def _leftovers(facts: Facts) -> list[str]:
    found = [f"left on the disk: {path}" for path in facts.leftovers]
    found += [f"{count} rows are left in {table}" for table, count in facts.rows.items() if count]
    pauses = 0
    managed = set(facts.managed)
    for name, kind, state in facts.containers:
        if kind == "pause":
            pauses += 1
        elif kind == "managed" and name in managed:
            managed.discard(name)
            if state != "running":
                found.append(f"the managed container {name} is {state}")
        else:
            found.append(f"left in the engine: {name} ({kind}, {state})")
    found += [f"the managed container {name} is gone" for name in managed]
    if pauses > facts.warm:
        found.append(f"{pauses} pause containers are there, {facts.warm} may wait")
    return found


def _first_difference(data: bytes, wanted: bytes) -> str:
    at = next((i for i, (a, b) in enumerate(zip(data, wanted, strict=False)) if a != b), min(len(data), len(wanted)))
    context = slice(max(0, at - 20), at + 40)
    return f"at byte {at} of {len(data)} (expected {len(wanted)}) {data[context]!r} instead of {wanted[context]!r}"


def _names(states: Collection[int]) -> str:
    return ", ".join(sorted(types.StepState.Name(state) for state in states))  # type: ignore[arg-type]


# -- collecting from a rig


def check(
    rig: Rig,
    *,
    gaps: bool = False,
    logs: bool = True,
    managed: Collection[str] = (),
    restarted: Collection[str] = (),
    replaced: Collection[str] = (),
    within_s: float = 40.0,
) -> None:
    """Fail with every difference that is left once all has had time to settle.

    ``replaced``: names of managed containers that gave way to one another, and are started as often as that takes.
    """
    deadline = time.monotonic() + within_s
    while True:
        problems = compare(collect(rig, managed=managed, restarted=restarted, replaced=replaced), gaps=gaps, logs=logs)
        # What settles by itself is given its time; what never does is told at the end of it.
        if not problems or time.monotonic() > deadline:
            break
        time.sleep(0.3)
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise AssertionError(f"after {rig.kills} kills, {len(rig.accepted)} runs:\n{listed}\n{rig.output()}")


def collect(
    rig: Rig, *, managed: Collection[str] = (), restarted: Collection[str] = (), replaced: Collection[str] = ()
) -> Facts:
    """Everything, as it is now."""
    runs = {}
    listed = rig.operator.call("ListRuns", cs.ListRunsRequest(node_id=rig.node_id, limit=1000)).runs
    # A list has the newest only; those that a caller was told of are asked for one by one.
    for run_id in dict.fromkeys([*(each.run_id for each in listed), *rig.accepted]):
        try:
            runs[run_id] = rig.run(run_id)
        except grpc.RpcError as error:
            if not (isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.NOT_FOUND):
                raise
    logs: dict[LogOf, Log] = {}
    for run_id in runs:
        logs |= read_logs(rig, run_id)
    containers = []
    template = '{{.Names}}\t{{.Label "outrider.kind"}}\t{{.State}}'
    for line in rig.docker(
        "ps", "-a", "--filter", f"label=outrider.node={rig.node_id}", "--format", template
    ).splitlines():
        name, kind, state = line.split("\t")
        containers.append((name, kind, state))
    held, rows = _journal(rig.journal)
    step_starts = {name: ids for name, ids in rig.record.of("start").items() if not name.startswith("outrider-pause-")}
    return Facts(
        accepted=rig.accepted,
        runs=runs,
        finished_events=_finished(rig),
        logs=logs,
        starts={name: ids for name, ids in step_starts.items() if base_of(name) not in {*managed, *replaced}},
        marks=_marks(rig),
        containers=containers,
        held=held,
        rows=rows,
        leftovers=_on_disk(rig, runs),
        managed=managed,
        restarted=restarted,
    )


def read_logs(rig: Rig, run_id: str) -> dict[LogOf, Log]:
    """All logs of a run as the server gives them out, put together by offset."""
    logs: dict[LogOf, Log] = {}
    for chunk in rig.operator.stream("StreamRunLogs", cs.StreamRunLogsRequest(run_id=run_id)):
        log = logs.setdefault((run_id, chunk.step, chunk.attempt, _STREAMS[chunk.stream]), Log())
        if chunk.gap_bytes:
            log.gaps.append((chunk.offset, chunk.gap_bytes))
            continue
        data = zstandard.ZstdDecompressor().stream_reader(chunk.data).read() if chunk.zstd else chunk.data
        if chunk.offset != len(log.data) and not log.gaps:
            log.wrong.append(f"a chunk for byte {chunk.offset} comes after {len(log.data)} bytes")
        log.data += data
    return logs


def _finished(rig: Rig) -> Counter[str]:
    # From the store: the stream of events never ends, and its cost would be a wait.
    with _open(rig.store) as db:
        rows = db.execute("SELECT subject, count(*) FROM events WHERE type = 'run.finished' GROUP BY subject")
        return Counter({str(subject): int(count) for subject, count in rows})


def _journal(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    with _open(path) as db:
        held = {str(run_id): int(state) for run_id, state in db.execute("SELECT run_id, state FROM runs")}
        rows = {
            "outbox": "SELECT count(*) FROM outbox",
            "logs": "SELECT count(*) FROM logs",
            "volumes (of runs)": "SELECT count(*) FROM volumes WHERE scope = 'run' AND keep = 0",
            "network_leases": "SELECT count(*) FROM network_leases",
            "identities (of runs)": "SELECT count(*) FROM identities WHERE owner LIKE 'run:%'",
            "managed (starting)": "SELECT count(*) FROM managed WHERE state = 'starting'",
        }
        return held, {table: int(db.execute(sql).fetchone()[0]) for table, sql in rows.items()}


def _marks(rig: Rig) -> dict[tuple[str, str], list[int]]:
    found: dict[tuple[str, str], list[int]] = {}
    if rig.marks.is_dir():
        for path in rig.marks.glob("ran-*"):
            _, run_id, step = path.name.split("-", 2)
            found[run_id, step] = [int(line) for line in path.read_text().split()]
    return found


def _on_disk(rig: Rig, runs: Mapping[str, types.Run]) -> list[str]:
    found = []
    for folder in ("attempts", "spool", "volumes/run", "volumes/.trash"):
        path = rig.state_dir / folder
        with contextlib.suppress(FileNotFoundError):
            found += [str(each.relative_to(rig.state_dir)) for each in path.iterdir()]
    over = {run_id for run_id, run in runs.items() if run.state in RUN_OVER}
    return [path for path in found if not path.startswith("volumes/run/") or Path(path).name in over]


@contextlib.contextmanager
def _open(path: Path) -> Any:
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)
    try:
        yield connection
    finally:
        connection.close()
