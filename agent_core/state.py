"""What the agent's journal holds of runs: acceptance, plans, intents, results, cancellations.

Each method hands one transaction to the journal and returns when it is on the disk. A change and the
outbox row that reports it belong to the same transaction: what happened is reported, or did not happen.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from google.protobuf.message import DecodeError

from agent_core import outbox, rowsums, spool
from agent_core.journal import Journal
from agent_core.steady import SteadyClock
from agent_core.transitions import Transition
from outrider.errors import OutriderError
from outrider.reports import TERMINAL
from outrider.v1 import node_service_pb2 as pb
from outrider.v1 import types_pb2 as types
from outrider.wire import failure_of, seconds

MIGRATION = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;

CREATE TABLE commands (
    command_id TEXT PRIMARY KEY,
    digest BLOB NOT NULL,
    received_at REAL NOT NULL,
    result BLOB                      -- CommandResult; NULL: not answered yet
) STRICT;

CREATE TABLE runs (
    run_id TEXT PRIMARY KEY,
    lease_id TEXT NOT NULL,
    command BLOB NOT NULL,           -- RunPipeline as it came
    state INTEGER NOT NULL,          -- outrider.v1.RunState
    failure BLOB,                    -- outrider.v1.Failure
    cancel TEXT,                     -- JSON {"reason", "grace_s"}; NULL: not asked for
    accepted_at REAL NOT NULL,
    started_at REAL,
    finished_at REAL,
    boot_id TEXT NOT NULL,           -- of the machine, when it was accepted
    boot_clock REAL NOT NULL         -- CLOCK_BOOTTIME then, in seconds; see EXITS_AND_TIME
) STRICT;
CREATE INDEX runs_state ON runs (state);

CREATE TABLE steps (
    run_id TEXT NOT NULL REFERENCES runs ON DELETE CASCADE,
    name TEXT NOT NULL,
    position INTEGER NOT NULL,
    status BLOB NOT NULL,            -- outrider.v1.StepStatus
    plan TEXT,                       -- the step plan, resolved once; JSON
    params TEXT,                     -- the validated parameters; JSON
    PRIMARY KEY (run_id, name)
) STRICT;

CREATE TABLE attempts (
    run_id TEXT NOT NULL REFERENCES runs ON DELETE CASCADE,
    step TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    container TEXT NOT NULL,         -- the derived name
    phase TEXT NOT NULL,             -- see Phase
    boot_id TEXT NOT NULL,
    boot_clock REAL NOT NULL,        -- CLOCK_BOOTTIME of the intent: the step's timeout counts from here; see below
    engine_boot TEXT NOT NULL,       -- of the engine that it was made with
    PRIMARY KEY (run_id, step, attempt)
) STRICT;
"""


EXITS_AND_TIME = """
ALTER TABLE attempts ADD COLUMN exit_code INTEGER;                 -- phase exited: how the container ended
ALTER TABLE attempts ADD COLUMN oom_killed INTEGER NOT NULL DEFAULT 0;
ALTER TABLE attempts ADD COLUMN spent_s REAL NOT NULL DEFAULT 0;   -- of its time, before boot_clock
ALTER TABLE runs ADD COLUMN spent_s REAL NOT NULL DEFAULT 0;
"""

RESTARTED = """
ALTER TABLE commands ADD COLUMN former TEXT; -- of a restart: since when the container ran before it; NULL: not begun
"""

READY = """
ALTER TABLE steps ADD COLUMN ready_boot_id TEXT;                     -- boot_id and clock since when it has waited for
ALTER TABLE steps ADD COLUMN ready_clock REAL NOT NULL DEFAULT 0;    -- its envs; NULL: it does not
ALTER TABLE steps ADD COLUMN ready_spent_s REAL NOT NULL DEFAULT 0;  -- of that wait, before ready_clock
"""

MASKED = """
ALTER TABLE attempts ADD COLUMN masked INTEGER NOT NULL DEFAULT 1; -- its log is masked with the secrets of its run
"""

