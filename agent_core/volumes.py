"""Volumes: directories beneath one root, allotted by validated name and opened without following links.

The layout is ``run/<run id>/<name>``, ``object/<kind>/<object>/<name>`` and ``node/<name>``. Everything
above a volume belongs to the agent, so nothing that runs in a container can swap a directory for a link;
the agent walks down by directory descriptors all the same.

Lifetimes: a volume of scope ``run`` goes when its run is over (with ``keep``: when somebody removes it),
but not while a managed container still mounts it. A volume of scope ``object`` goes with its object
(with ``keep``: never by itself), one of scope ``node`` stays.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import shutil
import sqlite3
import stat
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agent_core import ownership
from agent_core.identities import SHARED_GID, Identities, owner_of
from agent_core.journal import Journal
from agent_core.room import disk_errors
from agent_core.transitions import Transition
from outrider.errors import Conflict, InvalidInput, NotFound, TemporaryError

MIGRATION = """
CREATE TABLE volumes (
    scope TEXT NOT NULL,
    owner TEXT NOT NULL,
    name TEXT NOT NULL,
    path TEXT NOT NULL UNIQUE,
    keep INTEGER NOT NULL,
    size_bytes INTEGER,
    released INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (scope, owner, name)
);
CREATE TABLE volume_uses (
    path TEXT NOT NULL,
    container TEXT NOT NULL,
    PRIMARY KEY (path, container)
)
"""

Scope = Literal["run", "object", "node"]
Quota = Literal["hard", "watch", "none"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_TRASH = ".trash"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_WALK_LIMIT = 200_000

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AllottedVolume:
    """A volume as the agent mounts it.

    ``quota`` says how ``size_bytes`` is kept: "watch" means measured from time to time, see `Volumes.over_quota`.
    ``group`` is a further group that containers with this volume run with (what all owners share).
    """

    name: str
    host_path: str
    quota: Quota
    scope: Scope = "run"
    size_bytes: int | None = None
    group: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a volume takes up. ``complete`` is false where the walk met its bound: it is at least this much."""

    name: str
    host_path: str
    used_bytes: int
    size_bytes: int | None
    quota: Quota
    complete: bool = True

    @property
    def over(self) -> bool:
        return self.size_bytes is not None and self.used_bytes > self.size_bytes


