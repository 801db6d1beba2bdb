"""What has been fetched and not yet published: a file beside its target, which the next attempt goes on with.

A note beside it says what the bytes are of, which of them are missing, and in which boot of the machine they were
written. It is written without syncing: it outlives the process, which is what gets killed. After a reboot it is not
believed, because it may then know of bytes that never reached the disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from outrider_stepkit import StepFailure
from outrider_stepkit.publish import STAGE_PREFIX, sync_directory

_MAX_NOTE_BYTES = 1024**2
_MAX_NAME_BYTES = 120
_SYNC_FILE_RANGE_WRITE = 2


def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """sync_file_range(2), where there is one: it only hastens, so whether it did is not asked."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


_SYNC_FILE_RANGE = _sync_file_range()


@dataclass(frozen=True, slots=True)
class Note:
    """What a partial file is of."""

    of: str
    """What was asked for, or what it has to be: see `download`."""
    validator: str
    etag: str | None
    total: int
    missing: list[tuple[int, int]]
    boot: str


class Partial:
    """A file that is being fetched. ``descriptor`` is open for reading and writing at any offset."""

    def __init__(self, path: Path, target: Path, descriptor: int) -> None:
        self._path, self.target, self.descriptor = path, target, descriptor
        self._note = path.with_name(path.name + "-note")
        self._boot = _boot_id()
        self.published = False

    def known(self, of: str) -> Note | None:
        """What a former attempt left, if it is of the same thing and can be believed."""
        try:
            with self._note.open("rb") as file:
                value = json.loads(file.read(_MAX_NOTE_BYTES))
            note = Note(**value)
            missing = [(int(start), int(end)) for start, end in note.missing]
            there = os.fstat(self.descriptor).st_size
        except (OSError, ValueError, TypeError):
            return None
        ordered = all(0 <= start < end <= note.total for start, end in missing) and missing == sorted(missing)
        # The bytes before the last gap have to be in the file, and all of them if it has none at its end.
        written = missing[-1][0] if missing and missing[-1][1] == note.total else note.total
        if note.of != of or note.boot != self._boot or not note.validator or not ordered or there < written:
            return None
        return Note(note.of, note.validator, note.etag, note.total, missing, note.boot)

    def note(self, of: str, validator: str, etag: str | None, total: int, missing: list[tuple[int, int]]) -> None:
        """Write down how far it is. What it says is missing may be there already, never the other way round."""
        text = json.dumps(asdict(Note(of, validator, etag, total, missing, self._boot)))
        draft = self._note.with_name(f"{self._note.name}-new")
        draft.write_text(text)
        os.replace(draft, self._note)

    def forget(self) -> None:
        """Start over: nothing is there."""
        with contextlib.suppress(FileNotFoundError):
            self._note.unlink()
        os.ftruncate(self.descriptor, 0)

    def write_out(self, start: int, end: int) -> None:
        """Have the disk begin to write these bytes, without waiting for it: less is left to wait for in `publish`."""
        if _SYNC_FILE_RANGE is not None:
            _SYNC_FILE_RANGE(self.descriptor, start, end - start, _SYNC_FILE_RANGE_WRITE)

    def publish(self, size: int) -> None:
        """Have the bytes reach the disk, and put the file in its target's place, at one instant."""
        os.ftruncate(self.descriptor, size)
        os.fsync(self.descriptor)
        with contextlib.suppress(FileNotFoundError):
            self._note.unlink()
        os.replace(self._path, self.target)
        self.published = True
        sync_directory(self.target.parent)

    def remove(self) -> None:
        """Nobody will go on with it."""
        for path in (self._note, self._path):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


@contextmanager
def partial_file(target: Path) -> Iterator[Partial]:
    """The partial file of ``target``. Its directory is made if it is missing.

    It goes when the block ends without having published it, unless that is by a temporary failure: then it stays for
    the next attempt, as it does when the process is killed. Where another process works on it, this one gets its own.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise StepFailure(
            f"{target.parent} is a file; it would have to be a directory", code="not_a_directory"
        ) from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
    # Where the step kit's stages are called alike, whoever writes to the same target removes what is left of this.
    name = os.fsencode(target.name)[:_MAX_NAME_BYTES].decode("utf-8", "replace").replace("\ufffd", "_")
    partial: Partial | None = None
    keep = False
    try:
        partial = _opened(target.with_name(f"{STAGE_PREFIX}{name}.resume"), target)
        yield partial
    except StepFailure as failure:
        keep = failure.temporary
        raise
    finally:
        if partial is not None:
            if not keep and not partial.published:
                partial.remove()
            os.close(partial.descriptor)


def _opened(path: Path, target: Path) -> Partial:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Published or removed by whoever had it, between the two calls?
        same = os.path.samestat(os.fstat(descriptor), path.lstat())
    except (BlockingIOError, FileNotFoundError):
        same = False
    if same:
        return Partial(path, target, descriptor)
    os.close(descriptor)
    return _opened(path.with_name(f"{path.name.rpartition('.')[0]}.{secrets.token_hex(6)}"), target)


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return secrets.token_hex(8)  # never the same again: what was left is not believed
