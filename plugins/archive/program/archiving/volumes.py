"""Archives in several volumes: ``name.001``, ``name.002``… which are one file, cut into pieces."""

from __future__ import annotations

import io
import os
import re
import stat
from contextlib import ExitStack
from pathlib import Path

from outrider_stepkit import StepFailure
from outrider_stepkit.publish import move_all, sync_directory

FIRST = re.compile(r"(.+)\.0*1$")
MAX_VOLUMES = 9999
_PIECE = 1024 * 1024
Buffer = bytes | bytearray | memoryview


def base_of(path: str) -> str:
    """The name without the number of a first volume: ``a.7z.001`` is an ``a.7z``."""
    match = FIRST.fullmatch(path)
    return match[1] if match else path


def volumes_of(path: str) -> list[str]:
    """``path`` itself, or, where it is a first volume (``x.001``), it and those that follow it without a gap."""
    match = FIRST.fullmatch(path)
    if match is None:
        return [path]
    digits = len(path) - len(match[1]) - 1
    found = [path]
    while len(found) < MAX_VOLUMES:
        name = f"{match[1]}.{len(found) + 1:0{digits}}"
        if not os.path.lexists(name):
            break
        found.append(name)
    return found


def open_regular(path: str) -> int:
    """A descriptor of a regular file to read. A pipe or device in its place would block or never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise StepFailure(f"the archive {path} does not exist", code="not_found") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise StepFailure(f"{path} is {kind}; an archive was expected", code="not_a_file")
    return descriptor


class Source(io.RawIOBase):
    """The bytes of an archive, whole or in volumes, as one file that can be read and sought in.

    ``size`` is the sum of the volumes in bytes. ``paths`` are the volumes.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.paths = volumes_of(path)
        self._open = ExitStack()
        self._parts: list[tuple[int, int, int]] = []  # where a volume starts and ends, and its descriptor
        self._position = 0
        self._part = 0
        start = 0
        try:
            for name in self.paths:
                descriptor = open_regular(name)
                self._open.callback(os.close, descriptor)
                end = start + os.fstat(descriptor).st_size
                self._parts.append((start, end, descriptor))
                start = end
        except BaseException:
            self._open.close()
            raise
        self.size = start

    @property
    def single(self) -> int | None:
        """The descriptor, where the archive is one file."""
        return self._parts[0][2] if len(self._parts) == 1 else None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = 0) -> int:
        wanted = {0: 0, 1: self._position, 2: self.size}[whence] + position
        if wanted < 0:
            raise ValueError("a position before the beginning")
        self._position = wanted
        return wanted

    def read(self, size: int = -1) -> bytes:
        """Up to ``size`` bytes, never None: these are regular files."""
        return super().read(size) or b""

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # narrower than any buffer
        if self._position >= self.size or not len(buffer):
            return 0
        start, end, descriptor = self._parts[self._part]
        while not start <= self._position < end:
            self._part = (self._part + 1) % len(self._parts)
            start, end, descriptor = self._parts[self._part]
        view = memoryview(buffer)[: end - self._position]
        size = os.preadv(descriptor, [view], self._position - start)
        self._position += size
        return size

    def close(self) -> None:
        self._open.close()
        super().close()


class Output:
    """An archive while it is written: one file, or volumes of ``volume_bytes`` each, in the directory ``stage``.

    Counts ``size`` and hashes on the way. ``publish`` renames what was written to ``target``, or ``target.001``….
    """

    def __init__(self, stage: Path, target: Path, volume_bytes: int | None = None) -> None:
        import hashlib  # OpenSSL takes a while, and who unpacks needs none of it

        self.size = 0
        self._stage = stage
        self._target = target
        self._volume_bytes = volume_bytes
        self._digest = hashlib.sha256()
        self._files: list[Path] = []
        self._descriptor = -1
        self._left = 0

    @property
    def sha256(self) -> str:
        """Of everything written; for volumes, of all of them in a row."""
        return self._digest.hexdigest()

    @property
    def volumes(self) -> int:
        return len(self._files)

    def write(self, data: Buffer) -> int:
        view = memoryview(data)
        self._digest.update(view)
        self.size += len(view)
        whole = len(view)
        while view:
            if self._descriptor < 0 or (self._volume_bytes is not None and self._left == 0):
                self._next()
            piece = view if self._volume_bytes is None else view[: self._left]
            done = os.write(self._descriptor, piece)
            self._left -= done
            view = view[done:]
        return whole

    def adopt(self, made: Path) -> None:
        """Take the whole file ``made``, which lies in the stage, as what is to be written."""
        with made.open("rb", buffering=0) as file:
            if self._volume_bytes is None:
                os.fsync(file.fileno())
                while data := file.read(_PIECE):
                    self._digest.update(data)
                    self.size += len(data)
                self._files.append(made)
                return
            while data := file.read(_PIECE):
                self.write(data)
        made.unlink()

    def finish(self) -> None:
        """All of it is on the disk afterwards."""
        if not self._files:
            self._next()
        self._end_file()

    def publish(self) -> None:
        """Put it in place. The first volume comes last: it is the one by which an archive is opened.

        Volumes of an archive that was there before make room first, so that a mixture of both never looks whole.
        """
        if self._volume_bytes is None:
            os.replace(self._files[0], self._target)
            sync_directory(self._target.parent)
            return
        moves = [(file.name, f"{self._target.name}.{number:03}") for number, file in enumerate(self._files, 1)]
        former = []
        for number in range(1, MAX_VOLUMES + 1):
            name = f"{self._target.name}.{number:03}"
            there = self._target.with_name(name)
            if os.path.lexists(there) and (there.is_symlink() or not there.is_dir()):
                former.append(name)
            elif number > len(moves):
                break
        move_all(self._stage, self._target.parent, reversed(moves), former=former)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _next(self) -> None:
        if self._descriptor >= 0:
            self._end_file()
        if len(self._files) == MAX_VOLUMES:
            raise StepFailure(
                f"the archive would have more than {MAX_VOLUMES} volumes: raise volume_size", code="too_many_volumes"
            )
        path = self._stage / f"{len(self._files) + 1:04}"
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._files.append(path)
        self._left = self._volume_bytes or 0

    def _end_file(self) -> None:
        if self._descriptor >= 0:
            os.fsync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
