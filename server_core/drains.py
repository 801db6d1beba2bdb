"""Draining nodes: they take no new runs, and are called drained only when that is true.

Drained is what two witnesses agree on: the store, in which no run that is not over was ever sent to the node, and the
node, which is here and says that it has no run and nothing left to tell. What was drained stays so when the node goes
away: that is what it was drained for.

A deadline cancels what still runs. It counts on the monotonic clock; only what a stopped server can't count is taken
from the wall clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

import structlog
from sqlalchemy import Connection

from outrider._suggest import listing
from outrider.errors import OutriderError
from outrider.v1 import types_pb2
from server_core.bus.base import EVENTS, NODES, Bus, run_topic
from server_core.dispatch import Dispatcher
from server_core.fleet import Fleet
from server_core.store import draining, events, runs
from server_core.store.base import Database
from server_core.store.commits import Commit
from server_core.store.common import now_us
from server_core.store.draining import Draining

log = structlog.get_logger(__name__)

LOOK_EVERY_S = 0.5


class Drains:
    """Watches the nodes that are being drained. ``clock`` gives monotonic seconds."""

    def __init__(
        self,
        db: Database,
        bus: Bus,
        fleet: Fleet,
        dispatcher: Dispatcher,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._db = db
        self._bus = bus
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._clock = clock
        self._open: dict[str, float | None] = {}  # nodes that are not drained yet, with the time of their deadline
        # By node: the brief that there was when its last run was found to be over. It may be from before that end.
        self._former: dict[str, types_pb2.BriefState] = {}

    async def load(self) -> None:
        """Go on with what a former server had begun."""
        for node_id in await self._db.read(draining.all_of):
            await self.changed(node_id)

    async def changed(self, node_id: str) -> None:
        """The node's drain was begun, changed or undone in the store."""
        drain = await self._db.read(lambda c: draining.of(c, node_id))
        if drain is None or drain.drained_us is not None:
            self.forget(node_id)
            return
        left = None if drain.deadline_us is None else max(0.0, (drain.deadline_us - now_us()) / 1e6)
        self._open[node_id] = None if left is None else self._clock() + left
        await self.look(node_id)

    def forget(self, node_id: str) -> None:
        """The node takes runs again, or was removed."""
        self._open.pop(node_id, None)
        self._former.pop(node_id, None)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            for node_id in list(self._open):
                try:
                    await self.look(node_id)
                except OutriderError as error:
                    log.error("a drain is looked at later", node=node_id, error=str(error))
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self, node_id: str) -> None:
        """See whether the node is drained by now, and whether its time is up."""
        drain, held = await self._stored(node_id)
        if drain is None:
            self.forget(node_id)
            return
        if await self._is_empty(node_id, held):
            await self._drained(node_id)
            return
        due = self._open.get(node_id)
        if due is not None and self._clock() >= due:
            await self._cancel(node_id, drain)
            self._open[node_id] = None  # only now: where the store could not be written, it is still due

    async def describe(self, node: types_pb2.Node) -> types_pb2.Node:
        """Put the state of its drain, as it is now, onto a node's record."""
        node_id = node.node_id
        drain, held = await self._stored(node_id)
        if drain is not None and drain.drained_us is None and await self._is_empty(node_id, held):
            # Written down before it is told: the node may be switched off because of it.
            await self._drained(node_id)
            drain, held = await self._stored(node_id)
        if drain is not None:
            node.drain.CopyFrom(self._described(node_id, drain, held))
        return node

    async def describe_all(self, nodes: Sequence[types_pb2.Node]) -> Sequence[types_pb2.Node]:
        """`describe` for a list."""
        draining_ones = await self._db.read(draining.all_of)
        return [await self.describe(node) if node.node_id in draining_ones else node for node in nodes]

    def _described(self, node_id: str, drain: Draining, held: Sequence[str]) -> types_pb2.Drain:
        described = drain.describe()
        described.runs.extend(held or self._told(node_id))
        described.drained = not described.runs and drain.drained_us is not None
        described.waits_for = "" if described.drained else self._waits_for(node_id, held)
        return described

    def _told(self, node_id: str) -> Sequence[str]:
        """The runs that the node itself spoke of last."""
        brief = self._fleet.brief(node_id)
        return [] if brief is None else brief.runs

    def _waits_for(self, node_id: str, held: Sequence[str]) -> str:
        """The sentence that says why the node can't be called drained; "" if it can."""
        if held:
            self._former.pop(node_id, None)
            return f"it has {'run' if len(held) == 1 else 'runs'} {listing(held)}"
        channel, brief = self._fleet.channel(node_id), self._fleet.brief(node_id)
        if channel is None or not channel.reported or brief is None:
            return "it is offline, and what it has can't be known"
        if brief.runs:
            return f"it speaks of {'run' if len(brief.runs) == 1 else 'runs'} {listing(brief.runs)}"
        if brief.outbox_depth:
            return f"it has {brief.outbox_depth} reports to hand in"
        if brief.log_bytes:
            return f"it has {brief.log_bytes} bytes of logs to hand in"
        # What it said before its last run ended says nothing of what that run left to hand in.
        return "it is asked what it has to hand in" if brief is self._former.setdefault(node_id, brief) else ""

    async def _is_empty(self, node_id: str, held: Sequence[str]) -> bool:
        """Whether the node can be called drained; where only its word is missing, it is asked for it."""
        former = self._former.get(node_id)
        if not self._waits_for(node_id, held):
            return True
        channel = self._fleet.channel(node_id)
        if self._former.get(node_id) is not former and channel is not None and not held:
            # Its next heartbeat would say it, too, but somebody may be waiting.
            with contextlib.suppress(OutriderError):
                await channel.ask_for_report()
        return False

    async def _stored(self, node_id: str) -> tuple[Draining | None, Sequence[str]]:
        """The node's drain, and the runs that it has or may have."""
        return await self._db.read(lambda c: (draining.of(c, node_id), draining.runs_on(c, node_id)))

    async def _drained(self, node_id: str) -> None:
        def mark(connection: Connection) -> bool:
            if not draining.mark_drained(connection, node_id):
                return False
            events.add(connection, "node.drained", node_id, node_id=node_id)
            return True

        news = await self._db.write(Commit.NODE_DRAINED, mark)
        self.forget(node_id)
        if news:
            log.info("node drained", node=node_id)
            self._bus.publish(EVENTS)
            self._bus.publish(NODES)

    async def _cancel(self, node_id: str, drain: Draining) -> None:
        reason = f"the deadline of the drain of node {node_id} is over{drain.why}"

        def cancel(connection: Connection) -> Sequence[str]:
            held = draining.runs_on(connection, node_id)
            for run_id in held:
                row = runs.row_of(connection, run_id)
                if row is None or row.cancel_requested:
                    continue  # asked for before; a server that was killed meanwhile comes here again
                runs.request_cancel(connection, run_id, reason, 0)
                data = {"reason": reason, "by": drain.by}
                events.add(connection, "run.cancel_requested", run_id, node_id=node_id, data=data)
            return held

        held = await self._db.write(Commit.DRAIN_DEADLINE, cancel)
        log.warning("what a drained node still runs is cancelled", node=node_id, runs=list(held))
        for topic in (EVENTS, *map(run_topic, held)):
            self._bus.publish(topic)
        self._dispatcher.kick_soon(node_id)
