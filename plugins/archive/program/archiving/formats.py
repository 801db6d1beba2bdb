"""What kind of archive a file is, and the sentence for one that is broken."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO

from outrider_stepkit import StepFailure

SUFFIXES = {
    ".7z": "7z",
    ".zip": "zip",
    ".tar": "tar",
    ".tar.gz": "tar.gz",
    ".tgz": "tar.gz",
    ".tar.xz": "tar.xz",
    ".txz": "tar.xz",
    ".tar.zst": "tar.zst",
    ".tzst": "tar.zst",
}
_MAGIC = (
    (0, b"7z\xbc\xaf\x27\x1c", "7z"),
    (0, b"PK\x03\x04", "zip"),
    (0, b"PK\x05\x06", "zip"),  # an empty one
    (0, b"\x1f\x8b", "tar.gz"),
    (0, b"\xfd7zXZ\x00", "tar.xz"),
    (0, b"\x28\xb5\x2f\xfd", "tar.zst"),
    (257, b"ustar", "tar"),
)


class Damaged(StepFailure):
    """The archive ends too early or is not what it says it is."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path} is truncated or damaged: {why}; nothing was unpacked", code="archive_damaged")


def open_archive(path: str) -> BinaryIO:
    """Open a regular file to read. A pipe or device in its place would block or never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise StepFailure(f"the archive {path} does not exist", code="not_found") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise StepFailure(f"{path} is {kind}; an archive was expected", code="not_a_file")
    return open(descriptor, "rb")


def format_of(path: str, file: BinaryIO) -> str:
    """What the content says; what the name says where the content is silent (old tar has no mark)."""
    head = file.read(512)
    file.seek(0)
    if not head:
        raise Damaged(path, "the file is empty")
    for offset, magic, name in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return name
    lower = path.lower()
    named = next((SUFFIXES[s] for s in sorted(SUFFIXES, key=len, reverse=True) if lower.endswith(s)), None)
    if named == "tar":
        return named
    if named is not None:
        raise Damaged(path, f"it is named like a {named} archive and its content is none")
    known = ", ".join(dict.fromkeys(SUFFIXES.values()))
    raise StepFailure(f"{path} is no archive that is known here ({known})", code="archive_unknown")
