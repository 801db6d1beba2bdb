"""SHA-256 of what passes by."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

CHUNK = 1024 * 1024


class HashingReader:
    """Reads from ``source`` and knows the SHA-256 and the length of what was read so far."""

    def __init__(self, source: BinaryIO, on_bytes: Callable[[int], None] | None = None) -> None:
        self._source = source
        self._digest = hashlib.sha256()
        self._on_bytes = on_bytes
        self.size_bytes = 0

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(size)
        self._digest.update(data)
        self.size_bytes += len(data)
        if self._on_bytes is not None and data:
            self._on_bytes(self.size_bytes)
        return data

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def sha256_of(path: str | os.PathLike[str], on_bytes: Callable[[int], None] | None = None) -> str:
    """The SHA-256 of a file, as lower-case hex. ``on_bytes`` gets the number of bytes read so far."""
    with Path(path).open("rb") as file:
        reader = HashingReader(file, on_bytes)
        while reader.read(CHUNK):
            pass
    return reader.hexdigest()
