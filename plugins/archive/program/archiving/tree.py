"""The staged tree that an archive is unpacked into.

Every directory is opened relative to the one above it without following links, so an entry can't be written through a
link that an earlier entry made, whatever its name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from outrider_stepkit import StepFailure, free_bytes

from archiving.names import Parts, check_link, shown

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_RATIO_FROM = 16 * 1024**2
"""Nobody minds a bomb of so many bytes, and the ratio of a small archive says nothing."""

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Limits:
    """What an archive may come to: bytes unpacked, entries, and bytes unpacked for each byte of the archive."""

    max_bytes: int
    max_entries: int
    max_ratio: float = float("inf")
    archive_bytes: int = 0


class Tree:
    """Fills ``root``. Counts ``entries``, ``files``, ``bytes`` and ``skipped`` links, and refuses to pass the limits.

    ``symlinks`` is "refuse", "skip" or "keep"; a link that leads out is refused in any case. ``plain_modes`` gives
    files 0644 (0755 if their owner may execute them) and directories 0755, whatever the archive says. ``on_bytes``
    is told how many bytes were written, as they are.
    """

    def __init__(
        self,
        root: Path,
        limits: Limits,
        *,
        symlinks: str = "refuse",
        plain_modes: bool = False,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        self.entries = 0
        self.files = 0
        self.bytes = 0
        self.skipped = 0
        self._path = root
        self._limits = limits
        self._symlinks = symlinks
        self._plain_modes = plain_modes
        self._on_bytes = on_bytes
        ratio = max(limits.max_ratio * limits.archive_bytes, _RATIO_FROM)
        self._end = int(min(limits.max_bytes, ratio))
        self._charged = 0
        self._passed = 0  # entries that were left out
        self._root = os.open(root, _OPEN_DIRECTORY)
        self._directories: dict[Parts, tuple[int, float | None]] = {}
        self._open: tuple[Parts, int] | None = None  # the last directory used: archives come sorted by directory

    def __enter__(self) -> Tree:
        self._umask = os.umask(0)  # the modes given below are meant as they are
        return self

    def __exit__(self, *_: object) -> None:
        os.umask(self._umask)
        self._forget()
        os.close(self._root)

    def expect(self, total_bytes: int, entries: int) -> None:
        """Refuse at once what the archive itself says is too much."""
        if total_bytes > self._end:
            raise self._too_many_bytes(total_bytes)
        if entries > self._limits.max_entries:
            raise self._too_many_entries()
        free = free_bytes(self._path)
        if total_bytes > free:
            raise StepFailure(
                f"the archive unpacks to {total_bytes} bytes and the volume has {free} bytes left", code="volume_full"
            )

    def directory(self, name: str, parts: Parts, mode: int | None, mtime: float | None) -> None:
        self._count()
        if not parts:
            return
        self._enter(name, parts)
        # Modes and times are set at the end: files to come need write permission, and change the time.
        kept = 0o755 if mode is None or self._plain_modes else mode & 0o777 | 0o700
        self._directories[parts] = (kept, mtime)

    def put(self, name: str, parts: Parts, mode: int | None, mtime: float | None, data: Buffer) -> None:
        """A whole file at once."""
        size = len(data)
        self._count()
        self.charge(size)
        descriptor = self._create(name, parts, mode)
        try:
            if os.write(descriptor, data) < size:
                os.lseek(descriptor, 0, os.SEEK_SET)
                write_all(descriptor, data)
            set_time(descriptor, mtime)
        finally:
            os.close(descriptor)
        self.files += 1
        self.bytes += size
        if self._on_bytes is not None:
            self._on_bytes(self.bytes)

    def file(self, name: str, parts: Parts, mode: int | None, mtime: float | None, size: int) -> Sink:
        """A new file of ``size`` bytes to write. An earlier entry of this name is replaced, as with every unpacker."""
        self._count()
        self.charge(size)
        descriptor = self._create(name, parts, mode)
        self.files += 1
        return Sink(self, descriptor, mtime)

    def symlink(self, name: str, parts: Parts, target: str) -> None:
        self._count()
        check_link(name, parts, target)
        if self._symlinks == "refuse":
            raise StepFailure(
                f"the archive has the symbolic link {shown(name)} to {shown(target)}: say symlinks: keep to unpack"
                " links that stay inside, or symlinks: skip to leave them out",
                code="archive_symlink",
            )
        if self._symlinks == "skip":
            self.skipped += 1
            return
        parent = self._enter(name, parts[:-1])
        try:
            os.symlink(target, parts[-1], dir_fd=parent)
        except FileExistsError:
            self._free(name, parts, parent)
            os.symlink(target, parts[-1], dir_fd=parent)

    def hard_link(self, name: str, parts: Parts, target: str, target_parts: Parts) -> None:
        """Another name for a regular file that this archive has brought already; nothing else can be meant."""
        self._count()
        if not parts:
            raise self._conflict(name, "has no name of its own")
        try:
            source = os.dup(self._enter(name, target_parts[:-1], create=False))
        except FileNotFoundError:
            raise self._conflict(name, f"is a hard link to {shown(target)}, which was not unpacked") from None
        try:
            state = os.stat(target_parts[-1], dir_fd=source, follow_symlinks=False) if target_parts else None
            if state is None or not stat.S_ISREG(state.st_mode):
                raise self._conflict(name, f"is a hard link to {shown(target)}, which is not a file")
            if parts == target_parts:
                return
            parent = self._enter(name, parts[:-1])
            self._free(name, parts, parent)
            os.link(target_parts[-1], parts[-1], src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            raise self._conflict(name, f"is a hard link to {shown(target)}, which was not unpacked") from None
        finally:
            os.close(source)
        self.files += 1

    def finish(self) -> None:
        """Give the directories their modes and times, the deepest first."""
        for parts in sorted(self._directories, key=len, reverse=True):
            mode, mtime = self._directories[parts]
            descriptor = self._enter("/".join(parts), parts)
            os.fchmod(descriptor, mode)
            set_time(descriptor, mtime)

    def wrote(self, size: int) -> None:
        self.bytes += size
        if self._on_bytes is not None:
            self._on_bytes(self.bytes)

    def charge(self, size: int) -> None:
        """Count ``size`` bytes of a file against the limits, before any of them is written."""
        self._charged += size
        if self._charged > self._end:
            raise self._too_many_bytes(self._charged)

    def passed_over(self, size: int) -> None:
        """An entry that is left out: it is counted with what is decoded for nothing."""
        self._passed += 1
        if self.entries + self._passed > self._limits.max_entries:
            raise self._too_many_entries()
        self.charge(size)

    def _count(self) -> None:
        self.entries += 1
        if self.entries + self._passed > self._limits.max_entries:
            raise self._too_many_entries()

    def _too_many_bytes(self, size: int) -> StepFailure:
        limits = self._limits
        if size > limits.max_bytes:
            return StepFailure(
                f"the archive unpacks to more than {limits.max_bytes} bytes: raise max_bytes if that is meant to be so",
                code="archive_too_large",
            )
        return StepFailure(
            f"the archive of {limits.archive_bytes} bytes unpacks to more than {self._end}, over"
            f" {limits.max_ratio:g} times its size: raise max_ratio if that is meant to be so",
            code="archive_too_large",
        )

    def _too_many_entries(self) -> StepFailure:
        return StepFailure(
            f"the archive has more than {self._limits.max_entries} entries: raise max_entries if that is meant to be"
            " so",
            code="archive_too_large",
        )

    def _create(self, name: str, parts: Parts, mode: int | None) -> int:
        if not parts:
            raise self._conflict(name, "has no name of its own")
        # No set-uid bits; always readable and writable by those who share the volume's user.
        wanted = 0o644 if mode is None else mode & 0o777 | 0o600
        if self._plain_modes:
            wanted = 0o755 if wanted & 0o100 else 0o644
        parent = self._enter(name, parts[:-1])
        try:
            return os.open(parts[-1], _CREATE, wanted, dir_fd=parent)
        except FileExistsError:
            self._free(name, parts, parent)
            return os.open(parts[-1], _CREATE, wanted, dir_fd=parent)

    def _free(self, name: str, parts: Parts, parent: int) -> None:
        """Remove an earlier entry of this name: a link, too, which is thereby never written through."""
        try:
            os.unlink(parts[-1], dir_fd=parent)
        except FileNotFoundError:
            pass
        except (IsADirectoryError, PermissionError):
            raise self._conflict(name, "is in the archive as a directory as well") from None

    def _enter(self, name: str, parts: Parts, *, create: bool = True) -> int:
        """A descriptor of the directory ``parts``, which stays ours. Missing ones are made."""
        if not parts:
            return self._root
        if self._open is not None and self._open[0] == parts:
            return self._open[1]
        current = os.dup(self._root)
        try:
            for part in parts:
                if create:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, 0o755, dir_fd=current)
                below = os.open(part, _OPEN_DIRECTORY, dir_fd=current)
                os.close(current)
                current = below
        except OSError as error:
            os.close(current)
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise self._conflict(name, "lies below an entry that is a file or a link") from None
            raise
        self._forget()
        self._open = (parts, current)
        return current

    def _forget(self) -> None:
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    @staticmethod
    def _conflict(name: str, why: str) -> StepFailure:
        return StepFailure(f"the archive is refused: its entry {shown(name)} {why}", code="archive_unsafe")


class Sink:
    """A file of the tree while it is written. What is written was counted when it was opened."""

    def __init__(self, tree: Tree, descriptor: int, mtime: float | None) -> None:
        self._tree = tree
        self._descriptor = descriptor
        self._mtime = mtime

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def write(self, data: Buffer) -> None:
        write_all(self._descriptor, data)
        self._tree.wrote(len(data))

    def hole_until(self, position: int) -> None:
        """Leave out what lies before ``position``: it reads as zeros and takes no room."""
        before = os.lseek(self._descriptor, 0, os.SEEK_CUR)
        if position > before:
            os.ftruncate(self._descriptor, position)
            os.lseek(self._descriptor, position, os.SEEK_SET)
            self._tree.wrote(position - before)

    def close(self) -> None:
        if self._descriptor < 0:
            return
        set_time(self._descriptor, self._mtime)
        os.close(self._descriptor)
        self._descriptor = -1


def write_all(descriptor: int, data: Buffer) -> None:
    done = os.write(descriptor, data)
    while done < len(data):
        done += os.write(descriptor, memoryview(data)[done:])


def set_time(descriptor: int, mtime: float | None) -> None:
    if mtime is None:
        return
    try:  # noqa: SIM105  (contextlib.suppress would cost as much as the call)
        os.utime(descriptor, (mtime, mtime))
    except (OverflowError, ValueError, OSError):
        pass  # a time that the file system can't hold is no reason to refuse a file
