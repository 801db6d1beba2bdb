"""Packing into a zip, from front to back, deflated on several cores.

The layout is that of PKWARE's APPNOTE 6.3.10, with zip64 where a number needs it. A file that is compressed in several
pieces has its sizes behind it (a data descriptor), so that nothing is ever written twice.
"""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from isal import isal_zlib
from outrider_stepkit import StepFailure

from archiving.frames import Writer, cores
from archiving.source import Item, content

_PIECE = 1024 * 1024
_STORED, _DEFLATED = 0, 8
_UTF8, _DESCRIPTOR = 0x800, 0x8
_LIMIT = 0xFFFFFFFF
_BIG = 0xF0000000
"""A file of this size gets zip64 fields, although its compressed size is not known yet."""


@dataclass(slots=True)
class _Record:
    """What the directory at the end says about an entry."""

    name: bytes
    flags: int
    method: int
    when: int
    checksum: int
    packed: int
    size: int
    attributes: int
    offset: int


class ZipWriter:
    """``add`` items, then ``finish``; ``close`` in any case.

    A zip has the local time of where it was made; with ``utc`` it is the same wherever that is.
    """

    def __init__(self, target: Writer, level: int, on_bytes: Callable[[int], None], *, utc: bool = False) -> None:
        self._target = target
        self._level = level
        self._on_bytes = on_bytes
        self._clock = time.gmtime if utc else time.localtime
        self._pool = ThreadPoolExecutor(cores())
        self._ahead = cores() + 1
        self._waiting: deque[tuple[_Record, Future[tuple[int, bytes]]]] = deque()
        self._records: list[_Record] = []
        self._offset = 0

    def add(self, items: Iterable[Item]) -> None:
        for item in items:
            self._add(item)

    def finish(self) -> None:
        self._drain(0)
        self._directory()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _add(self, item: Item) -> None:
        name = item.name + ("/" if item.is_directory else "")
        raw = name.encode("utf-8", "surrogateescape")
        attributes = item.mode << 16 | (0x10 if item.is_directory else 0)
        record = _Record(raw, _UTF8, _STORED, _when(self._clock(item.mtime)), 0, 0, 0, attributes, 0)
        if item.is_directory:
            self._soon(record, b"", stored=True)
        elif item.link is not None:
            self._soon(record, item.link.encode("utf-8", "surrogateescape"), stored=True)
        else:
            descriptor = item.open()
            if descriptor is None:
                print(f"{item.name} was removed while the archive was made; it is not in it")
                return
            try:
                if item.size <= _PIECE:
                    data = b"".join(content(item, descriptor, self._on_bytes, _PIECE))
                    self._soon(record, data, stored=self._level == 0 or not data)
                else:
                    self._large(record, item, descriptor)
            finally:
                os.close(descriptor)

    def _soon(self, record: _Record, data: bytes, *, stored: bool) -> None:
        """An entry in one piece: compressed in another thread, written when its turn comes."""
        record.size = len(data)
        record.method = _STORED if stored else _DEFLATED
        self._waiting.append((record, self._pool.submit(self._whole, data, stored)))
        self._drain(self._ahead * 8)

    def _whole(self, data: bytes, stored: bool) -> tuple[int, bytes]:
        return zlib.crc32(data), data if stored else deflated(data, self._level, last=True)

    def _drain(self, left: int) -> None:
        while len(self._waiting) > left:
            record, future = self._waiting.popleft()
            record.checksum, data = future.result()
            record.packed = len(data)
            self._begin(record)
            self._write(data)

    def _large(self, record: _Record, item: Item, descriptor: int) -> None:
        """An entry in several pieces: each ends on a whole byte, so that they make one deflated stream in a row."""
        self._drain(0)
        record.method, record.flags = _STORED if self._level == 0 else _DEFLATED, _UTF8 | _DESCRIPTOR
        zip64 = item.size >= _BIG
        if record.method == _STORED:
            # Without an end mark of its own, stored content must have its size in front.
            record.flags = _UTF8
            record.checksum, record.packed, record.size = _checksum(descriptor, item.size), item.size, item.size
            os.lseek(descriptor, 0, os.SEEK_SET)
        self._begin(record, zip64=zip64)
        start, checksum = self._offset, 0
        ahead: deque[Future[bytes]] = deque()
        left = item.size
        for piece in _even(content(item, descriptor, self._on_bytes, _PIECE)):
            left -= len(piece)
            checksum = zlib.crc32(piece, checksum)
            if record.method == _STORED:
                self._write(piece)
                continue
            ahead.append(self._pool.submit(deflated, piece, self._level, last=left == 0))
            while len(ahead) > self._ahead:
                self._write(ahead.popleft().result())
        while ahead:
            self._write(ahead.popleft().result())
        if record.method == _STORED:
            if checksum != record.checksum:
                raise StepFailure(
                    f"{item.name} was changed while the archive was made: try again, or choose a level above 0",
                    code="changed",
                    temporary=True,
                )
            return
        record.checksum, record.packed, record.size = checksum, self._offset - start, item.size
        numbers = "<4sLQQ" if zip64 else "<4sLLL"
        self._write(struct.pack(numbers, b"PK\x07\x08", checksum, record.packed, record.size))

    def _begin(self, record: _Record, *, zip64: bool = False) -> None:
        record.offset = self._offset
        late = record.flags & _DESCRIPTOR
        checksum, packed, size = (0, 0, 0) if late else (record.checksum, record.packed, record.size)
        extra = b""
        if zip64:
            extra = struct.pack("<HHQQ", 1, 16, size, packed)
            packed = size = _LIMIT
        version = 45 if zip64 else 20
        head = struct.pack(
            "<4sHHHLLLLHH",
            b"PK\x03\x04",
            version,
            record.flags,
            record.method,
            record.when,
            checksum,
            packed,
            size,
            len(record.name),
            len(extra),
        )
        self._write(head + record.name + extra)
        self._records.append(record)

    def _directory(self) -> None:
        start = self._offset
        for record in self._records:
            extra = b""
            numbers = []
            for value in (record.size, record.packed, record.offset):
                if value >= _LIMIT:
                    extra += struct.pack("<Q", value)
                numbers.append(min(value, _LIMIT))
            if extra:
                extra = struct.pack("<HH", 1, len(extra)) + extra
            version = 45 if extra else 20
            head = struct.pack(
                "<4sHHHHLLLLHHHHHLL",
                b"PK\x01\x02",
                3 << 8 | version,  # made on Unix: the mode in the attributes counts
                version,
                record.flags,
                record.method,
                record.when,
                record.checksum,
                numbers[1],
                numbers[0],
                len(record.name),
                len(extra),
                0,
                0,
                0,
                record.attributes,
                numbers[2],
            )
            self._write(head + record.name + extra)
        self._end(start, self._offset - start, len(self._records))

    def _end(self, start: int, size: int, count: int) -> None:
        if start >= _LIMIT or size >= _LIMIT or count >= 0xFFFF:
            where = self._offset
            self._write(
                struct.pack("<4sQHHLLQQQQ", b"PK\x06\x06", 44, 3 << 8 | 45, 45, 0, 0, count, count, size, start)
            )
            self._write(struct.pack("<4sLQL", b"PK\x06\x07", 0, where, 1))
        many = min(count, 0xFFFF)
        self._write(
            struct.pack("<4sHHHHLLH", b"PK\x05\x06", 0, 0, many, many, min(size, _LIMIT), min(start, _LIMIT), 0)
        )

    def _write(self, data: bytes) -> None:
        self._target.write(data)
        self._offset += len(data)


