"""Writing so that a path holds the whole or nothing: staged on the same volume, synced, renamed.

What a killed attempt left staged is removed by the next one for the same place, and what it had begun to move into its
place is moved there first (see moves.py). A stage is locked by the process that fills it, so that another's work is
never taken for a leftover.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from outrider_stepkit.moves import finish, is_unfinished, move_all, sync_directory, uninterrupted
from outrider_stepkit.step import StepFailure

__all__ = [
    "STAGE_PREFIX",
    "free_bytes",
    "is_mount",
    "move_all",
    "recover",
    "remove_tree",
    "staged_directory",
    "staged_file",
    "swap",
    "sync_directory",
    "sync_filesystem",
    "uninterrupted",
    "write_error",
]

STAGE_PREFIX = ".outrider-stage."
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def write_error(error: OSError) -> StepFailure:
    """A person's sentence for what the operating system said about a path."""
    where = f" {error.filename}" if error.filename else ""
    name = errno.errorcode.get(error.errno or 0, "")
    match name:
        case "ENOSPC" | "EDQUOT":
            return StepFailure(f"the volume is full: there is no space left to write{where}", code="volume_full")
        case "EROFS":
            message = f"{where.strip() or 'the path'} can't be written: its volume is read-only for this step"
            return StepFailure(f"{message} (allot it with :rw)", code="read_only")
        case "EACCES" | "EPERM":
            return StepFailure(
                f"the step may not touch{where or ' a file'}: {error.strerror}", code="permission_denied"
            )
        case "ENOENT":
            return StepFailure(f"{where.strip() or 'a file'} does not exist", code="not_found")
        case "EIO":
            return StepFailure(
                f"the disk failed at{where or ' a file'}: {error.strerror}", code="io_error", temporary=True
            )
        case _:
            return StepFailure(
                f"{error.strerror or error}{':' if where else ''}{where}", code=name.lower() or "os_error"
            )


def free_bytes(path: Path) -> int:
    """How much can still be written at ``path`` (or its nearest parent that exists)."""
    while not path.exists() and path != path.parent:
        path = path.parent
    state = os.statvfs(path)
    return state.f_bavail * state.f_frsize


@contextmanager
def staged_file(target: str | os.PathLike[str], *, mode: int = 0o644) -> Iterator[BinaryIO]:
    """A file to write that appears at ``target`` when the block ends well, and not at all otherwise.

    Parents of ``target`` are made. An existing file is replaced at that instant; a directory there is refused.
    """
    path = Path(target)
    if path.is_dir() and not path.is_symlink():
        raise StepFailure(f"{path} is a directory; a file was to be written there", code="is_a_directory")
    _make_parents(path)
    _tidy(path.parent, path.name)
    stage = path.parent / _stage_name(path.name)
    descriptor = None
    try:
        # Within the try: a cancellation may come at any instant.
        with _naming(path):
            descriptor = os.open(stage, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Opened again by name for the sake of ``file.name``; the lock belongs to the first descriptor.
        with stage.open("r+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(stage, path)
        sync_directory(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            stage.unlink()
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def staged_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A directory to fill, on the volume of ``target``; removed when the block ends, with what is still in it.

    Move out of it what is to stay: ``sync_filesystem`` first, then one rename, or ``move_all`` where it takes several.
    Where ``target`` is the root of a volume there is no "beside it", so the stage lies inside.
    """
    path = Path(target)
    inside = is_mount(path)
    place = path if inside else path.parent
    if not inside:
        _make_parents(path)
    _tidy(place, path.name)
    stage = place / _stage_name(path.name)
    descriptor = None
    try:
        # Within the try: a cancellation may come at any instant.
        with _naming(path):
            stage.mkdir(mode=0o755)
        descriptor = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield stage
    finally:
        if descriptor is not None:
            os.close(descriptor)
        if not is_unfinished(stage):
            remove_tree(stage)


def recover(target: str | os.PathLike[str]) -> None:
    """Finish what a killed attempt had begun to publish at ``target``: for whoever looks at it before staging."""
    path = Path(target)
    place = path if is_mount(path) else path.parent
    if place.is_dir():
        _tidy(place, path.name, remove=False)


def is_mount(path: Path) -> bool:
    """Whether ``path`` is the root of a volume. To os.path.ismount, volumes of one disk look like one."""
    if os.path.ismount(path):
        return True
    real = os.path.realpath(path)
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        points = (line.split(" ")[4] for line in file)
        return any(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point) == real for point in points)


def sync_filesystem(path: Path) -> None:
    """Have everything written to the file system of ``path`` reach the disk: far cheaper than a sync of each file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(descriptor)


def swap(left: Path, right: Path) -> None:
    """Exchange two paths of one file system in a single instant (renameat2 with RENAME_EXCHANGE)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right), _RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(right))


def remove_tree(path: Path) -> None:
    """Remove a tree of ours whatever modes it was given: directories without write permission come out of archives."""

    def open_up(_function: object, name: str, error: BaseException) -> None:
        if isinstance(error, FileNotFoundError):
            return
        parent = Path(name).parent
        parent.chmod(0o700)
        entry = Path(name)
        if stat.S_ISDIR(entry.lstat().st_mode):
            entry.chmod(0o700)
            shutil.rmtree(entry)
        else:
            entry.unlink()

    shutil.rmtree(path, onerror=lambda function, name, info: open_up(function, name, info[1]))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors speak of ``path``: the stage's own name says nothing to anyone."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _make_parents(path: Path) -> None:
    try:
        with _naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise StepFailure(f"{path.parent} is a file; it would have to be a directory", code="not_a_directory") from None


def _stage_name(name: str) -> str:
    # A file's name has 255 bytes at most; the stage's must have room for its own part.
    return f"{STAGE_PREFIX}{_short(name)}.{os.urandom(6).hex()}"


def _short(name: str) -> str:
    return os.fsencode(name)[:120].decode("utf-8", "replace").replace("\ufffd", "_")


def _tidy(place: Path, name: str, *, remove: bool = True) -> None:
    """Finish what dead processes were about to publish, and remove what else they have left, if that is wanted."""
    prefix = f"{STAGE_PREFIX}{_short(name)}."
    with os.scandir(place) as found:
        ours = [entry.path for entry in found if entry.name.startswith(prefix) and "." not in entry.name[len(prefix) :]]
    for path in ours:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            continue  # somebody is at work on it
        try:
            _tidy_stage(Path(path), name, remove=remove)
        finally:
            os.close(descriptor)


def _tidy_stage(stage: Path, name: str, *, remove: bool) -> None:
    if is_unfinished(stage):
        remove = finish(stage, name)
    if not remove:
        return
    with contextlib.suppress(OSError):
        if stage.is_dir() and not stage.is_symlink():
            remove_tree(stage)
        else:
            stage.unlink()
