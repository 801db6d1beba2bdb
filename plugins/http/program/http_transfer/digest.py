"""Checksums of a file while it is being written: read again from the page cache, in order, by a thread of its own.

Bytes may arrive in any order and are hashed in theirs; the second processor does it while the first receives.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable
from typing import Protocol

_CHUNK_BYTES = 1024**2
_LOOK_S = 0.1


class Frontier(Protocol):
    """Knows up to where the file is complete."""

    def wait_for(self, frontier: int, timeout_s: float) -> int: ...


class Follower:
    """Hashes the file behind ``descriptor`` as far as it is complete."""

    def __init__(self, descriptor: int, pieces: Frontier, algorithms: Iterable[str]) -> None:
        self._descriptor, self._pieces = descriptor, pieces
        self._digests = {name: hashlib.new(name) for name in algorithms}
        self._end: int | None = None
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        if self._digests:
            self._thread = threading.Thread(target=self._run, name="digest", daemon=True)
            self._thread.start()

    def result(self, size: int) -> dict[str, str]:
        """The digests of the whole file, which is ``size`` bytes long, once everything has arrived. Raises OSError."""
        self._end = size
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(_LOOK_S)  # a signal is heard in between
        if self._failure is not None:
            raise self._failure
        return {name: digest.hexdigest() for name, digest in self._digests.items()}

    def stop(self) -> None:
        """Give up. Idempotent."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._follow()
        except OSError as error:
            self._failure = error

    def _follow(self) -> None:
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        position = 0
        while not self._stop.is_set() and (self._end is None or position < self._end):
            # A chunk at a time, unless it is the last: the thread that receives is not to wait for each other's turn.
            wanted = position + (_CHUNK_BYTES if self._end is None else 1)
            frontier = self._pieces.wait_for(wanted, _LOOK_S)
            while position < frontier and not self._stop.is_set():
                count = os.preadv(self._descriptor, [buffer[: frontier - position]], position)
                if not count:
                    raise OSError(5, "the file became shorter while it was written")
                for digest in self._digests.values():
                    digest.update(buffer[:count])
                position += count
