"""Decoding a 7z with py7zr, where there is no 7zz. What is written, and where, was decided before."""

from __future__ import annotations

import io
from typing import Any, BinaryIO, cast

from py7zr.io import MemIO, Py7zIO, WriterFactory

from archiving.formats import to_disk
from archiving.sevenread import MAX_LINK_BYTES, Entry
from archiving.streams import Truncated
from archiving.tree import Sink, Tree
from archiving.volumes import Source


def decode(archive: Any, source: Source, entries: list[Entry], tree: Tree) -> None:
    """Unpack ``entries`` of py7zr's ``archive`` (Any: it exports no type for its worker)."""
    writers: dict[str, Entry] = {}
    factory = _Writers(tree, writers)
    for entry in entries:
        if entry.parts is None:
            tree.passed_over(entry.size)
        elif entry.kind == "directory":
            with to_disk():
                tree.directory(entry.name, entry.parts, entry.mode, entry.mtime)
        else:
            # By number: py7zr would change names and give the second of two equal ones another.
            number = entry.member.id
            writers[str(number)] = entry
            archive.worker.register_filelike(number, MemIO(str(number), factory))
    archive.worker.extract(cast("BinaryIO", source), None, parallel=False)


class _Writers(WriterFactory):
    """Makes each file when py7zr comes to it, so that only one is open at a time."""

    def __init__(self, tree: Tree, entries: dict[str, Entry]) -> None:
        self._tree = tree
        self._entries = entries

    def create(self, filename: str) -> Py7zIO:
        entry = self._entries[filename]
        if entry.kind == "link":
            return _LinkWriter(self._tree, entry)
        assert entry.parts is not None
        with to_disk():
            sink = self._tree.file(entry.name, entry.parts, entry.mode, entry.mtime, entry.size)
        return _Writer(sink, entry.size)


class _Writer(Py7zIO):
    """A file of the archive on its way into the tree."""

    def __init__(self, sink: Sink, size: int) -> None:
        self._sink = sink
        self._left = size

    def write(self, data: bytes | bytearray) -> int:
        self._left -= len(data)
        if self._left < 0:
            raise Truncated("it has a file that is longer than its headers say")
        with to_disk():
            self._sink.write(data)
        return len(data)

    def read(self, size: int | None = None) -> bytes:
        raise io.UnsupportedOperation("write only")

    def seek(self, offset: int, whence: int = 0) -> int:
        raise io.UnsupportedOperation("write only")

    def seekable(self) -> bool:
        return False

    def flush(self) -> None:
        pass

    def size(self) -> int:
        raise io.UnsupportedOperation("write only")

    def close(self) -> None:
        with to_disk():
            self._sink.close()


class _LinkWriter(_Writer):
    """A link of the archive: its content is its target, known when all of it has come."""

    def __init__(self, tree: Tree, entry: Entry) -> None:
        self._tree = tree
        self._entry = entry
        self._target = b""

    def write(self, data: bytes | bytearray) -> int:
        self._target += data
        if len(self._target) > MAX_LINK_BYTES:
            raise Truncated("it has a link with an endless target")
        return len(data)

    def close(self) -> None:
        assert self._entry.parts is not None
        with to_disk():
            self._tree.symlink(self._entry.name, self._entry.parts, self._target.decode("utf-8", "surrogateescape"))
