"""A file on its way into an object: read in ranges, and known to be the same from its opening to its end."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from outrider_stepkit import StepFailure

from s3_transfer.checks import Digest
from s3_transfer.transport import CHUNK_BYTES


@dataclass(slots=True)
class File:
    """A file to send, open. It is closed when nothing refers to it any more, which may be a thread left behind."""

    path: str
    key: str
    size: int
    stream: io.FileIO
    state: tuple[int, int, int]

    @classmethod
    def open(cls, path: str, key: str, size: int | None = None) -> File:
        """Open it. Raises StepFailure if it is no regular file, or not ``size`` bytes long."""
        # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            os.close(descriptor)
            raise StepFailure(f"{path} is not a file", code="not_a_file")
        file = cls(path, key, info.st_size, io.FileIO(descriptor), _state(info))
        if size is not None and info.st_size != size:
            raise file.changed()
        return file

    def pieces(self, offset: int, length: int, size: int = CHUNK_BYTES) -> Iterator[bytes]:
        """A range of it, ``size`` bytes at a time. Raises StepFailure if it became shorter."""
        position, end = offset, offset + length
        while position < end:
            chunk = os.pread(self.stream.fileno(), min(size, end - position), position)
            if not chunk:
                raise self.changed()
            yield chunk
            position += len(chunk)

    def digest(self, offset: int, length: int, *digests: Digest) -> None:
        """Feed a range of it to all of the digests."""
        for chunk in self.pieces(offset, length):
            for digest in digests:
                digest.update(chunk)

    def tag(self, part_bytes: int | None) -> str:
        """The tag that a store gives the object: its MD5, or that of its parts' with their number."""
        tags: list[bytes] = []
        step = part_bytes or max(self.size, 1)
        for offset in range(0, max(self.size, 1), step):
            md5 = hashlib.md5(usedforsecurity=False)
            self.digest(offset, min(step, self.size - offset), md5)
            tags.append(md5.digest())
        if part_bytes is None:
            return tags[0].hex()
        return f"{hashlib.md5(b''.join(tags), usedforsecurity=False).hexdigest()}-{len(tags)}"

    def unchanged(self) -> None:
        """Raise StepFailure if it was written to since it was opened: what was sent may be half old, half new."""
        if _state(os.fstat(self.stream.fileno())) != self.state:
            raise self.changed()

    def changed(self) -> StepFailure:
        return StepFailure(
            f"{self.path} was changed while it was being sent: stop what writes to it first", code="changed"
        )


def _state(info: os.stat_result) -> tuple[int, int, int]:
    return info.st_size, info.st_mtime_ns, info.st_ctime_ns
