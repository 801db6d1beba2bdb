"""Packing into a tar."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from archiving import tarhead
from archiving.frames import Writer
from archiving.source import Item, content
from archiving.tarhead import BLOCK

_ROOM = 1024 * 1024
_RECORD = 20 * BLOCK
_SMALL = 512 * 1024
_ZEROS = bytes(BLOCK)


class TarWriter:
    """Puts headers and contents side by side into one buffer, which goes on when it is full."""

    def __init__(self, target: Writer, on_bytes: Callable[[int], None]) -> None:
        self._target = target
        self._on_bytes = on_bytes
        self._buffer = memoryview(bytearray(_ROOM))
        self._used = 0
        self._written = 0

    def add(self, items: Iterable[Item]) -> None:
        for item in items:
            self._add(item)

    def finish(self) -> None:
        """The end mark: two blocks of zeros, and more up to a whole record, as every tar has it."""
        end = self._written + self._used + 2 * BLOCK
        self._put(bytes(2 * BLOCK + -end % _RECORD))
        self._flush()

    def _add(self, item: Item) -> None:
        mode = item.mode & 0o777
        if item.link is not None:
            self._put(tarhead.header(item.name, tarhead.SYMLINK, 0, mode, item.mtime, item.link))
        elif item.is_directory:
            self._put(tarhead.header(f"{item.name}/", tarhead.DIRECTORY, 0, mode, item.mtime))
        else:
            descriptor = item.open()
            if descriptor is None:
                print(f"{item.name} was removed while the archive was made; it is not in it")
                return
            try:
                self._put(tarhead.header(item.name, tarhead.REGULAR, item.size, mode, item.mtime))
                self._content(item, descriptor)
            finally:
                os.close(descriptor)

    def _content(self, item: Item, descriptor: int) -> None:
        size = item.size
        padded = size + -size % BLOCK
        if padded <= _SMALL:
            # The usual case: a small file in one go, straight into its place.
            if padded > _ROOM - self._used:
                self._flush()
            start, end = self._used, self._used + size
            if os.readv(descriptor, [self._buffer[start:end]]) == size:
                self._used += padded
                self._buffer[end : self._used] = _ZEROS[: padded - size]
                self._on_bytes(size)
                return
            os.lseek(descriptor, 0, os.SEEK_SET)
        for piece in content(item, descriptor, self._on_bytes, _ROOM):
            self._put(piece)
        self._put(_ZEROS[: padded - size])

    def _put(self, data: bytes) -> None:
        if len(data) > len(self._buffer) - self._used:
            self._flush()
            if len(data) >= len(self._buffer):
                self._target.write(data)
                self._written += len(data)
                return
        self._buffer[self._used : self._used + len(data)] = data
        self._used += len(data)

    def _flush(self) -> None:
        if self._used:
            self._target.write(self._buffer[: self._used])
            self._written += self._used
            self._used = 0
