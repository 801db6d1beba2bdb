"""Logs of runs."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from sqlalchemy import Connection

from outrider.errors import NotFound
from outrider.v1 import control_service_pb2 as pb
from outrider.v1 import types_pb2
from server_core.bus.base import Subscription, log_topic, run_topic
from server_core.control.common import Context, Part
from server_core.store import logs, runs
from server_core.store.nodes import listing

_LAST_BYTES_WITHIN_S = 10.0
"""How long to wait for what a finished run's node has not delivered yet; where the log is followed, counted from the
last byte that came."""


class Logs(Part):
    async def StreamRunLogs(
        self, request: pb.StreamRunLogsRequest, context: Context
    ) -> AsyncIterator[types_pb2.RunLogChunk]:
        """What is stored, in the order in which it came; with ``follow`` also what comes, until the run is over.

        Of a run that is over it is the whole log: the last bytes may still be on their way when its end is known.
        """
        run = await self._s.db.read(lambda c: runs.get(c, request.run_id))
        names = [step.name for step in run.steps]
        if request.step and request.step not in names:
            raise NotFound(
                f"run {run.run_id} has no step {request.step!r}",
                code="unknown_step",
                hint=listing("its steps are", names),
            )
        if not request.follow:
            await self._last_bytes(run)
        after = 0
        if request.tail > 0:
            chunks, after = await self._s.db.read(
                lambda c: logs.tail(c, run.run_id, request.tail, step=request.step, attempt=request.attempt)
            )
            for chunk in chunks:
                yield chunk
        with self._s.bus.subscribe(run_topic(run.run_id), log_topic(run.run_id)) as subscription:
            heard_at = time.monotonic()
            while True:
                # Asked for before the pages: what comes in between belongs to the next round.
                over, complete = await self._state(run.run_id) if request.follow else (True, True)
                while (page := await self._page(run.run_id, after, request))[0]:
                    chunks, after = page
                    heard_at = time.monotonic()
                    for chunk in chunks:
                        yield chunk
                if over and complete:
                    return
                if not await self._more(subscription, over, heard_at):
                    return

    async def _last_bytes(self, run: types_pb2.Run) -> None:
        """Wait for what the log of a run that is over still lacks, if its node is there to deliver it."""
        began_at = time.monotonic()
        with self._s.bus.subscribe(log_topic(run.run_id)) as subscription:
            while self._s.fleet.is_online(run.node_id):
                over, complete = await self._state(run.run_id)
                if not over or complete or not await self._more(subscription, over, began_at):
                    return

    async def _state(self, run_id: str) -> tuple[bool, bool]:
        return await self._s.db.read(lambda c: _state(c, run_id))

    async def _page(
        self, run_id: str, after: int, request: pb.StreamRunLogsRequest
    ) -> tuple[list[types_pb2.RunLogChunk], int]:
        return await self._s.db.read(
            lambda c: logs.read(c, run_id, after=after, step=request.step, attempt=request.attempt)
        )

    @staticmethod
    async def _more(subscription: Subscription, over: bool, heard_at: float) -> bool:
        """Wait for news. False: the run is over, and its last bytes don't come."""
        if not over:
            return await subscription.wait()
        left = heard_at + _LAST_BYTES_WITHIN_S - time.monotonic()
        return left > 0 and await subscription.wait(left)


def _state(connection: Connection, run_id: str) -> tuple[bool, bool]:
    """Whether the run is over, and whether all bytes that its steps wrote in their last attempt are here."""
    run = runs.get(connection, run_id)
    complete = all(
        logs.end_of(connection, run_id, step.name, step.attempt, stream) >= length
        for step in run.steps
        for stream, length in (
            (types_pb2.LOG_STREAM_STDOUT, step.stdout_bytes),
            (types_pb2.LOG_STREAM_STDERR, step.stderr_bytes),
        )
    )
    return runs.is_over(run.state), complete
