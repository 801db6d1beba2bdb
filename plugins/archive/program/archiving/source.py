"""What archive.create packs: found in a fixed order, each opened beneath the folder before it, no link followed."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from outrider_stepkit import StepFailure
from outrider_stepkit.publish import STAGE_PREFIX

from archiving.choose import Patterns
from archiving.names import MAX_DEPTH, check_link, shown

_KEPT = 100_000
"""So many entries take some 30 MB; more are looked for twice."""
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# It was a regular file when it was listed; what has taken its place since must neither block nor lead elsewhere.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(slots=True)
class Item:
    """A directory, a file or a link to pack, under ``name`` (relative, with slashes).

    ``folder`` is a descriptor of the directory that it lies in, good until the next item; -1 if that has gone.
    ``mtime`` is in whole seconds, ``size`` in bytes.
    """

    name: str
    folder: int
    mode: int
    size: int
    mtime: int
    link: str | None = None

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    def open(self) -> int | None:
        """A descriptor of the file; None where it has gone, or has become something else, since it was listed."""
        if self.folder < 0:
            return None
        try:
            descriptor = os.open(self.name.rpartition("/")[2], _FILE, dir_fd=self.folder)
        except OSError as error:
            if isinstance(error, PermissionError):
                raise OSError(error.errno, error.strerror, self.name) from None
            return None
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        return None


@dataclass(slots=True)
class Tally:
    """What was found: counted twice, once to tell the progress and once when it is packed."""

    entries: int = 0
    files: int = 0
    bytes: int = 0
    skipped: int = 0
    names: list[str] = field(default_factory=list)  # the first of those that were skipped

    def skip(self, name: str) -> None:
        self.skipped += 1
        if len(self.names) < 20:
            self.names.append(name)


class Finder:
    """Walks ``source``, without the archive itself, stages, and what ``patterns`` leave out.

    ``symlinks`` is "refuse", "skip" or "keep". What can't be packed (sockets, devices, pipes, links that lead out) is
    counted in the tally as skipped. With ``mtime`` every entry has that time.
    """

    def __init__(
        self, source: Path, target: Path, patterns: Patterns, symlinks: str = "refuse", mtime: int | None = None
    ) -> None:
        self._source = source
        self._patterns = patterns
        self._symlinks = symlinks
        self._mtime = mtime
        self._known: tuple[list[Item], Tally] | None = None
        self._own = (target.parent.resolve(), target.name)
        try:
            state = source.lstat()
        except (FileNotFoundError, NotADirectoryError):
            raise StepFailure(f"{source} does not exist, so there is nothing to pack", code="not_found") from None
        if not stat.S_ISREG(state.st_mode) and not stat.S_ISDIR(state.st_mode):
            raise StepFailure(f"{source} is neither a directory nor a file", code="not_found")
        self.is_file = stat.S_ISREG(state.st_mode)

    def count(self) -> Tally:
        """How much there is. What was found is kept for ``items``, unless it is very much."""
        tally = Tally()
        kept: list[Item] = []
        for item in self._fresh(tally):
            if len(kept) < _KEPT:
                kept.append(item)
        if tally.entries <= _KEPT:
            self._known = (kept, tally)
        return tally

    def items(self, tally: Tally) -> Iterator[Item]:
        """Everything, sorted by name within each directory, a directory before what is in it."""
        if self._known is None:
            yield from self._fresh(tally)
            return
        kept, counted = self._known
        tally.entries, tally.files, tally.bytes = counted.entries, counted.files, counted.bytes
        tally.skipped = counted.skipped
        yield from self._again(kept)

    def _again(self, kept: list[Item]) -> Iterator[Item]:
        """``kept`` with their folders opened anew. What lies in one that has gone is left without."""
        where = self._source.parent if self.is_file else self._source
        folders = [("", os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))]
        try:
            for item in kept:
                prefix = item.name[: item.name.rfind("/") + 1]
                while len(folders) > 1 and folders[-1][0] != prefix and not prefix.startswith(folders[-1][0]):
                    os.close(folders.pop()[1])
                while folders[-1][0] != prefix:
                    # A folder that is not an item itself (left out by a pattern) is opened all the same.
                    below = prefix[len(folders[-1][0]) :].split("/", 1)[0]
                    try:
                        descriptor = os.open(below, _FOLDER, dir_fd=folders[-1][1])
                    except OSError:
                        break
                    folders.append((f"{folders[-1][0]}{below}/", descriptor))
                item.folder = folders[-1][1] if folders[-1][0] == prefix else -1
                yield item
        finally:
            for _, descriptor in folders:
                os.close(descriptor)

    def _fresh(self, tally: Tally) -> Iterator[Item]:
        with contextlib.ExitStack() as stack:
            where = self._source.parent if self.is_file else self._source
            top = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, top)
            if self.is_file:
                state = os.stat(self._source.name, dir_fd=top, follow_symlinks=False)
                found: Iterator[Item] = iter((self._item(self._source.name, top, state),))
            else:
                found = self._walk(top, "", str(where.resolve()), 0, tally)
            for item in found:
                tally.entries += 1
                if item.is_file:
                    tally.files += 1
                    tally.bytes += item.size
                yield item

    def _item(self, name: str, folder: int, state: os.stat_result, link: str | None = None) -> Item:
        mtime = int(state.st_mtime) if self._mtime is None else self._mtime
        return Item(name, folder, state.st_mode, state.st_size, mtime, link)

    def _walk(self, folder: int, prefix: str, path: str, depth: int, tally: Tally) -> Iterator[Item]:
        with os.scandir(folder) as listed:
            names = sorted(entry.name for entry in listed)
        everything = self._patterns.all
        ours = self._own[1] if path == str(self._own[0]) else None
        for last in names:
            name = prefix + last
            if last.startswith(STAGE_PREFIX) or (ours is not None and _is_archive(last, ours)):
                continue
            if not everything and self._patterns.leaves_out(name):
                continue
            try:
                state = os.stat(last, dir_fd=folder, follow_symlinks=False)
                if stat.S_ISDIR(state.st_mode):
                    yield from self._folder(folder, last, name, path, depth, state, tally)
                elif not everything and not self._patterns.take(name):
                    continue
                elif stat.S_ISREG(state.st_mode):
                    yield self._item(name, folder, state)
                elif stat.S_ISLNK(state.st_mode):
                    target = self._link(name, os.readlink(last, dir_fd=folder))
                    if target is None:
                        tally.skip(name)
                    else:
                        yield self._item(name, folder, state, target)
                else:
                    tally.skip(name)
            except FileNotFoundError:
                continue  # a game at work removes files

    def _folder(
        self, folder: int, last: str, name: str, path: str, depth: int, state: os.stat_result, tally: Tally
    ) -> Iterator[Item]:
        if depth >= MAX_DEPTH:
            raise StepFailure(f"{shown(name)} lies more than {MAX_DEPTH} folders deep in {self._source}", code="deep")
        try:
            below = os.open(last, _FOLDER, dir_fd=folder)
        except NotADirectoryError:
            return  # it was one a moment ago
        try:
            if self._patterns.take(name):
                yield self._item(name, folder, state)
            yield from self._walk(below, f"{name}/", f"{path}/{last}", depth + 1, tally)
        finally:
            os.close(below)

    def _link(self, name: str, target: str) -> str | None:
        """The target to pack; None for a link that is left out."""
        if self._symlinks == "refuse":
            raise StepFailure(
                f"{self._source} has the symbolic link {shown(name)} to {shown(target)}: say symlinks: keep to pack"
                " links that stay inside, or symlinks: skip to leave them out",
                code="symlink",
            )
        if self._symlinks == "skip":
            return None
        try:
            check_link(name, tuple(name.split("/")), target)
        except StepFailure:
            return None  # it leads out; archive.extract would refuse it
        return target


def _is_archive(name: str, archive: str) -> bool:
    """Whether it is the archive that is made, or a volume of it."""
    return name == archive or (name.startswith(f"{archive}.") and name[len(archive) + 1 :].isdigit())


def content(item: Item, descriptor: int, on_bytes: Callable[[int], None], size: int) -> Iterator[bytes]:
    """Exactly ``item.size`` bytes of a file that may change meanwhile, in pieces of ``size``.

    It is cut where it grew and filled with zeros where it shrank: the header in front of it has promised that many,
    as with GNU tar.
    """
    left = item.size
    while left:
        piece = os.read(descriptor, min(size, left))
        if not piece:
            print(f"{item.name} became shorter while the archive was made; its end in the archive is zeros")
            while left:
                piece = bytes(min(size, left))
                left -= len(piece)
                yield piece
            return
        left -= len(piece)
        on_bytes(len(piece))
        yield piece
