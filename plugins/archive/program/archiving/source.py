"""What archive.create packs: found before the first byte is written, in a fixed order."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from outrider_stepkit import StepFailure
from outrider_stepkit.publish import STAGE_PREFIX

from archiving.names import check_link


@dataclass(frozen=True, slots=True)
class Item:
    """A directory, a file or a link to pack, under ``name`` (relative, with slashes)."""

    path: str
    name: str
    state: os.stat_result
    link: str | None = None

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.state.st_mode)


@dataclass(frozen=True, slots=True)
class Found:
    items: tuple[Item, ...]
    skipped: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(item.state.st_size for item in self.items if item.link is None and not item.is_directory)

    @property
    def files(self) -> int:
        return sum(1 for item in self.items if item.link is None and not item.is_directory)


def find(source: Path, archive: Path) -> Found:
    """All of ``source`` but the ``archive`` itself, stages, and what can't be packed: that is named in ``skipped``."""
    try:
        state = source.lstat()
    except (FileNotFoundError, NotADirectoryError):
        raise StepFailure(f"{source} does not exist, so there is nothing to pack", code="not_found") from None
    if stat.S_ISREG(state.st_mode):
        return Found((Item(str(source), source.name, state),), ())
    if not stat.S_ISDIR(state.st_mode):
        raise StepFailure(f"{source} is neither a directory nor a file", code="not_found")
    items: list[Item] = []
    skipped: list[str] = []
    own = _identity(archive)
    for item in _walk(str(source), "", skipped):
        if own is not None and (item.state.st_dev, item.state.st_ino) == own:
            continue
        items.append(item)
    return Found(tuple(items), tuple(skipped))


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        state = path.lstat()
    except OSError:
        return None
    return state.st_dev, state.st_ino


def _walk(directory: str, prefix: str, skipped: list[str]) -> Iterator[Item]:
    with os.scandir(directory) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        name = prefix + entry.name
        if entry.name.startswith(STAGE_PREFIX):
            continue
        try:
            state = entry.stat(follow_symlinks=False)
            if stat.S_ISLNK(state.st_mode):
                target = os.readlink(entry.path)
                check_link(name, tuple(name.split("/")), target)
                yield Item(entry.path, name, state, target)
            elif stat.S_ISREG(state.st_mode):
                yield Item(entry.path, name, state)
            elif stat.S_ISDIR(state.st_mode):
                yield Item(entry.path, name, state)
                yield from _walk(entry.path, f"{name}/", skipped)
            else:
                skipped.append(name)
        except StepFailure:
            skipped.append(name)  # the link leads out of the archive; archive.extract would refuse it
        except FileNotFoundError:
            continue  # a game at work removes files


class Exactly(io.RawIOBase):
    """Reads exactly ``size`` bytes of a file that may change meanwhile: cut where it grew, zeros where it shrank.

    The header in front of it has promised that many, as with GNU tar.
    """

    def __init__(self, path: str, size: int, on_bytes: Callable[[int], None]) -> None:
        self._file = open(path, "rb", buffering=0, opener=_regular)  # noqa: SIM115  (closed by close)
        self._size = size
        self._position = 0
        self._on_bytes = on_bytes
        self.changed = False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = 0) -> int:
        self._position = {0: 0, 1: self._position, 2: self._size}[whence] + position
        return self._file.seek(self._position)

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # narrower than any buffer
        wanted = min(len(buffer), self._size - self._position)
        if wanted <= 0:
            return 0
        data = self._file.read(wanted)
        if not data:
            self.changed = True
            data = bytes(wanted)
        buffer[: len(data)] = data
        self._position += len(data)
        self._on_bytes(len(data))
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _regular(path: str, flags: int) -> int:
    # It was a regular file when it was listed; what has taken its place since must neither block nor lead elsewhere.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
