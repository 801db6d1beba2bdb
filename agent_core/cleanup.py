"""Collects what is left over: what a crash came before the removal of, and what nobody needs any more.

Only what is labelled as this node's, or lies in the state directory, is ever touched.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from datetime import UTC, datetime

import structlog

from agent_core.runner import RunEngine
from agent_core.runtimes.base import LABEL_ATTEMPT, LABEL_KIND, LABEL_NODE, LABEL_RUN, LABEL_STEP, ContainerInfo
from agent_core.services import Services
from outrider.errors import OutriderError

log = structlog.get_logger(__name__)

INTERVAL_S = 600.0
_KEEP_COMMANDS_S = 7 * 24 * 3600.0
_STRAY_S = 24 * 3600.0


class Cleanup:
    """`once` at every start and return of the engine; `run` from time to time."""

    def __init__(self, services: Services, runs: RunEngine) -> None:
        self._services = services
        self._runs = runs

    async def run(self) -> None:
        """For ever."""
        while True:
            await self._services.engine.available()
            try:
                await self.once()
            except OutriderError as error:
                log.info("clean-up is put off", error=str(error))
            await asyncio.sleep(INTERVAL_S)

    async def once(self) -> None:
        """Everything that is left over now."""
        services = self._services
        await self._containers()
        active = set(self._runs.active)
        await asyncio.to_thread(self._directories, active)
        rows = await services.state.journal.query(
            "SELECT DISTINCT owner FROM volumes WHERE scope = 'run' AND keep = 0 AND released = 0"
        )
        for row in rows:
            if row["owner"] not in self._runs.active:
                await services.volumes.release_run(row["owner"])
        await services.volumes.collect()
        await services.spool.forget_settled()
        await services.state.forget(commands_before=time.time() - _KEEP_COMMANDS_S)
        services.spool.remove_strays(self._runs.active)

    async def _containers(self) -> None:
        labels = {LABEL_NODE: self._services.config.node_id, LABEL_KIND: "step"}
        for info in await self._services.runtime.list(labels=labels):
            if await self._is_left_over(info):
                log.info("removing a step's container that is left over", container=info.name, state=info.state)
                await self._services.runtime.remove(info.id, force=True)

    async def _is_left_over(self, info: ContainerInfo) -> bool:
        run_id = info.labels.get(LABEL_RUN, "")
        journal = self._services.state.journal
        rows = await journal.query(
            "SELECT phase FROM attempts WHERE run_id = ? AND step = ? AND attempt = ?",
            (run_id, info.labels.get(LABEL_STEP, ""), info.labels.get(LABEL_ATTEMPT, "")),
        )
        if rows and rows[0]["phase"] == "done":
            return True
        if run_id in self._runs.active:
            return False
        known = await journal.query("SELECT 1 FROM runs WHERE run_id = ?", (run_id,))
        if known:
            return True
        # The journal was lost, which is no reason to kill somebody's work; or it is of another agent on this engine,
        # whose node has the same name under another server, and which is about to look at its end.
        old = info.created_at is not None and (datetime.now(UTC) - info.created_at).total_seconds() > _STRAY_S
        return old and info.state not in ("running", "paused", "restarting")

    def _directories(self, active: set[str]) -> None:
        root = self._services.attempts_dir
        if not root.is_dir():
            return
        for entry in root.iterdir():
            if entry.name not in active:
                shutil.rmtree(entry, ignore_errors=True)
