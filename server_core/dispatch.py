"""Dispatch: gets accepted runs and cancellations to their nodes, exactly once in effect, however often sent.

What is to be sent is derived from the store each time, never kept in a queue: whatever was lost between two
processes is found again when the node says what it holds. Commands have ids made from the run's, so a node
that has one already acknowledges it again and does nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Coroutine

import structlog
from sqlalchemy import Connection

from outrider.errors import OutriderError
from outrider.reports import held_digest
from outrider.retry import FOREVER
from outrider.v1 import node_service_pb2, types_pb2
from server_core import reconcile
from server_core.bus.base import EVENTS, Bus, run_topic
from server_core.channel import ControlChannel, command
from server_core.fleet import Fleet
from server_core.logs import trace
from server_core.store import events, logs, runs, turns
from server_core.store.base import Database
from server_core.store.commits import Commit
from server_core.store.runs import RunRow

log = structlog.get_logger(__name__)

LOST_GRACE_S = 10.0
"""How long a run that its node no longer holds may still be told of by the node's outbox."""
REPORT_DUE_S = 10.0
STORE_RETRY_S = 1.0
"""How long after the store could not be written it is tried again."""
PROGRESS_EVERY_S = 0.1

_Ended = tuple[str, types_pb2.ObjectRef | None]

_RUN = "run-"
_CANCEL = "cancel-"


