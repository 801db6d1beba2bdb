"""Decompression: a stream that knows when it was cut off, and a process of its own that carries it out."""

from __future__ import annotations

import bz2
import contextlib
import fcntl
import json
import lzma
import mmap
import os
import signal
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

from backports import zstd
from isal import igzip_lib
from outrider_stepkit import StepFailure

from archiving.names import shown

CHUNK = 256 * 1024
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
    def readinto(self, buffer: memoryview, /) -> int | None: ...
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
    """A process that decompresses ``source`` into a pipe, so that it works while this one writes files.

    ``descriptor`` is the pipe's end to read. At the end of the data ``check`` raises what the decoder found:
    Truncated, Undecodable, or StepFailure where the process itself was ended.
    """

    def __init__(self, source: Raw, kind: str) -> None:
        self._position = mmap.mmap(-1, 8)
        self.descriptor, write_end = data_pipe()
        self._status, status_end = os.pipe()
        self._process = os.fork()
        if self._process == 0:
            # Else it would never see that nobody reads any more.
            os.close(self.descriptor)
            os.close(self._status)
            _decode(source, kind, write_end, status_end, self._position)
        os.close(write_end)
        os.close(status_end)

    @property
    def position(self) -> int:
        """How many bytes of the source were decoded so far."""
        (value,) = struct.unpack("=q", self._position[:8])
        return int(value)

    def check(self) -> None:
        report = b""
        while piece := os.read(self._status, 65536):
            report += piece
        code = self._wait()
        if not report:
            raise StepFailure(
                f"the process that decompresses was ended ({_ended(code)}): perhaps it had too little memory,"
                " then raise resources.memory",
                code="memory" if code == -signal.SIGKILL else "decoder_ended",
            )
        kind, message = json.loads(report)
        if kind == "truncated":
            raise Truncated(message)
        if kind == "broken":
            raise Undecodable(message)
        if kind == "memory":
            raise MemoryError

    def close(self) -> None:
        """End it, whatever it does."""
        for descriptor in (self.descriptor, self._status):
            if descriptor >= 0:
                os.close(descriptor)
        self.descriptor = self._status = -1
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process, signal.SIGKILL)
            self._wait()

    def _wait(self) -> int:
        if not self._process:
            return 0
        _, status = os.waitpid(self._process, 0)
        self._process = 0
        return os.waitstatus_to_exitcode(status)


def data_pipe() -> tuple[int, int]:
    """A pipe with as much room as the kernel gives without asking."""
    reader, writer = os.pipe()
    with contextlib.suppress(OSError):
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1024 * 1024)
    return reader, writer


def _decode(source: Raw, kind: str, target: int, status: int, position: mmap.mmap) -> None:
    """The life of the forked process. It never returns, and leaves the parent's buffers and exit hooks alone."""
    report = ("done", "")
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for data in _pieces(source, kind):
            view = memoryview(data)
            while view:
                view = view[os.write(target, view) :]
            position[:8] = struct.pack("=q", source.tell())
    except Truncated as error:
        report = ("truncated", str(error))
    except BrokenPipeError:
        pass  # the parent has seen enough
    except MemoryError:
        report = ("memory", "")
    except BROKEN as error:
        report = ("broken", str(error) or type(error).__name__)
    except BaseException as error:
        report = ("broken", f"{type(error).__name__}: {error}")
    finally:
        # It fits into the pipe, so this never waits. The parent reads it when it has seen the end of the data; where
        # it was killed, nothing may lead from here back into its clean-up, of which this process has a copy.
        try:
            os.write(status, json.dumps(report).encode())
        finally:
            os._exit(0)


def _pieces(source: Raw, kind: str) -> Iterator[bytes]:
    stream = Decompressing(source, kind)
    while data := stream.read(CHUNK):
        yield data


def _ended(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


class Incoming:
    """A stream that only goes forward, read through one buffer. Raises Truncated where it ends too early.

    ``fill`` puts bytes into a buffer and tells how many; 0 is the end.
    """

    def __init__(self, fill: Callable[[memoryview], int]) -> None:
        self._fill = fill
        self._buffer = memoryview(bytearray(1024 * 1024))
        self._start = 0
        self._end = 0
        self.read_bytes = 0
        """How much has come in so far, in bytes."""
        self.ended = False
        """Whether the end was seen."""

    @classmethod
    def of_descriptor(cls, descriptor: int) -> Incoming:
        """From a pipe or file, where it stands."""
        return cls(lambda view: os.readv(descriptor, [view]))

    @classmethod
    def of_file(cls, file: Raw) -> Incoming:
        return cls(lambda view: file.readinto(view) or 0)

    def upto(self, size: int) -> memoryview:
        """The next ``size`` bytes, fewer only at the end. The view is good until the next call."""
        end = self._start + size
        if end <= self._end:
            view = self._buffer[self._start : end]
            self._start = end
            return view
        while self._end - self._start < size:
            if self._start + size > len(self._buffer):
                rest = self._end - self._start
                self._buffer[:rest] = bytes(self._buffer[self._start : self._end])
                self._start, self._end = 0, rest
            if not self._more():
                break
        view = self._buffer[self._start : min(self._start + size, self._end)]
        self._start += len(view)
        return view

    def exactly(self, size: int, name: str) -> memoryview:
        view = self.upto(size)
        if len(view) < size:
            raise Truncated(f"it ends within {shown(name)}")
        return view

    def pieces(self, size: int, name: str) -> Iterator[memoryview]:
        """The next ``size`` bytes in pieces; each is good until the next one."""
        while size:
            if self._start == self._end:
                self._start = self._end = 0
                if not self._more():
                    raise Truncated(f"it ends within {shown(name)}")
            view = self._buffer[self._start : min(self._end, self._start + size)]
            self._start += len(view)
            size -= len(view)
            yield view

    def skip(self, size: int, name: str) -> None:
        for _ in self.pieces(size, name):
            pass

    def _more(self) -> int:
        got = self._fill(self._buffer[self._end :])
        self._end += got
        self.read_bytes += got
        self.ended = self.ended or not got
        return got
