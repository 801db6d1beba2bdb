"""Getting bytes onto the disk while more of them arrive, so that the wait at the end is short."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from functools import cache
from typing import Any

_SYNC_FILE_RANGE_WRITE = 2


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def begin_writing(descriptor: int, offset: int, length: int) -> None:
    """Have the kernel start to write a range of a file, without waiting for it (sync_file_range(2)). No promise: what
    has to be on the disk is synced later, and this makes that quick; a file system that can't is no error."""
    _libc().sync_file_range(
        descriptor, ctypes.c_int64(offset), ctypes.c_int64(length), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE)
    )


def sync_files(paths: Iterable[str]) -> None:
    """Have every one of these files on the disk.

    One by one is quick where their writing was begun before: the journal is committed for the first of them, and the
    others find that done. To sync the file system instead would wait for whatever else is being written there.
    """
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
