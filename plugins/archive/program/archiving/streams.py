"""Decompression: a stream that knows when it was cut off, and a thread that is ahead of whoever reads it."""

from __future__ import annotations

import bz2
import lzma
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Protocol

from backports import zstd
from isal import igzip_lib

from archiving.names import shown

CHUNK = 512 * 1024
_AHEAD = 4
"""Pieces that are decompressed before they are asked for."""
_XZ_MEMORY = 256 * 1024**2
"""What a dictionary of xz may take; its size stands in the file, and xz itself writes 64 MiB at most."""
ISAL_ERROR: type[Exception] = igzip_lib.error  # type: ignore[assignment]  # its stub has an instance there
BROKEN = (zlib.error, ISAL_ERROR, lzma.LZMAError, zstd.ZstdError, OSError, ValueError, EOFError)
"""What the decoders raise about data that is not theirs."""


class Truncated(Exception):
    """The compressed data ends before its end mark."""


class Undecodable(Exception):
    """The compressed data is damaged. ``str()`` of it is the decoder's reason."""


class Raw(Protocol):
    """A file to read, as far as it is needed here."""

    def read(self, size: int = -1, /) -> bytes: ...
    def tell(self) -> int: ...


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


def _gzip() -> _Decompressor:
    return igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)


def _xz() -> _Decompressor:
    return lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)


_KINDS: dict[str, tuple[Callable[[], _Decompressor], bytes]] = {
    "tar.gz": (_gzip, b"\x1f\x8b"),
    "tar.bz2": (bz2.BZ2Decompressor, b"BZh"),
    "tar.xz": (_xz, b"\xfd7zXZ\x00"),
    "tar.zst": (zstd.ZstdDecompressor, b"\x28\xb5\x2f\xfd"),
}


class Decompressing:
    """``read`` for a compressed file, in bounded memory. Raises Truncated where it was cut off.

    Several frames in a row are one stream, as gzip, bzip2, xz and zstd themselves have it; padding after the last is
    left alone.
    """

    def __init__(self, source: Raw, kind: str) -> None:
        self._source = source
        self._new, self._magic = _KINDS[kind]
        self._current = self._new()
        self._started = False  # a frame has begun and not ended
        self._over = False
        self._pending = b""  # read from the source and not given to a decoder

    def read(self, size: int) -> bytes:
        while not self._over:
            data, exhausted = b"", False
            if self._current.needs_input or not self._started:
                data, self._pending = self._pending or self._source.read(CHUNK), b""
                exhausted = not data
            self._started = True
            # bz2, lzma and zstd refuse an empty input before the first byte with an error of their own.
            if exhausted and self._current.needs_input:
                raise Truncated
            produced = self._current.decompress(data, size)
            if exhausted and not produced and not self._current.eof:
                raise Truncated
            if self._current.eof:
                self._next_frame()
            if produced:
                return produced
        return b""

    def stop(self) -> None:
        """Have a ``read`` in another thread end soon: endless frames may hold nothing that it could give."""
        self._over = True

    def _next_frame(self) -> None:
        rest = self._current.unused_data
        while len(rest) < len(self._magic) and (more := self._source.read(CHUNK)):
            rest += more
        if not rest.startswith(self._magic):
            self._over = True
            return
        self._pending = rest
        self._current, self._started = self._new(), False


class Decoder:
    """Decompresses ``source`` ahead of who reads it, in a thread: decoders and system calls let others work.

    ``fetch`` gives the next bytes, none at the end, and raises Truncated or Undecodable where the data does not go on.
    """

    def __init__(self, source: Raw, kind: str) -> None:
        self.position = 0
        """How many bytes of the source were decoded so far."""
        self._source, self._stream = source, Decompressing(source, kind)
        self._made: SimpleQueue[bytes | Exception] = SimpleQueue()
        self._room = threading.Semaphore(_AHEAD)
        self._given_up = False
        self._over = False
        # A daemon: a cancellation that comes before anybody could call ``close`` is not to wait for it.
        self._thread = threading.Thread(target=self._decode, daemon=True)
        self._thread.start()

    def fetch(self) -> bytes:
        if self._over:
            return b""
        made = self._made.get()
        if isinstance(made, Exception):
            self._over = True
            raise made
        self._over = not made
        self._room.release()
        return made

    def close(self) -> None:
        """End it, wherever it is."""
        self._given_up = True
        self._stream.stop()
        self._room.release()
        self._thread.join()

    def _decode(self) -> None:
        try:
            data = b"-"
            while data:
                data = self._stream.read(CHUNK)
                self.position = self._source.tell()
                self._room.acquire()
                if self._given_up:
                    return
                self._made.put(data)
        except BROKEN as error:
            self._made.put(Undecodable(str(error) or type(error).__name__))
        except Exception as error:
            self._made.put(error)


class Incoming:
    """A stream that only goes forward. Raises Truncated where it ends too early.

    ``fetch`` gives the next bytes, however many; none is the end.
    """

    def __init__(self, fetch: Callable[[], bytes]) -> None:
        self._fetch = fetch
        self._view = memoryview(b"")
        self._start = 0
        self._end = 0
        self.read_bytes = 0
        """How much has come in so far, in bytes."""

    @classmethod
    def of_descriptor(cls, descriptor: int) -> Incoming:
        """From a pipe or file, where it stands."""
        return cls(lambda: os.read(descriptor, CHUNK))

    @classmethod
    def of_file(cls, file: Raw) -> Incoming:
        return cls(lambda: file.read(CHUNK))

    def upto(self, size: int) -> memoryview:
        """The next ``size`` bytes, fewer only at the end."""
        end = self._start + size
        if end <= self._end:
            view = self._view[self._start : end]
            self._start = end
            return view
        pieces = [self._view[self._start :]]
        missing = end - self._end
        while missing and self._more():
            piece = self._view[:missing]
            self._start = len(piece)
            missing -= self._start
            pieces.append(piece)
        return memoryview(b"".join(pieces))

    def exactly(self, size: int, name: str) -> memoryview:
        view = self.upto(size)
        if len(view) < size:
            raise Truncated(f"it ends within {shown(name)}")
        return view

    def pieces(self, size: int, name: str) -> Iterator[memoryview]:
        """The next ``size`` bytes in pieces."""
        while size:
            if self._start == self._end and not self._more():
                raise Truncated(f"it ends within {shown(name)}")
            view = self._view[self._start : min(self._end, self._start + size)]
            self._start += len(view)
            size -= len(view)
            yield view

    def skip(self, size: int, name: str) -> None:
        for _ in self.pieces(size, name):
            pass

    def _more(self) -> int:
        """Only when what is there was taken."""
        self._view = memoryview(self._fetch())
        self._start, self._end = 0, len(self._view)
        self.read_bytes += self._end
        return self._end
