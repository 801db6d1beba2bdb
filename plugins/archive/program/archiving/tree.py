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
from pathlib import Path
from types import TracebackType

from outrider_stepkit import StepFailure, free_bytes

from archiving.names import Parts, check_link, shown

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Tree:
    """Fills ``root``. Counts ``entries``, ``files`` and ``bytes``, and refuses to go past the limits.

    ``on_bytes`` gets the bytes written and those expected, where the format says beforehand how many there will be.
    """

    def __init__(
        self, root: Path, *, max_bytes: int, max_entries: int, on_bytes: Callable[[int, int], None] | None = None
    ) -> None:
        self.entries = 0
        self.files = 0
        self.bytes = 0
        self._path = root
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._on_bytes = on_bytes
        self._expected = 0
        self._root = os.open(root, _OPEN_DIRECTORY)
        self._directories: dict[Parts, tuple[int, float | None]] = {}
        self._open: tuple[Parts, int] | None = None  # the last directory used: archives come sorted by directory

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *_: object) -> None:
        self._forget()
        os.close(self._root)

    def expect(self, total_bytes: int, entries: int) -> None:
        """Refuse at once what the archive itself says is too much."""
        self._check_bytes(total_bytes)
        self._check_entries(entries)
        self._expected = total_bytes
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
        self._directories[parts] = (0o755 if mode is None else mode & 0o777 | 0o700, mtime)

    def file(self, name: str, parts: Parts, mode: int | None, mtime: float | None) -> Sink:
        """A new file to write. An earlier entry of this name is replaced, as every unpacker does."""
        self._count()
        parent = self._place(name, parts)
        # No set-uid bits; always readable and writable by those who share the volume's user.
        wanted = 0o644 if mode is None else mode & 0o777 | 0o600
        descriptor = os.open(parts[-1], _CREATE, 0o600, dir_fd=parent)
        self.files += 1
        return Sink(self, descriptor, wanted, mtime)

    def symlink(self, name: str, parts: Parts, target: str) -> None:
        self._count()
        check_link(name, parts, target)
        parent = self._place(name, parts)
        os.symlink(target, parts[-1], dir_fd=parent)

    def hard_link(self, name: str, parts: Parts, target: str, target_parts: Parts) -> None:
        """Another name for a regular file that this archive has brought already; nothing else can be meant."""
        self._count()
        try:
            source = os.dup(self._enter(name, target_parts[:-1], create=False))
        except FileNotFoundError:
            raise self._conflict(name, f"is a hard link to {shown(target)}, which the archive has not") from None
        try:
            state = os.stat(target_parts[-1], dir_fd=source, follow_symlinks=False) if target_parts else None
            if state is None or not stat.S_ISREG(state.st_mode):
                raise self._conflict(name, f"is a hard link to {shown(target)}, which is not a file")
            if parts == target_parts:
                return
            parent = self._place(name, parts)
            os.link(target_parts[-1], parts[-1], src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            raise self._conflict(name, f"is a hard link to {shown(target)}, which the archive has not") from None
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
        self._check_bytes(self.bytes)
        if self._on_bytes is not None and self._expected:
            self._on_bytes(self.bytes, self._expected)

    def _count(self) -> None:
        self.entries += 1
        self._check_entries(self.entries)

    def _check_bytes(self, size: int) -> None:
        if size > self._max_bytes:
            raise StepFailure(
                f"the archive unpacks to more than {self._max_bytes} bytes: raise max_bytes if that is meant to be so",
                code="archive_too_large",
            )

    def _check_entries(self, entries: int) -> None:
        if entries > self._max_entries:
            raise StepFailure(
                f"the archive has more than {self._max_entries} entries: raise max_entries if that is meant to be so",
                code="archive_too_large",
            )

    def _place(self, name: str, parts: Parts) -> int:
        """The directory for a file or link ``parts``, with that name free in it."""
        if not parts:
            raise self._conflict(name, "has no name of its own")
        parent = self._enter(name, parts[:-1])
        try:
            os.unlink(parts[-1], dir_fd=parent)
            self._directories.pop(parts, None)
        except FileNotFoundError:
            pass
        except (IsADirectoryError, PermissionError):
            raise self._conflict(name, "is in the archive as a directory as well") from None
        return parent

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
    """A file of the tree while it is written."""

    def __init__(self, tree: Tree, descriptor: int, mode: int, mtime: float | None) -> None:
        self._tree = tree
        self._file = open(descriptor, "wb", buffering=0)  # noqa: SIM115  (closed by close)
        self._mode = mode
        self._mtime = mtime

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def write(self, data: bytes) -> int:
        self._tree.wrote(len(data))  # first: nothing is written past the limit
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        return len(data)

    def close(self) -> None:
        if self._file.closed:
            return
        os.fchmod(self._file.fileno(), self._mode)
        set_time(self._file.fileno(), self._mtime)
        self._file.close()


def set_time(descriptor: int, mtime: float | None) -> None:
    if mtime is None:
        return
    # A time that the file system can't hold is no reason to refuse a file.
    with contextlib.suppress(OverflowError, ValueError, OSError):
        os.utime(descriptor, (mtime, mtime))