SUMS = """
ALTER TABLE runs ADD COLUMN row_sum BLOB;                          -- see agent_core.rowsums
ALTER TABLE steps ADD COLUMN row_sum BLOB;
ALTER TABLE attempts ADD COLUMN row_sum BLOB;
"""


def migrations() -> list[str]:
    """All scripts of the agent's journal, in the order in which they came; never edited, only added to."""
    from agent_core import execs, identities, managed_rows, netpool, ports, volumes

    return [
        MIGRATION,
        outbox.MIGRATION,
        spool.MIGRATION,
        identities.MIGRATION,
        ports.MIGRATION,
        volumes.MIGRATION,
        netpool.MIGRATION,
        managed_rows.MIGRATION,
        EXITS_AND_TIME,
        MASKED,
        ports.RELEASING,
        managed_rows.SUPERVISION,
        execs.MIGRATION,
        managed_rows.LOG_SEEN,
        SUMS,
        outbox.IDENTITY,
        RESTARTED,
        READY,
    ]


TERMINAL_STEPS = frozenset(
    {
        types.STEP_STATE_SUCCEEDED,
        types.STEP_STATE_FAILED,
        types.STEP_STATE_SKIPPED,
        types.STEP_STATE_CANCELLED,
        types.STEP_STATE_UNKNOWN,
    }
)

Phase = Literal["intended", "created", "started", "exited", "done"]
"""How far an attempt came. ``created`` is on the disk before the container is started: one that is gone when it says
``intended`` never ran, one that is gone later was removed by somebody."""
Change = Callable[[sqlite3.Connection], object]


