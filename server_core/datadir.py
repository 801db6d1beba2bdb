"""The server's data directory: one process at a time."""

from __future__ import annotations

import os
from pathlib import Path

from outrider.errors import Conflict, InvalidInput
from outrider.locking import take_lock


class DataDirLock:
    """Held as long as its context. Entering raises Conflict if another process has it, InvalidInput if it can't be."""

    def __init__(self, data_dir: Path, *, make: bool = False) -> None:
        self._data_dir = data_dir
        self._make = make
        self._descriptor = -1

    def __enter__(self) -> None:
        try:
            if self._make:
                self._data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._descriptor = os.open(self._data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            take_lock(self._descriptor)
        except BlockingIOError as error:
            os.close(self._descriptor)
            raise Conflict(
                f"another server uses the data directory {self._data_dir}",
                code="data_dir_taken",
                hint="stop it first, or give another data_dir",
            ) from error
        except OSError as error:
            raise InvalidInput(
                f"the data directory {self._data_dir} can't be used: {error.strerror}", code="data_dir_unusable"
            ) from error

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
