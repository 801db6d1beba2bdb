"""A disk of a few MiB, to be filled to the last byte. Mounting one takes root."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent_core.room import free_bytes


@contextmanager
def small_disk(mount: Path, size_mib: int) -> Iterator[Path]:
    """A tmpfs at ``mount``, which is made."""
    mount.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_mib}m,mode=0711", "tmpfs", mount], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


def fill(disk: Path, *, but_for: int = 0) -> Path:
    """Until no more than ``but_for`` bytes are left; the file to remove."""
    hog = disk / "hog"
    with hog.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while (left := free_bytes(disk) - but_for) > 0:
            file.write(b"\0" * min(65536, left))
    assert free_bytes(disk) <= but_for
    return hog