@dataclass(frozen=True, slots=True)
class Clock:
    """Monotonic time that says which boot of the machine it belongs to."""

    boot_id: str

    @classmethod
    def of_this_boot(cls) -> Clock:
        try:
            return cls(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        except OSError:
            return cls("unknown")

    def now(self) -> float:
        """Seconds since the boot, time asleep included."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def since(self, boot_id: str, boot_clock: float) -> float:
        """Seconds since that moment; 0 if it lies before this boot, because then nobody can tell."""
        return max(0.0, self.now() - boot_clock) if boot_id == self.boot_id else 0.0


@dataclass(frozen=True, slots=True)
class Cancellation:
    reason: str
    grace_s: float

    @classmethod
    def of(cls, cancel: pb.CancelRun, *, default_grace_s: float) -> Cancellation:
        """As the server sent it."""
        return cls(cancel.reason, seconds(cancel.grace) if cancel.HasField("grace") else default_grace_s)


@dataclass(frozen=True, slots=True)
class CommandRecord:
    """A command that was received; ``result``: what came of it, None while that is not known; ``former``: of a
    restart, since when the container had run before, None where it was not begun."""

    digest: bytes
    result: pb.CommandResult | None
    former: str | None


@dataclass(frozen=True, slots=True)
class StepRecord:
    status: types.StepStatus
    plan: dict[str, Any] | None
    params: dict[str, Any] | None
    ready_boot_id: str | None = None
    ready_clock: float = 0.0
    ready_spent_s: float = 0.0


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    attempt: int
    container: str
    phase: Phase
    boot_id: str
    boot_clock: float
    engine_boot: str
    exit_code: int | None = None
    oom_killed: bool = False
    spent_s: float = 0.0
    masked: bool = True


@dataclass(frozen=True, slots=True)
class RunRecord:
    command: pb.RunPipeline
    state: types.RunState.ValueType
    cancel: Cancellation | None
    started_at: float | None
    boot_id: str
    boot_clock: float
    steps: dict[str, StepRecord]
    attempts: dict[str, AttemptRecord]  # the last one of each step
    spent_s: float = 0.0


_ALL_TOLD = (
    f"state IN ({','.join(str(each) for each in sorted(TERMINAL))})"  # noqa: S608 - our own numbers
    " AND NOT EXISTS (SELECT 1 FROM outbox WHERE outbox.run_id = runs.run_id)"
    " AND NOT EXISTS (SELECT 1 FROM logs WHERE logs.run_id = runs.run_id)"
)
"""Of a run's row: it is over, and the server has acknowledged its reports and logs."""


_UNREADABLE = (DecodeError, ValueError, TypeError, KeyError)


def damaged_record(error: Exception) -> OutriderError:
    """What is told of a run whose record is damaged."""
    return OutriderError(f"the record of this run on its node can't be read: {error}", code="journal_damaged")


def _held(row: sqlite3.Row) -> types.HeldRun:
    return types.HeldRun(run_id=row["run_id"], lease_id=row["lease_id"], state=row["state"])


class State:
    """The repository of runs. Reads are for start-up and reports; the engine keeps what it works on in memory."""

    def __init__(self, journal: Journal, clock: Clock | None = None) -> None:
        self.journal = journal
        self.clock = clock or Clock.of_this_boot()
        self.steady = SteadyClock(journal, self.clock)

    async def commit(self, transition: Transition, *changes: Change) -> None:
        """Apply all changes in one transaction; returns when it is on the disk."""

        def work(db: sqlite3.Connection) -> None:
            for change in changes:
                change(db)

        await self.journal.write(transition, work)

    def submit(self, transition: Transition, change: Change) -> Future[None]:
        """Like `commit` of one change, not waiting: what is committed later is on the disk no earlier than this."""

        def work(db: sqlite3.Connection) -> None:
            change(db)

        return self.journal.submit(transition, work)

    async def get_meta(self, key: str) -> str | None:
        rows = await self.journal.query("SELECT value FROM meta WHERE key = ?", (key,))
        return str(rows[0]["value"]) if rows else None

    async def set_meta(self, transition: Transition, key: str, value: str) -> None:
        await self.commit(transition, self.meta(key, value))

    def held(self) -> list[types.HeldRun]:
        """The runs that are not terminal, and those of which the server has not acknowledged everything."""
        rows = self.journal.query_now(
            f"SELECT run_id, lease_id, state FROM runs WHERE NOT ({_ALL_TOLD}) ORDER BY accepted_at"  # noqa: S608
        )
        return [types.HeldRun(run_id=row["run_id"], lease_id=row["lease_id"], state=row["state"]) for row in rows]

    def unfinished(self) -> tuple[list[RunRecord], list[tuple[types.HeldRun, Exception]]]:
        """The runs to go on with after a restart, in the order in which they were accepted, and those whose record
        can't be read or relied on any more: also one that says the run is over."""
        marks = ",".join("?" * len(TERMINAL))
        sql = f"SELECT * FROM runs WHERE state NOT IN ({marks}) ORDER BY accepted_at"  # noqa: S608 - question marks
        records: list[RunRecord] = []
        unreadable: list[tuple[types.HeldRun, Exception]] = []
        for row in self.journal.query_now(sql, tuple(TERMINAL)):
            try:
                records.append(self._record(row))
            except _UNREADABLE as error:
                unreadable.append((_held(row), error))
        over = self.journal.query_now(f"SELECT run_id FROM runs WHERE state IN ({marks})", tuple(TERMINAL))  # noqa: S608
        for each in over:  # one by one: what they hold is not needed
            row = self.journal.query_now("SELECT * FROM runs WHERE run_id = ?", (each["run_id"],))[0]
            try:
                rowsums.check(row)
            except ValueError as error:
                unreadable.append((_held(row), error))
        return records, unreadable

    def find(self, run_id: str) -> RunRecord | None:
        """Raises ValueError and its like if the record can't be read."""
        rows = self.journal.query_now("SELECT * FROM runs WHERE run_id = ?", (run_id,))
        return self._record(rows[0]) if rows else None

    def lease_of(self, run_id: str) -> str | None:
        """Under which the run is held; None if it is not known."""
        rows = self.journal.query_now("SELECT lease_id FROM runs WHERE run_id = ?", (run_id,))
        return str(rows[0]["lease_id"]) if rows else None

    def _rows(self, table: Literal["steps", "attempts"], run_id: str, order: str) -> Iterator[sqlite3.Row]:
        sql = f"SELECT * FROM {table} WHERE run_id = ? ORDER BY {order}"  # noqa: S608 - our own names
        for row in self.journal.query_now(sql, (run_id,)):
            rowsums.check(row)
            yield row

    def _record(self, row: sqlite3.Row) -> RunRecord:
        run_id = row["run_id"]
        rowsums.check(row)
        command = pb.RunPipeline.FromString(row["command"])
        if command.pipeline_sha256 and hashlib.sha256(command.pipeline_yaml).digest() != command.pipeline_sha256:
            raise ValueError("its pipeline is damaged: its checksum is another")
        steps = {
            each["name"]: StepRecord(
                types.StepStatus.FromString(each["status"]),
                json.loads(each["plan"]) if each["plan"] else None,
                json.loads(each["params"]) if each["params"] else None,
                each["ready_boot_id"],
                each["ready_clock"],
                each["ready_spent_s"],
            )
            for each in self._rows("steps", run_id, "position")
        }
        attempts = {
            each["step"]: AttemptRecord(
                each["attempt"],
                each["container"],
                each["phase"],
                each["boot_id"],
                each["boot_clock"],
                each["engine_boot"],
                each["exit_code"],
                bool(each["oom_killed"]),
                each["spent_s"],
                bool(each["masked"]),
            )
            for each in self._rows("attempts", run_id, "attempt")
        }
        cancel = json.loads(row["cancel"]) if row["cancel"] else None
        return RunRecord(
            command=command,
            state=row["state"],
            cancel=Cancellation(cancel["reason"], cancel["grace_s"]) if cancel else None,
            started_at=row["started_at"],
            boot_id=row["boot_id"],
            boot_clock=row["boot_clock"],
            steps=steps,
            attempts=attempts,
            spent_s=row["spent_s"],
        )

    # Changes, to be handed to `commit`.

    def accept_run(self, command: pb.RunPipeline, steps: Sequence[types.StepStatus]) -> Change:
        """A run is taken on: from here it is never lost."""
        blob, now, boot_clock = command.SerializeToString(), self.steady.now(), self.clock.now()
        rows = [(command.run_id, each.name, i, each.SerializeToString()) for i, each in enumerate(steps)]

        def change(db: sqlite3.Connection) -> None:
            db.execute(
                "INSERT OR IGNORE INTO runs (run_id, lease_id, command, state, accepted_at, boot_id, boot_clock)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    command.run_id,
                    command.lease_id,
                    blob,
                    types.RUN_STATE_DISPATCHED,
                    now,
                    self.clock.boot_id,
                    boot_clock,
                ),
            )
            db.executemany("INSERT OR IGNORE INTO steps (run_id, name, position, status) VALUES (?, ?, ?, ?)", rows)

        return change

    def run_state(
        self,
        run_id: str,
        state: int,
        *,
        failure: types.Failure | None = None,
        started_at: float | None = None,
        finished_at: float | None = None,
    ) -> Change:
        blob = failure.SerializeToString() if failure is not None else None
        return lambda db: db.execute(
            "UPDATE runs SET state = ?, failure = coalesce(?, failure), started_at = coalesce(?, started_at),"
            " finished_at = coalesce(?, finished_at) WHERE run_id = ?",
            (state, blob, started_at, finished_at, run_id),
        )

    def give_up(self, run_id: str, failure: types.Failure) -> list[Change]:
        """The run is unknown, whatever its row said: from now on that is what it says."""
        sql = "UPDATE runs SET row_sum = NULL WHERE run_id = ?"
        end = self.run_state(run_id, types.RUN_STATE_UNKNOWN, failure=failure, finished_at=time.time())
        return [lambda db: db.execute(sql, (run_id,)), end]

    def step_status(self, run_id: str, status: types.StepStatus) -> Change:
        blob, name = status.SerializeToString(), status.name
        return lambda db: db.execute("UPDATE steps SET status = ? WHERE run_id = ? AND name = ?", (blob, run_id, name))

    def step_ready(self, run_id: str, step: str, since: float) -> Change:
        """The step has waited for its envs ``since`` then, by the clock of this boot, unless it has for longer."""
        row = (self.clock.boot_id, since, run_id, step)
        sql = (
            "UPDATE steps SET ready_boot_id = ?, ready_clock = ?, ready_spent_s = 0"
            " WHERE run_id = ? AND name = ? AND ready_boot_id IS NULL"
        )
        return lambda db: db.execute(sql, row)

    def step_plan(self, run_id: str, step: str, plan_json: str, params_json: str) -> Change:
        """The plan that this step has from now on, also for retries and after a restart."""
        return lambda db: db.execute(
            "UPDATE steps SET plan = ?, params = ? WHERE run_id = ? AND name = ? AND plan IS NULL",
            (plan_json, params_json, run_id, step),
        )

    def attempt_intent(
        self, run_id: str, step: str, attempt: int, container: str, engine_boot: str, *, masked: bool = True
    ) -> Change:
        """The container with this name is about to be made; ``masked``: the secrets of its run are known."""
        clock = self.clock
        row = (run_id, step, attempt, container, "intended", clock.boot_id, clock.now(), engine_boot, int(masked))
        sql = (
            "INSERT OR IGNORE INTO attempts"
            " (run_id, step, attempt, container, phase, boot_id, boot_clock, engine_boot, masked)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
        )
        has_its_envs = "UPDATE steps SET ready_boot_id = NULL WHERE run_id = ? AND name = ?"

        def change(db: sqlite3.Connection) -> None:
            db.execute(sql, row)
            db.execute(has_its_envs, (run_id, step))

        return change

    def attempt_phase(self, run_id: str, step: str, attempt: int, phase: Phase) -> Change:
        return lambda db: db.execute(
            "UPDATE attempts SET phase = ? WHERE run_id = ? AND step = ? AND attempt = ?",
            (phase, run_id, step, attempt),
        )

    def attempt_exited(self, run_id: str, step: str, attempt: int, exit_code: int, oom_killed: bool) -> Change:
        """How its container ended: it counts, whatever becomes of the container."""
        row = (exit_code, int(oom_killed), run_id, step, attempt)
        return lambda db: db.execute(
            "UPDATE attempts SET phase = 'exited', exit_code = ?, oom_killed = ?"
            " WHERE run_id = ? AND step = ? AND attempt = ?",
            row,
        )

    async def note_time(self) -> None:
        """Write down how much of their time the runs and attempts that are not over have used.

        The clock begins anew with each boot of the machine: what is written down is what outlives one.
        """
        boot_id, now = self.clock.boot_id, self.clock.now()
        spent = "spent_s = spent_s + CASE WHEN boot_id = ? THEN max(0, ? - boot_clock) ELSE 0 END"
        row = (boot_id, now, boot_id, now)
        marks = ",".join(str(each) for each in sorted(TERMINAL))
        note = self.steady.note()

        def work(db: sqlite3.Connection) -> None:
            note(db)
            db.execute(
                f"UPDATE runs SET {spent}, boot_id = ?, boot_clock = ? WHERE state NOT IN ({marks})",  # noqa: S608
                row,
            )
            db.execute(f"UPDATE attempts SET {spent}, boot_id = ?, boot_clock = ? WHERE phase != 'done'", row)  # noqa: S608
            db.execute(
                "UPDATE steps SET ready_spent_s = ready_spent_s"
                " + CASE WHEN ready_boot_id = ? THEN max(0, ? - ready_clock) ELSE 0 END,"
                " ready_boot_id = ?, ready_clock = ? WHERE ready_boot_id IS NOT NULL",
                row,
            )

        await self.journal.write(Transition.TIME_SPENT, work)

    def attempt_found(self, run_id: str, step: str, attempt: AttemptRecord) -> Change:
        """An attempt that a former journal knew; its time begins anew."""
        row = (
            run_id, step, attempt.attempt, attempt.container, attempt.phase, self.clock.boot_id, self.clock.now(),
            attempt.engine_boot,
        )  # fmt: skip
        sql = (
            "INSERT OR IGNORE INTO attempts (run_id, step, attempt, container, phase, boot_id, boot_clock, engine_boot)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
        )
        return lambda db: db.execute(sql, row)

    def meta(self, key: str, value: str) -> Change:
        """A single value; see `get_meta`."""
        return lambda db: db.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, value))

    def cancel_run(self, run_id: str, cancel: Cancellation) -> Change:
        text = json.dumps({"reason": cancel.reason, "grace_s": cancel.grace_s})
        return lambda db: db.execute("UPDATE runs SET cancel = ? WHERE run_id = ? AND cancel IS NULL", (text, run_id))

    def command_received(self, command_id: str, digest: bytes) -> Change:
        now = self.steady.now()
        return lambda db: db.execute(
            "INSERT OR IGNORE INTO commands (command_id, digest, received_at) VALUES (?, ?, ?)",
            (command_id, digest, now),
        )

    def restart_intended(self, command_id: str, former: str) -> Change:
        """A container that has run since ``former`` is about to be restarted."""
        return lambda db: db.execute("UPDATE commands SET former = ? WHERE command_id = ?", (former, command_id))

    def command_answered(self, result: pb.CommandResult) -> Change:
        blob = result.SerializeToString()
        return lambda db: db.execute("UPDATE commands SET result = ? WHERE command_id = ?", (blob, result.command_id))

    async def command(self, command_id: str) -> CommandRecord | None:
        """A command that was received before."""
        rows = await self.journal.query("SELECT * FROM commands WHERE command_id = ?", (command_id,))
        if not rows:
            return None
        blob = rows[0]["result"]
        return CommandRecord(
            digest=bytes(rows[0]["digest"]),
            result=pb.CommandResult.FromString(blob) if blob is not None else None,
            former=rows[0]["former"],
        )

    def ends(self, run_ids: Iterable[str]) -> list[pb.RunReport]:
        """All that the journal knows of these runs' ends; of those that are not terminal, or of which a report waits
        already, nothing."""
        reports = []
        for run_id in run_ids:
            rows = self.journal.query_now(
                "SELECT * FROM runs WHERE run_id = ?"
                " AND NOT EXISTS (SELECT 1 FROM outbox WHERE outbox.run_id = runs.run_id AND kind = 'run_report')",
                (run_id,),
            )
            if not rows or rows[0]["state"] not in TERMINAL:
                continue
            row = rows[0]
            report = pb.RunReport(run_id=run_id, lease_id=row["lease_id"], state=row["state"])
            try:
                report.steps.extend(each.status for each in self._record(row).steps.values())
            except _UNREADABLE as error:  # what is left of it says nothing: the run's end is as good as unknown
                report.state = types.RUN_STATE_UNKNOWN
                report.failure.CopyFrom(failure_of(damaged_record(error)))
            report.logs_gone = not self.journal.query_now("SELECT 1 FROM logs WHERE run_id = ? LIMIT 1", (run_id,))
            if row["failure"] and not report.HasField("failure"):
                report.failure.ParseFromString(row["failure"])
            for name in ("started_at", "finished_at"):
                if row[name] is not None:
                    getattr(report, name).FromMilliseconds(round(row[name] * 1000))
            reports.append(report)
        return reports

    async def forget(
        self,
        *,
        commands_before: float,
        runs_before: float = math.inf,
        keep_runs: int = 0,
        keep: Collection[str] = (),
    ) -> list[str]:
        """Drop what nobody needs any more; returns the runs dropped. Times are those of ``steady``.

        A run goes when it is terminal, the server has acknowledged all that was reported of it and its logs, it is not
        in ``keep``, and it was accepted before ``runs_before`` or is not among the ``keep_runs`` newest; a command when
        it is so old that it can't come again.
        """

        note = self.steady.note()

        def work(db: sqlite3.Connection) -> list[str]:
            note(db)
            db.execute("DELETE FROM commands WHERE received_at < ?", (commands_before,))
            rows = db.execute(
                f"SELECT run_id FROM runs WHERE {_ALL_TOLD} AND (accepted_at < ?"  # noqa: S608 - our own numbers
                " OR run_id NOT IN (SELECT run_id FROM runs ORDER BY accepted_at DESC LIMIT ?))",
                (runs_before, keep_runs),
            ).fetchall()
            gone = [row["run_id"] for row in rows if row["run_id"] not in keep]
            db.executemany("DELETE FROM runs WHERE run_id = ?", [(run_id,) for run_id in gone])
            return gone

        return await self.journal.write(Transition.FORGOTTEN, work)