class Volumes:
    """Allots, measures and removes volumes below ``root``. ``reserve_bytes`` of the disk are never given out."""

    def __init__(self, journal: Journal, root: Path, identities: Identities, *, reserve_bytes: int = 1024**3) -> None:
        self._journal = journal
        self._root = root.resolve() if root.exists() else root.absolute()
        self._identities = identities
        self._reserve_bytes = reserve_bytes
        self._changing = asyncio.Lock()  # held while rows and directories come and go together
        root.mkdir(parents=True, exist_ok=True, mode=0o711)

    async def allot(
        self,
        run_id: str,
        object_ref: str | None,
        name: str,
        scope: Scope,
        keep: bool,
        size_bytes: int | None,
    ) -> AllottedVolume:
        """The volume ``name`` of this run, object (``kind/name``) or node; made if it is not there yet.

        Raises InvalidInput for names that are none and for scope "object" without an object, TemporaryError
        if the disk is too full.
        """
        parts = _parts(run_id, object_ref, name, scope)
        owner = {"run": run_id, "object": object_ref or "", "node": ""}[scope]
        uid, gid = await self._identities.allot(owner_of(run_id, object_ref))
        path = "/".join(parts)

        def record(db: sqlite3.Connection) -> None:
            db.execute(
                "INSERT INTO volumes (scope, owner, name, path, keep, size_bytes) VALUES (?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (scope, owner, name) DO UPDATE SET keep = excluded.keep, "
                "size_bytes = excluded.size_bytes, released = 0",
                (scope, owner, name, path, int(keep), size_bytes),
            )

        # What was allotted before is somebody's already: a run that a restarted agent goes on with has begun.
        if not await self._journal.query("SELECT 1 FROM volumes WHERE path = ? AND released = 0", (path,)):
            await asyncio.to_thread(self._check_disk)
        # The row first: a directory that nobody knows of would never be collected.
        async with self._changing:
            await self._journal.write(Transition.VOLUME_ALLOTTED, record)
            with disk_errors(f"make the volume {name}"):
                shared = await asyncio.to_thread(self._make, parts, uid, gid, scope == "node")
        if shared:
            await asyncio.to_thread(self._share, path, gid)  # programs have set modes since
        return AllottedVolume(
            name=name,
            host_path=str(self._root / path),
            quota="none" if size_bytes is None else "watch",
            scope=scope,
            size_bytes=size_bytes,
            group=SHARED_GID if scope == "node" and os.geteuid() == 0 else None,
        )

    async def share(self, host_paths: Sequence[str], gid: int) -> None:
        """Let a container that runs as another user than theirs write to these volumes, as a member of their ``gid``.

        Those of scope "node" are everybody's from the beginning. Idempotent; called before each such container.
        NotFound if one is not there.
        """
        for path in map(self._relative, host_paths):
            if not path.startswith("node/"):
                with disk_errors(f"set the owners of the volume {path}"):
                    await asyncio.to_thread(self._share, path, gid)

    async def use(self, container: str, host_paths: Sequence[str]) -> None:
        """Note that a managed container mounts these volumes: they are kept until `unuse`. Idempotent."""
        paths = [self._relative(host_path) for host_path in host_paths]

        def record(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM volume_uses WHERE container = ?", (container,))
            db.executemany("INSERT INTO volume_uses (path, container) VALUES (?, ?)", [(p, container) for p in paths])

        await self._journal.write(Transition.VOLUME_USED, record)

    async def unuse(self, container: str) -> None:
        """A managed container is gone: what only it kept is removed. Idempotent."""
        sql = "DELETE FROM volume_uses WHERE container = ?"
        await self._journal.execute(Transition.VOLUME_UNUSED, sql, (container,))
        await self.collect()

    async def release_run(self, run_id: str) -> None:
        """The run is over: remove its volumes of scope "run", but for kept ones and those still in use. Idempotent."""
        sql = "UPDATE volumes SET released = 1 WHERE scope = 'run' AND owner = ? AND keep = 0"
        await self._journal.execute(Transition.VOLUME_RELEASED, sql, (run_id,))
        await self.collect()
        await self._forget_run(run_id)  # also of a run that had no volume

    async def forget_runs(self, *, active: Callable[[], Collection[str]]) -> None:
        """Give back the user ids of runs that have nothing left on the disk, except for those that are ``active`` now.

        A kill between the removal of a run's last volume and that of its user id leaves the id to nobody.
        """
        rows = await self._journal.query("SELECT owner FROM identities WHERE owner LIKE 'run:%'")
        for row in rows:
            run_id = str(row["owner"]).removeprefix("run:")
            if run_id not in active():  # asked after the row was seen: one that began since then has its id by right
                await self._forget_run(run_id)

    async def objects(self) -> list[str]:
        """The objects (``kind/name``) of which there are volumes that go with them."""
        sql = "SELECT DISTINCT owner FROM volumes WHERE scope = 'object' AND keep = 0 AND released = 0 ORDER BY owner"
        return [str(row["owner"]) for row in await self._journal.query(sql)]

    async def release_object(self, object_ref: str, *, busy: Callable[[], Collection[str]] = tuple) -> None:
        """The object is gone: remove its volumes, but for kept ones and those still in use. Idempotent.

        Nothing is done for one that is ``busy`` now: it was made again since somebody heard that it is gone.
        """
        async with self._changing:
            if object_ref in busy():
                return
            sql = "UPDATE volumes SET released = 1 WHERE scope = 'object' AND owner = ? AND keep = 0"
            await self._journal.execute(Transition.VOLUME_RELEASED, sql, (object_ref,))
        await self.collect()

    async def collect(self) -> int:
        """Remove what is released and not in use, and what an interrupted removal left; returns how many went."""
        rows = await self._journal.query(
            "SELECT scope, owner, path FROM volumes "
            "WHERE released = 1 AND path NOT IN (SELECT path FROM volume_uses) ORDER BY path"
        )
        for row in rows:
            async with self._changing:
                sql = "SELECT 1 FROM volumes WHERE path = ? AND released = 1"
                if not await self._journal.query(sql, (row["path"],)):
                    continue  # allotted again meanwhile: an object that was removed can be made anew
                await asyncio.to_thread(self._discard, str(row["path"]))
                sql = "DELETE FROM volumes WHERE path = ? AND released = 1"
                await self._journal.execute(Transition.VOLUME_REMOVED, sql, (row["path"],))
            if row["scope"] == "run":
                await self._forget_run(str(row["owner"]))
        await asyncio.to_thread(self._empty_trash)
        return len(rows)

    async def remove_unknown_runs(self, *, keep: Collection[str], mounted: Collection[str], before: float) -> list[str]:
        """Remove volumes of runs that the journal knows nothing of, as after its loss; returns those runs.

        Those of the runs ``keep`` stay, those with a path that a container has ``mounted``, and those of which one of
        the directories was last changed after ``before``, in seconds since 1970.
        """
        known = {str(row["owner"]) for row in await self._journal.query("SELECT owner FROM volumes WHERE scope='run'")}
        gone = []
        for run_id in await asyncio.to_thread(self._runs_on_disk, before):
            prefix = str(self._root / "run" / run_id)
            in_use = any(path == prefix or path.startswith(f"{prefix}/") for path in mounted)
            if run_id not in known and run_id not in keep and not in_use:
                log.info("removing the volumes of run %s, which nobody knows any more", run_id)
                await asyncio.to_thread(self._discard, f"run/{run_id}")
                gone.append(run_id)
        return gone

    async def usage(self, run_id: str, object_ref: str | None = None) -> list[Usage]:
        """What the volumes of a run, and of its object, take up now."""
        rows = await self._journal.query(
            "SELECT * FROM volumes WHERE (scope = 'run' AND owner = ?) OR (scope = 'object' AND owner = ?) "
            "ORDER BY scope, name",
            (run_id, object_ref or ""),
        )
        return [await asyncio.to_thread(self._measure, row) for row in rows]

    async def over_quota(self) -> list[Usage]:
        """All volumes of the node that have grown over their size."""
        rows = await self._journal.query("SELECT * FROM volumes WHERE size_bytes IS NOT NULL AND released = 0")
        measured = [await asyncio.to_thread(self._measure, row) for row in rows]
        return [usage for usage in measured if usage.over]

    def free_bytes(self) -> int:
        """What can still be given out of the disk that holds the volumes, the reserve left aside."""
        return max(0, shutil.disk_usage(self._root).free - self._reserve_bytes)

    # -- below here everything may block and runs in a thread

    def _check_disk(self) -> None:
        free = shutil.disk_usage(self._root).free
        if free < self._reserve_bytes:
            raise TemporaryError(
                f"the disk of the volumes has {_mib(free)} MiB free, less than the reserve of "
                f"{_mib(self._reserve_bytes)} MiB",
                code="disk_full",
                hint="free some space below the agent's state directory",
            )

    def _runs_on_disk(self, before: float) -> list[str]:
        """Runs with directories of which none was changed since then."""
        found = []
        with ExitStack() as stack, suppress(FileNotFoundError):
            runs = self._descend(stack, ["run"], create=False)
            for run_id in os.listdir(runs):
                with ExitStack() as inner, suppress(OSError):
                    run = os.open(run_id, _DIRECTORY, dir_fd=runs)
                    inner.callback(os.close, run)
                    names = [".", *os.listdir(run)]
                    if all(os.stat(each, dir_fd=run, follow_symlinks=False).st_mtime < before for each in names):
                        found.append(run_id)
        return found

    def _make(self, parts: Sequence[str], uid: int, gid: int, everybodys: bool) -> bool:
        """Returns whether it is one that `share` was called for."""
        with ExitStack() as stack:
            descriptor = self._descend(stack, parts[:-1], create=True)
            volume = _open_or_make(stack, descriptor, parts[-1])
            root = os.geteuid() == 0
            if everybodys and root:
                os.fchown(volume, 0, SHARED_GID)
                ownership.open_to_group(volume)
                return False
            if root:
                os.fchown(volume, uid, gid)
            if ownership.is_shared(volume):
                return True
            os.fchmod(volume, ownership.ALONE)
            return False

    def _share(self, path: str, gid: int) -> None:
        with ExitStack() as stack:
            try:
                volume = self._descend(stack, path.split("/"), create=False)
            except FileNotFoundError:
                raise NotFound(f"the volume {path} is not there any more") from None
            ownership.share(volume, gid)

    def _descend(self, stack: ExitStack, parts: Sequence[str], *, create: bool) -> int:
        descriptor = os.open(self._root, _DIRECTORY)
        stack.callback(os.close, descriptor)
        for part in parts:
            if create:
                descriptor = _open_or_make(stack, descriptor, part)
            else:
                descriptor = os.open(part, _DIRECTORY, dir_fd=descriptor)
                stack.callback(os.close, descriptor)
        return descriptor

    def _discard(self, path: str) -> None:
        """Out of sight by one rename, then removed at leisure: a killed agent leaves no half-removed volume."""
        parts = path.split("/")
        with ExitStack() as stack:
            try:
                parent = self._descend(stack, parts[:-1], create=False)
                trash = self._descend(stack, [_TRASH], create=True)
                os.rename(parts[-1], secrets.token_hex(8), src_dir_fd=parent, dst_dir_fd=trash)
            except FileNotFoundError:
                return
        # Parents that are empty now go too; the first that is not ends it.
        for depth in range(len(parts) - 1, 1, -1):
            with ExitStack() as stack:
                try:
                    os.rmdir(parts[depth - 1], dir_fd=self._descend(stack, parts[: depth - 1], create=False))
                except OSError:
                    return

    def _empty_trash(self) -> None:
        with ExitStack() as stack:
            try:
                trash = self._descend(stack, [_TRASH], create=False)
            except FileNotFoundError:
                return
            for entry in os.listdir(trash):
                # fd-based on Linux: it does not follow links that a container left.
                shutil.rmtree(entry, dir_fd=trash, ignore_errors=True)

    def _measure(self, row: sqlite3.Row) -> Usage:
        size = None if row["size_bytes"] is None else int(row["size_bytes"])
        used, complete = 0, True
        with ExitStack() as stack, suppress(FileNotFoundError):
            top = self._descend(stack, str(row["path"]).split("/"), create=False)
            used, complete = _walk(top)
        return Usage(
            name=str(row["name"]),
            host_path=str(self._root / str(row["path"])),
            used_bytes=used,
            size_bytes=size,
            quota="none" if size is None else "watch",
            complete=complete,
        )

    def _relative(self, host_path: str) -> str:
        try:
            return Path(host_path).relative_to(self._root).as_posix()
        except ValueError:
            raise NotFound(f"{host_path} is not a volume of this node") from None

    async def _forget_run(self, run_id: str) -> None:
        left = await self._journal.query("SELECT 1 FROM volumes WHERE scope = 'run' AND owner = ?", (run_id,))
        if not left:
            await self._identities.release(owner_of(run_id, None))


def _parts(run_id: str, object_ref: str | None, name: str, scope: Scope) -> list[str]:
    if not _NAME.fullmatch(name):
        raise InvalidInput(f"{name!r} is not the name of a volume", hint="letters, digits, '_', '-' and '.'")
    if scope == "node":
        return ["node", name]
    if scope == "run":
        if not _NAME.fullmatch(run_id):
            raise InvalidInput(f"{run_id!r} is not the id of a run")
        return ["run", run_id, name]
    kind, slash, object_name = (object_ref or "").partition("/")
    if not object_ref:
        raise InvalidInput(
            f"the volume {name} has scope object, and this run has no object",
            hint="run it with --object KIND/NAME, or give the volume another scope",
        )
    if not slash or not _NAME.fullmatch(kind) or not _NAME.fullmatch(object_name):
        raise InvalidInput(
            f"{object_ref!r} can't have volumes", hint="kind and name of letters, digits, '_', '-' and '.'"
        )
    return ["object", kind, object_name, name]


def _open_or_make(stack: ExitStack, parent: int, name: str) -> int:
    with suppress(FileExistsError):
        os.mkdir(name, mode=0o711, dir_fd=parent)
    try:
        descriptor = os.open(name, _DIRECTORY, dir_fd=parent)
    except OSError as error:
        raise Conflict(
            f"{name!r} below the root of the volumes is not a directory", code="volume_damaged", hint="remove it"
        ) from error
    stack.callback(os.close, descriptor)
    return descriptor


def _walk(top: int) -> tuple[int, bool]:
    """Bytes on the disk below ``top``, and whether everything was counted. Follows no link, leaves no filesystem."""
    device = os.fstat(top).st_dev
    seen: set[int] = set()
    total, entries = 0, 0
    for _, _, files, directory in os.fwalk(".", dir_fd=top, follow_symlinks=False):
        total += os.fstat(directory).st_blocks * 512
        for name in files:
            entries += 1
            if entries > _WALK_LIMIT:
                return total, False
            try:
                found = os.stat(name, dir_fd=directory, follow_symlinks=False)
            except FileNotFoundError:
                continue
            if found.st_dev != device or (found.st_nlink > 1 and found.st_ino in seen):
                continue
            if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
                seen.add(found.st_ino)
            total += found.st_blocks * 512
    return total, True


def _mib(size: int) -> int:
    return size // 1024**2
