"""Compressing on several cores: a stream cut into equal pieces, each a frame of its own.

gzip, bzip2 and xz take several frames in a row for one stream, and so does everything that reads them. How the stream
is cut does not depend on the number of cores, so neither does the result.
"""

from __future__ import annotations

import bz2
import lzma
import os
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from backports import zstd
from isal import igzip

from archiving.volumes import Buffer

MEMORY = 100 * 1024**2
"""What the workers may take together, so that the whole program stays below 150 MB."""

_XZ_STEP = 128 * 1024

LEVELS = {"zip": 2, "tar.gz": 2, "tar.bz2": 9, "tar.xz": 6, "7z": 5, "tar.zst": 3}
"""The levels taken where none is given."""


class Writer(Protocol):
    """Where bytes go."""

    def write(self, data: Buffer, /) -> int: ...


def cores() -> int:
    """How many processors this process may use."""
    return max(1, len(os.sched_getaffinity(0)))


class Frames:
    """``write`` what is to be compressed; ``finish`` at the end. Pieces of ``chunk`` bytes go to ``workers`` threads.

    ``end`` is called with the whole of the last, shorter piece (perhaps empty), ``compress`` with all others.
    """

    def __init__(self, target: Writer, compress: Callable[[bytes], bytes], chunk: int, workers: int) -> None:
        self._target = target
        self._compress = compress
        self._chunk = chunk
        self._pool = ThreadPoolExecutor(workers)
        self._ahead = workers + 1
        self._waiting: deque[Future[bytes]] = deque()
        self._buffer = bytearray()
        self._started = False
        self.given_up = False
        """What is compressed now is of no use any more: it is waited for, so it should end soon."""

    def write(self, data: Buffer) -> int:
        self._buffer += data
        while len(self._buffer) >= self._chunk:
            piece = bytes(memoryview(self._buffer)[: self._chunk])
            del self._buffer[: self._chunk]
            self._submit(piece)
        return len(data)

    def finish(self) -> None:
        if self._buffer or not self._started:
            self._submit(bytes(self._buffer))
        while self._waiting:
            self._target.write(self._waiting.popleft().result())

    def close(self) -> None:
        self.given_up = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, piece: bytes) -> None:
        self._started = True
        self._waiting.append(self._pool.submit(self._compress, piece))
        while len(self._waiting) > self._ahead:
            self._target.write(self._waiting.popleft().result())


class Plain:
    """A tar as it is."""

    def __init__(self, target: Writer) -> None:
        self._target = target

    def write(self, data: Buffer) -> int:
        return self._target.write(data)

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


class Zstandard:
    """zstd's own threads. One worker at least, since the result without any is another one."""

    def __init__(self, target: Writer, level: int) -> None:
        self._target = target
        self._inner = zstd.ZstdCompressor(
            options={
                zstd.CompressionParameter.compression_level: max(level, 1),
                zstd.CompressionParameter.checksum_flag: 1,
                zstd.CompressionParameter.nb_workers: _zstd_workers(level),
            }
        )

    def write(self, data: Buffer) -> int:
        produced = self._inner.compress(data)
        if produced:
            self._target.write(produced)
        return len(data)

    def finish(self) -> None:
        self._target.write(self._inner.flush())

    def close(self) -> None:
        pass


def compressor(kind: str, target: Writer, level: int) -> Frames | Plain | Zstandard:
    """What compresses a tar into ``target`` as ``kind`` says."""
    match kind:
        case "tar":
            return Plain(target)
        case "tar.zst":
            return Zstandard(target, level)
        case "tar.gz":
            return Frames(target, lambda piece: gzip_frame(piece, level), 1024**2, cores())
        case "tar.bz2":
            # Two blocks of it; an encoder takes 8 MB.
            return Frames(target, lambda piece: bz2.compress(piece, max(level, 1)), 1_800_000, min(cores(), 8))
        case _:
            return _xz(target, level)


def gzip_frame(data: bytes, level: int) -> bytes:
    """A whole gzip member without name and time: the same content gives the same bytes.

    Up to level 3 isa-l compresses, at several times the speed of zlib.
    """
    if level <= 3:
        return bytes(igzip.compress(data, level, mtime=0))
    inner = zlib.compressobj(level, zlib.DEFLATED, 31)
    return inner.compress(data) + inner.flush()


def _xz(target: Writer, level: int) -> Frames:
    # A dictionary larger than a piece is of no use; the encoder takes about eleven times its size.
    chunk = 4 * 1024**2 if level <= 6 else 8 * 1024**2
    preset = {0: 256 * 1024, 1: 1024**2, 2: 2 * 1024**2}.get(level, 4 * 1024**2)
    dictionary = min(chunk, preset if level <= 6 else chunk)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": level, "dict_size": dictionary}]
    workers = max(1, min(cores(), MEMORY // (11 * dictionary + 2 * chunk)))
    frames = Frames(target, lambda piece: _xz_frame(piece, filters, frames), chunk, workers)
    return frames


def _xz_frame(data: bytes, filters: list[dict[str, int]], frames: Frames) -> bytes:
    # In steps: on a busy processor a piece takes longer than a cancelled step has.
    inner, made = lzma.LZMACompressor(filters=filters), bytearray()
    view = memoryview(data)
    while view and not frames.given_up:
        made += inner.compress(view[:_XZ_STEP])
        view = view[_XZ_STEP:]
    return bytes(made) + inner.flush() if not view else b""


def _zstd_workers(level: int) -> int:
    # Measured: what a worker takes, with its job's input, grows with the level's window.
    each = 12 if level <= 3 else 24 if level <= 9 else 48 if level <= 15 else 100
    return max(1, min(cores(), MEMORY // (each * 1024**2)))
