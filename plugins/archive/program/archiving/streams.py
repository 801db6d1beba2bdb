"""Decompressed streams that know when they were cut off, and how much they have read."""

from __future__ import annotations

import io
import lzma
import zlib
from collections.abc import Callable
from typing import BinaryIO, Protocol

from backports import zstd

CHUNK = 256 * 1024
_LOOKBACK = 512
_MAX_READ = 16 * 1024**2
"""tarfile reads an extended header in one go, as long as it says it is. None of any use is near this."""


class Truncated(Exception):
    """The compressed data ends before its end mark."""


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """zlib's decompressor behind the interface that lzma and zstd have."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)  # gzip's frame, whose checksum and length zlib verifies

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail


def _xz() -> lzma.LZMADecompressor:
    # The dictionary's size stands in the file; xz itself writes 64 MiB at most.
    return lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=256 * 1024**2)


_KINDS: dict[str, tuple[Callable[[], _Decompressor], bytes]] = {
    "tar.gz": (_Gzip, b"\x1f\x8b"),
    "tar.xz": (_xz, b"\xfd7zXZ\x00"),
    "tar.zst": (zstd.ZstdDecompressor, b"\x28\xb5\x2f\xfd"),
}


class Decompressing:
    """``read`` for a compressed file, in bounded memory. Raises Truncated where it was cut off.

    Several frames in a row are one stream, as gzip, xz and zstd themselves have it; padding after the last is left
    alone.
    """

    def __init__(self, source: BinaryIO, kind: str) -> None:
        self._source = source
        self._new, self._magic = _KINDS[kind]
        self._current = self._new()
        self._started = False  # a frame has begun and not ended
        self._over = False

    def read(self, size: int) -> bytes:
        while not self._over:
            data, exhausted = b"", False
            if getattr(self._current, "needs_input", True) or not self._started:
                data = self._source.read(CHUNK)
                exhausted = not data
            self._started = True
            produced = self._current.decompress(data, size)
            # Only a source that was asked can be at its end: a decoder may have held back nothing but a block's mark.
            if exhausted and not produced and not self._current.eof:
                raise Truncated
            if self._current.eof:
                self._next_frame()
            if produced:
                return produced
        return b""

    def _next_frame(self) -> None:
        rest = self._current.unused_data
        if len(rest) < len(self._magic):
            rest += self._source.read(len(self._magic) - len(rest))
        if not rest.startswith(self._magic):
            self._over = True
            return
        self._source.seek(-len(rest), io.SEEK_CUR)
        self._current, self._started = self._new(), False


class Forward:
    """What tarfile needs of a file, over a stream that only goes forward.

    tarfile's own stream mode would take whatever an archive says about the length of a header, and would not tell a
    cut-off archive from a complete one.
    """

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._tail = b""  # the last bytes before _end: tarfile steps back by one to see whether data was complete
        self._end = 0
        self._position = 0

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = 0) -> int:
        if whence != 0 or position < self._end - len(self._tail):
            raise io.UnsupportedOperation("this stream goes forward only")
        while self._end < position and self._more(min(position - self._end, CHUNK)):
            pass
        self._position = min(position, self._end)
        return self._position

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_READ:
            raise Truncated(f"it has a header of {size} bytes")
        pieces = []
        if self._position < self._end:
            start = len(self._tail) - (self._end - self._position)
            pieces.append(self._tail[start : start + size])
            size -= len(pieces[0])
        while size > 0:
            data = self._more(min(size, CHUNK))
            if not data:
                break
            pieces.append(data)
            size -= len(data)
        result = b"".join(pieces)
        self._position += len(result)
        return result

    def _more(self, size: int) -> bytes:
        data = self._read(size)
        self._end += len(data)
        self._tail = (self._tail + data)[-_LOOKBACK:] if len(data) < _LOOKBACK else data[-_LOOKBACK:]
        return data


class Counting(io.RawIOBase):
    """A file that tells how far it was read."""

    def __init__(self, source: BinaryIO, on_position: Callable[[int], None]) -> None:
        self._source = source
        self._on_position = on_position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = 0) -> int:
        return self._source.seek(position, whence)

    def tell(self) -> int:
        return self._source.tell()

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # narrower than any buffer
        data = self._source.read(len(buffer))
        buffer[: len(data)] = data
        self._on_position(self._source.tell())
        return len(data)
