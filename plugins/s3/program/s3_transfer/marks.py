"""What a fetched file came from, written on the file itself, so that it need not be fetched again.

An extended attribute says which state of which object the file has, and what the file's size and time of change were
then. A file that was changed since no longer fits its mark; where the file system knows no such attributes there is no
mark, and contents are compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat

from s3_transfer.transport import CHUNK_BYTES

_NAME = "user.outrider.s3"


def mark(path: str, identity: str, sha256: str) -> None:
    """Say on the file at ``path`` that it is the object state ``identity``. Without effect where that can't be said."""
    info = os.stat(path)
    text = json.dumps({"of": identity, "sha256": sha256, "size": info.st_size, "mtime_ns": info.st_mtime_ns})
    with contextlib.suppress(OSError):
        os.setxattr(path, _NAME, text.encode())


def marked(path: str, identity: str) -> str | None:
    """The SHA-256 of the file at ``path`` if it is the object state ``identity`` and was not touched since."""
    try:
        info = os.lstat(path)
        known = json.loads(os.getxattr(path, _NAME, follow_symlinks=False))
        fits = (known["of"], known["size"], known["mtime_ns"]) == (identity, info.st_size, info.st_mtime_ns)
        sha256 = str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not fits or not stat.S_ISREG(info.st_mode) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        return None
    return sha256


def digests_of(path: str, *algorithms: str) -> tuple[str, ...] | None:
    """The digests of a file's content as hexadecimal; None if there is no regular file at ``path``."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with open(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        digests = [hashlib.new(algorithm, usedforsecurity=False) for algorithm in algorithms]
        while chunk := file.read(CHUNK_BYTES):
            for digest in digests:
                digest.update(chunk)
    return tuple(digest.hexdigest() for digest in digests)
