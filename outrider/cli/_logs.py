"""Chunks of logs, and how they are written to stdout."""

from __future__ import annotations

import io
from collections.abc import Hashable
from typing import BinaryIO

from outrider.errors import PermanentError
from outrider.v1 import types_pb2 as types

MAX_CHUNK_BYTES = 64 * 1024 * 1024


def payload(chunk: types.RunLogChunk) -> bytes:
    """The bytes of a chunk, unpacked. Raises PermanentError if they can't be."""
    if not chunk.zstd:
        return chunk.data
    import zstandard

    try:
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(chunk.data)) as reader:
            data = reader.read(MAX_CHUNK_BYTES)
    except zstandard.ZstdError as error:
        raise PermanentError(f"a piece of the log of step {chunk.step} can't be unpacked: {error}") from error
    return data


class LogWriter:
    """Writes the bytes of several sources to one stream.

    With prefixes, whole lines are written, each with the name of its source before it, so that sources that write
    side by side do not tear each other's lines.
    """

    def __init__(self, out: BinaryIO, *, prefixes: bool) -> None:
        self._out = out
        self._prefixes = prefixes
        self._open: dict[Hashable, tuple[str, bytes]] = {}
        self._width = 0

    def write(self, source: Hashable, label: str, data: bytes) -> None:
        """Write what ``source`` said; ``label`` is the prefix of its lines."""
        if not self._prefixes:
            self._out.write(data)
            self._out.flush()
            return
        _, begun = self._open.get(source, (label, b""))
        *lines, rest = (begun + data).split(b"\n")
        self._open[source] = (label, rest)
        for line in lines:
            self._line(label, line)
        self._out.flush()

    def close(self) -> None:
        """Write the lines that were begun and never ended."""
        for label, rest in self._open.values():
            if rest:
                self._line(label, rest)
        self._open.clear()
        self._out.flush()

    def _line(self, label: str, line: bytes) -> None:
        self._width = max(self._width, len(label))
        self._out.write(label.ljust(self._width).encode() + b" | " + line + b"\n")