def deflated(data: bytes, level: int, *, last: bool) -> bytes:
    """``data`` as a raw deflate stream, or, if it is not the ``last``, as a part of one that ends on a whole byte.

    Up to level 3 isa-l compresses, at several times the speed of zlib.
    """
    if level <= 3:
        fast = isal_zlib.compressobj(level, isal_zlib.DEFLATED, -15)
        mode = isal_zlib.Z_FINISH if last else isal_zlib.Z_FULL_FLUSH
        return bytes(fast.compress(data) + fast.flush(mode))
    inner = zlib.compressobj(level, zlib.DEFLATED, -15)
    return inner.compress(data) + inner.flush(zlib.Z_FINISH if last else zlib.Z_FULL_FLUSH)


def _even(pieces: Iterable[bytes]) -> Iterable[bytes]:
    """The same in pieces of _PIECE bytes: a read may give less, and the result is to be the same each time."""
    rest = b""
    for piece in pieces:
        rest += piece
        while len(rest) >= _PIECE:
            yield rest[:_PIECE]
            rest = rest[_PIECE:]
    if rest:
        yield rest


def _checksum(descriptor: int, size: int) -> int:
    checksum, left = 0, size
    while left and (data := os.read(descriptor, min(_PIECE, left))):
        checksum = zlib.crc32(data, checksum)
        left -= len(data)
    while left:
        data = bytes(min(_PIECE, left))
        checksum = zlib.crc32(data, checksum)
        left -= len(data)
    return checksum


def _when(moment: time.struct_time) -> int:
    """Time and date as zip has them: two seconds apart, from 1980 to 2107."""
    year, month, day, hour, minute, second = moment[:6]
    if year < 1980:
        return 1 << 21 | 1 << 16
    if year > 2107:
        year, month, day, hour, minute, second = 2107, 12, 31, 23, 59, 59
    return (year - 1980) << 25 | month << 21 | day << 16 | hour << 11 | minute << 5 | second // 2