class Dispatcher:
    """Sends what the store says is to be sent, and records what comes back."""

    def __init__(self, db: Database, bus: Bus, fleet: Fleet, *, lost_grace_s: float = LOST_GRACE_S) -> None:
        self._db = db
        self._bus = bus
        self._fleet = fleet
        self._lost_grace_s = lost_grace_s
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._tasks: set[asyncio.Task[None]] = set()
        self._recorded: dict[str, set[reconcile.Difference]] = {}
        """By node: the differences that were told of, for as long as they last."""
        self._agreed: dict[str, tuple[bytes, bytes]] = {}
        """By node: the digests of both sides when they were last compared."""
        self._doubted: dict[str, tuple[bytes, bytes]] = {}
        self._missing: dict[str, float] = {}
        """Runs that their node no longer holds, with the monotonic time at which it first said so."""
        self.progress: defaultdict[str, dict[str, types_pb2.Progress]] = defaultdict(dict)
        """The latest progress by run and step; it is shown and never stored."""
        self._progress_due: set[str] = set()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- down ----------------------------------------------------------------------------------------------

    async def kick(self, node_id: str) -> None:
        """Send the node what it should have and was not sent on its present channel."""
        async with self._locks[node_id]:
            channel = self._fleet.channel(node_id)
            if channel is None or not channel.reported:
                return
            try:
                for row in await self._db.read(lambda c: runs.active_on(c, node_id)):
                    await self._send_one(channel, row)
            except OutriderError as error:
                log.info("dispatch was interrupted", node=node_id, error=str(error))
                if channel.open:
                    # It is the store that can't be written, and nothing else would bring this node's turn back. Where
                    # the channel is gone, its successor starts from the store again.
                    self._spawn(self._kick_later(node_id))

    def kick_soon(self, node_id: str) -> None:
        """`kick`, without waiting for it."""
        self._spawn(self.kick(node_id))

    async def _kick_later(self, node_id: str) -> None:
        await asyncio.sleep(STORE_RETRY_S)
        await self.kick(node_id)

    async def _send_one(self, channel: ControlChannel, row: RunRow) -> None:
        if row.state == runs.QUEUED and not (row.cancel_requested and not row.sent):
            reason = await self._db.read(lambda c: turns.waits_for(c, row))
            commit = Commit.RUN_WAITS if reason else Commit.RUN_SENT
            if _RUN + row.run_id not in channel.sent:
                # Written down before it goes out: from here on the node may have it, and a cancel has to reach it.
                turn = await self._db.write(commit, lambda c: turns.claim(c, row.run_id))
                if turn.told:
                    self._bus.publish(run_topic(row.run_id))
                if not turn.send:
                    return
            await self._send(channel, row, _RUN + row.run_id)
        if row.cancel_requested and (row.sent or row.state != runs.QUEUED):
            await self._send(channel, row, _CANCEL + row.run_id)

    async def _send(self, channel: ControlChannel, row: RunRow, command_id: str) -> None:
        if command_id in channel.sent:
            return
        if command_id.startswith(_RUN):
            message = command(command_id, run_pipeline=runs.pipeline_command(row))
            channel.leases[row.run_id] = row.lease_id
        else:
            message = command(command_id, cancel_run=runs.cancel_command(row))
        channel.sent.add(command_id)
        await channel.send(node_service_pb2.ServerMessage(command=message))

    # -- up ------------------------------------------------------------------------------------------------

    async def take_ack(self, channel: ControlChannel, ack: node_service_pb2.CommandAck) -> None:
        """A node acknowledged a run, or refused it."""
        channel.take_ack(ack)
        if not ack.command_id.startswith(_RUN):
            return
        run_id = ack.command_id.removeprefix(_RUN)
        if ack.HasField("refused"):
            # A refusal is of the run as it went down this channel. Of any other it says nothing, and what it is about
            # is sent again where it is still due.
            lease_id = channel.leases.get(run_id)
            if lease_id is not None:
                await self._settle(channel.node_id, run_id, runs.FAILED, ack.refused, lease_id=lease_id)
            return
        channel.acknowledged.add(run_id)
        await self._db.write(Commit.RUN_ACKNOWLEDGED, lambda c: runs.mark_acknowledged(c, run_id, channel.node_id))
        self._bus.publish(run_topic(run_id))

    async def take_report(self, channel: ControlChannel, report: node_service_pb2.RunReport) -> None:
        """Record what a node says of a run, and acknowledge it once it is stored."""
        if report.sequence == 0:
            if not await self._db.read(lambda c: runs.is_carried_out_by(c, channel.node_id, report)):
                return
            for step in report.steps:
                self.progress[report.run_id][step.name] = step.progress
            self._show_progress_soon(report.run_id)
            return
        node_id = channel.node_id

        def record(connection: Connection) -> tuple[runs.Applied, types_pb2.ObjectRef | None]:
            applied = runs.apply_report(connection, node_id, report)
            if applied.refused:
                data = {"reason": applied.refused, "lease_id": report.lease_id}
                events.add(connection, "run.report_refused", report.run_id, node_id=node_id, data=data)
            if applied.foreign:
                return applied, None
            if report.logs_gone:
                logs.mark_lost(connection, report)
            if not applied.finished:
                return applied, None
            return applied, finished(connection, report.run_id)

        applied, ref = await self._db.write(Commit.RUN_REPORT, record)
        await channel.send(
            node_service_pb2.ServerMessage(outbox_ack=node_service_pb2.OutboxAck(sequences=[report.sequence]))
        )
        if applied.refused:
            log.warning("a report was refused", run=report.run_id, node=node_id, reason=applied.refused)
            self._bus.publish(EVENTS)
        if not applied.foreign:
            self._changed(report.run_id, ref, finished=applied.finished)

    async def reconcile(self, channel: ControlChannel, report: types_pb2.FullReport) -> None:
        """Settle each difference between what the node holds and what the store says, then send what is due."""
        node_id = channel.node_id

        def compare(connection: Connection) -> tuple[reconcile.Settlement, list[_Ended]] | None:
            if not channel.open:
                return None  # another channel took its place meanwhile, and with it this report is of the past
            sent = {each.removeprefix(_RUN) for each in channel.sent if each.startswith(_RUN)}
            recorded = self._recorded.get(node_id, set())
            made = reconcile.compare(connection, node_id, report.runs, sent=sent, recorded=recorded)
            return made, [(run_id, finished(connection, run_id)) for run_id in made.cancelled]

        compared = await self._db.write(Commit.RECONCILED, compare)
        if compared is None:
            return
        settlement, ended = compared
        self._recorded[node_id] = settlement.differences
        self._agreed[node_id] = (held_digest(report.runs), settlement.believed)
        channel.reported = True
        for run in report.runs:
            self._missing.pop(run.run_id, None)
            self._bus.publish(run_topic(run.run_id))
        for run_id, ref in ended:
            self._changed(run_id, ref, finished=True)
        self._bus.publish(EVENTS)
        for run_id in settlement.stop:
            await self._stop_straggler(channel, run_id)
        if settlement.retell:
            wish = node_service_pb2.RetellRequest(run_ids=settlement.retell)
            await channel.send(node_service_pb2.ServerMessage(retell_request=wish))
        if settlement.missing:
            self._spawn(self._settle_lost(channel, settlement.missing))
        await self.kick(node_id)

    async def disagrees(self, node_id: str, brief: types_pb2.BriefState) -> bool:
        """Whether node and store believe different things of its runs although nothing is on its way that would
        explain it: then a full report is to be asked for. Differences that are known already don't count."""
        if not brief.state_digest or brief.outbox_depth:
            return False
        pair = (brief.state_digest, await self._db.read(lambda c: reconcile.believed(c, node_id)))
        if pair[0] == pair[1] or pair == self._agreed.get(node_id):
            self._doubted.pop(node_id, None)
            return False
        # At the first sight of it a report or an acknowledgement may just have crossed the heartbeat.
        if self._doubted.get(node_id) == pair:
            return True
        self._doubted[node_id] = pair
        return False

    async def ask_for_report(self, channel: ControlChannel) -> None:
        """Ask an agent that has not said what it holds; nothing is dispatched to it before."""
        while channel.open and not channel.reported:
            await asyncio.sleep(REPORT_DUE_S)
            if channel.open and not channel.reported:
                with contextlib.suppress(OutriderError):
                    await channel.ask_for_report()

    def settled(self, run_id: str, ref: types_pb2.ObjectRef | None) -> None:
        """A run was ended by a decision here: tell who watches it, and whose turn it is."""
        self._changed(run_id, ref, finished=True)

    async def _stop_straggler(self, channel: ControlChannel, run_id: str) -> None:
        row = await self._db.read(lambda c: runs.row_of(c, run_id))
        if row is not None:
            with contextlib.suppress(OutriderError):
                await self._send(channel, row, _CANCEL + run_id)

    async def _settle_lost(self, channel: ControlChannel, missing: list[str]) -> None:
        # Its last report may still be in the outbox, right behind the full report. The grace does not begin anew with
        # every connection: on a link that breaks every few seconds it would never end.
        now = time.monotonic()
        since = max(self._missing.setdefault(run_id, now) for run_id in missing)
        await asyncio.sleep(max(0.0, self._lost_grace_s - (now - since)))
        if not channel.open:
            return
        for run_id in missing:
            if run_id not in self._missing or run_id in channel.acknowledged:
                continue  # acknowledged after the report was drawn up
            del self._missing[run_id]
            failure = types_pb2.Failure(
                error_class=types_pb2.ERROR_CLASS_PERMANENT,
                code="lost_by_node",
                message=f"node {channel.node_id} no longer knows of this run, so what became of it can't be known",
                hint="its state directory was probably replaced; look at its containers",
            )
            # Decided here, and asked for by nobody: while the store can't be written it is tried again.
            settle = functools.partial(self._settle, channel.node_id, run_id, runs.UNKNOWN, failure)
            await FOREVER.run(settle)

    async def _settle(
        self, node_id: str, run_id: str, state: int, failure: types_pb2.Failure, *, lease_id: str | None = None
    ) -> None:
        """End the run by a decision made here; with ``lease_id`` only while it has that lease."""

        def settle(connection: Connection) -> tuple[bool, types_pb2.ObjectRef | None]:
            row = runs.row_of(connection, run_id)
            if row is None or row.node_id != node_id or row.lease_id != (lease_id or row.lease_id):
                return False, None
            if not runs.settle(connection, run_id, state, failure):
                return False, None
            return True, finished(connection, run_id)

        done, ref = await self._db.write(Commit.RUN_SETTLED, settle)
        if done:
            self._changed(run_id, ref, finished=True)

    def _changed(self, run_id: str, ref: types_pb2.ObjectRef | None, *, finished: bool) -> None:
        if finished:
            self.progress.pop(run_id, None)
            self._missing.pop(run_id, None)
            self._bus.publish(EVENTS)
            if ref is not None:
                self._spawn(self._next_of(ref))
        self._bus.publish(run_topic(run_id))

    def _show_progress_soon(self, run_id: str) -> None:
        """Ten times a second is enough for people, however often a step reports."""
        if run_id not in self._progress_due:
            self._progress_due.add(run_id)
            asyncio.get_running_loop().call_later(PROGRESS_EVERY_S, self._show_progress, run_id)

    def _show_progress(self, run_id: str) -> None:
        self._progress_due.discard(run_id)
        self._bus.publish(run_topic(run_id))

    async def _next_of(self, ref: types_pb2.ObjectRef) -> None:
        """The object is free: whoever waits for it may have its turn."""
        for node_id in {row.node_id for row in await self._db.read(lambda c: runs.active_of(c, ref))}:
            await self.kick(node_id)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(_logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def finished(connection: Connection, run_id: str) -> types_pb2.ObjectRef | None:
    """Store the event of a run's end; returns the run's object."""
    run = runs.get(connection, run_id)
    data = {"state": types_pb2.RunState.Name(run.state).removeprefix("RUN_STATE_").lower(), "pipeline": run.pipeline}
    events.add(connection, "run.finished", run_id, node_id=run.node_id, data=data)
    return run.object if run.HasField("object") else None


async def _logged(work: Coroutine[None, None, None]) -> None:
    try:
        await work
    except asyncio.CancelledError:
        raise
    except Exception as error:
        log.error("work in the background failed", traceback=trace(error))
