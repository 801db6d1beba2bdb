"""Locks of files that tell which process a directory is in use by; the kernel lets go of them when it ends."""

from __future__ import annotations

import fcntl
import time

PATIENCE_S = 0.5
_LOOK_S = 0.05


def take_lock(descriptor: int) -> None:
    """Lock the open file for this process alone. Raises BlockingIOError if another one has it, and OSError.

    The kernel may let go of a killed process' files a moment after that process has been waited for, so whoever starts
    another in its place must not be refused at once.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_LOOK_S)
