"""What the server does now and then: forget old answers, retire old events and logs."""

from __future__ import annotations

from datetime import timedelta

import structlog

from server_core.bus.base import EVENTS, Bus
from server_core.config import ServerConfig
from server_core.store import events, requests, retention
from server_core.store.base import Database
from server_core.store.commits import Commit
from server_core.store.common import monotonic_us, now_us

log = structlog.get_logger(__name__)


class Housekeeping:
    """Keeps the store at the size that the configuration asks for.

    Ages are judged by the time at which this was made, carried on by the monotonic clock: a wall clock that is set
    forward while the server runs makes nothing old.
    """

    def __init__(self, db: Database, bus: Bus, config: ServerConfig) -> None:
        self._db = db
        self._bus = bus
        self._config = config
        self._ahead_us = now_us() - monotonic_us()

    async def once(self) -> None:
        """Everything that is due now, in small transactions. Raises the store's errors; what is done stays done."""
        answered_before = self._ago_us(requests.KEPT_DAYS)
        await self._db.write(Commit.REQUESTS_FORGOTTEN, lambda c: requests.forget_old(c, answered_before))
        gone = await self._retire_events()
        retired = await self._retire_old_logs()
        retired += await self._retire_logs_for_room()
        if gone or retired:
            data = {"events": gone, "runs": len(retired), "log_bytes": sum(each.bytes for each in retired)}
            log.info("old events and logs were removed", **data)
            await self._db.write(Commit.EVENTS_RETIRED, lambda c: events.add(c, "store.retired", "store", data=data))
            self._bus.publish(EVENTS)

    async def _retire_events(self) -> int:
        before, keep = self._ago_us(self._config.keep_events_days), self._config.keep_events
        up_to = await self._db.read(lambda c: retention.last_event_to_retire(c, before, keep))
        gone = 0
        while up_to and (some := await self._db.write(
            Commit.EVENTS_RETIRED, lambda c: retention.retire_events(c, up_to)
        )):  # fmt: skip
            gone += some
        return gone

    async def _retire_old_logs(self) -> list[retention.RetiredLog]:
        before = self._ago_us(self._config.keep_logs_days)
        retired: list[retention.RetiredLog] = []
        while before and (run_ids := await self._db.read(lambda c: retention.runs_with_old_logs(c, before))):
            retired += [await self._retire_log(run_id) for run_id in run_ids]
        return retired

    async def _retire_logs_for_room(self) -> list[retention.RetiredLog]:
        """The oldest logs go first where the store has outgrown its size."""
        retired: list[retention.RetiredLog] = []
        limit = self._config.keep_store_bytes
        while limit and await self._db.read(retention.used_bytes) > limit:
            run_ids = await self._db.read(retention.runs_with_oldest_logs)
            if not run_ids:
                break
            for run_id in run_ids:
                retired.append(await self._retire_log(run_id))
                if await self._db.read(retention.used_bytes) <= limit:
                    return retired
        return retired

    async def _retire_log(self, run_id: str) -> retention.RetiredLog:
        return await self._db.write(Commit.LOGS_RETIRED, lambda c: retention.retire_log(c, run_id))

    def _ago_us(self, days: float) -> int:
        """That many days ago; 0 for none."""
        if not days:
            return 0
        return self._ahead_us + monotonic_us() - round(timedelta(days=days).total_seconds() * 1e6)
