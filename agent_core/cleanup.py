"""Collects what is left over: what a crash came before the removal of, and what nobody needs any more.

Only what is labelled as this node's, or lies in the state directory, is ever touched.
"""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import dataclass

import structlog

from agent_core.runner import RunEngine
from agent_core.runtimes.base import LABEL_ATTEMPT, LABEL_RUN, LABEL_STEP, ContainerInfo
from agent_core.services import Services
from outrider.errors import OutriderError
from outrider.v1 import types_pb2 as types

log = structlog.get_logger(__name__)

INTERVAL_S = 600.0
_ENGINE_S = 60.0  # for all that needs the engine
_KEEP_COMMANDS_S = 7 * 24 * 3600.0
# A server that was restored from a backup may ask how they ended.
_KEEP_RUNS_S = 7 * 24 * 3600.0
_KEEP_RUNS = 500


@dataclass(frozen=True, slots=True)
class Ages:
    """How old, in seconds, what nobody needs any more may get. What is needed is kept at any age."""

    stray_s: float = 24 * 3600.0  # ended containers of steps that the journal does not know
    missing_s: float = 24 * 3600.0  # what is held for a managed container that somebody removed
    unknown_volume_s: float = 7 * 24 * 3600.0  # volumes of runs that the journal does not know


UNDER_PRESSURE = Ages(stray_s=600.0, missing_s=600.0, unknown_volume_s=3600.0)
"""While the disk has less free than the reserve."""


class Cleanup:
    """`run` does it from time to time, `relieve` at once because the disk gets full."""

    def __init__(self, services: Services, runs: RunEngine, known: asyncio.Event) -> None:
        """``known``: set once the journal has all that there is to know; before that nothing is anybody's leftover."""
        self._services = services
        self._runs = runs
        self._known = known
        self._one = asyncio.Lock()

    async def run(self) -> None:
        """For ever."""
        while True:
            await self._known.wait()
            await self._services.engine.available()
            try:
                await self.once()
            except (OutriderError, OSError) as error:
                log.info("clean-up is put off", error=str(error))
            await asyncio.sleep(INTERVAL_S)

    async def relieve(self) -> None:
        """Make room: what would go by and by goes now."""
        if not self._known.is_set():
            return
        log.info("collecting what nobody needs, because the disk gets full")
        await self.once(UNDER_PRESSURE)

    async def once(self, ages: Ages = Ages()) -> None:
        """Everything that is left over now, as far as the engine answers."""
        async with self._one:
            try:
                async with asyncio.timeout(_ENGINE_S):
                    seen = await self._of_engine(ages)
            except (OutriderError, TimeoutError) as error:
                log.info("what is left over in the engine is put off", error=str(error))
                await self._of_disk()
            else:
                await self._of_disk()
                await self._forget(keep=seen)

    async def _of_engine(self, ages: Ages) -> set[str]:
        """Containers of steps, what was held for containers that are gone, and volumes that none of them has.

        Returns the runs of which there is a container.
        """
        services = self._services
        found = await services.runtime.list()
        await self._containers(found, ages)
        services.netpool.release_others(self._runs.active)
        await services.containers.forget_missing(found, older_than_s=ages.missing_s, active=self._runs.active)
        mounted = {mount.source for info in found for mount in info.mounts}
        await services.volumes.remove_unknown_runs(
            keep=self._runs.active,
            mounted=mounted,
            before=services.state.steady.stamped_before(ages.unknown_volume_s),
        )
        return {info.labels.get(LABEL_RUN, "") for info in found}

    async def _of_disk(self) -> None:
        services = self._services
        active = set(self._runs.active)
        await asyncio.to_thread(self._directories, active)
        rows = await services.state.journal.query(
            "SELECT DISTINCT owner FROM volumes WHERE scope = 'run' AND keep = 0 AND released = 0"
        )
        for row in rows:
            if row["owner"] not in self._runs.active:
                await services.volumes.release_run(row["owner"])
        await services.volumes.collect()
        await services.volumes.forget_runs(active=lambda: self._runs.active)
        await services.spool.forget_settled()
        services.spool.remove_strays(self._runs.active)

    async def _forget(self, *, keep: set[str]) -> None:
        # Only what has no container any more, as the engine has just said: nobody would know whose it is.
        now = self._services.state.steady.now()
        await self._services.state.forget(
            commands_before=now - _KEEP_COMMANDS_S, runs_before=now - _KEEP_RUNS_S, keep_runs=_KEEP_RUNS, keep=keep
        )

    async def _containers(self, found: list[ContainerInfo], ages: Ages) -> None:
        for info in found:
            if self._services.containers.owner(info) == "step" and await self._is_left_over(info, ages):
                log.info("removing a step's container that is left over", container=info.name, state=info.state)
                # Not waited for: an engine that hangs on one holds up no other.
                self._services.removals.add(self._services.runtime.remove(info.id, force=True))

    async def _is_left_over(self, info: ContainerInfo, ages: Ages) -> bool:
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
        known = await journal.query("SELECT state FROM runs WHERE run_id = ?", (run_id,))
        if known:
            # What became of an unknown run may still turn out: as long as it works, it is let.
            return not (known[0]["state"] == types.RUN_STATE_UNKNOWN and info.state == "running")
        # The journal was lost, which is no reason to kill somebody's work; or it is of another agent on this engine,
        # whose node has the same name under another server, and which is about to look at its end.
        before = self._services.state.steady.stamped_before(ages.stray_s)
        old = info.created_at is not None and info.created_at.timestamp() < before
        return old and info.state not in ("running", "paused", "restarting")

    def _directories(self, active: set[str]) -> None:
        root = self._services.attempts_dir
        if not root.is_dir():
            return
        for entry in root.iterdir():
            if entry.name not in active:
                shutil.rmtree(entry, ignore_errors=True)
