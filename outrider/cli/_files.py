"""Files that people name: `-` is stdin, and what can't be read is said in a sentence."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from outrider.errors import InvalidInput, PermanentError


def read_bytes(path: Path, *, at_most: int | None = None) -> bytes:
    """The content of a file, or of stdin for ``-``. Raises InvalidInput if it is missing or over ``at_most`` bytes.

    Not more than that is read, so that a huge file is refused at once.
    """
    limit = -1 if at_most is None else at_most + 1
    try:
        if str(path) == "-":
            data = sys.stdin.buffer.read(limit)
        else:
            with path.open("rb") as file:
                data = file.read(limit)
    except FileNotFoundError as error:
        raise InvalidInput(f"there is no file {path}", code="file_missing") from error
    except OSError as error:
        raise InvalidInput(f"{path} can't be read: {error.strerror}", code="file_unreadable") from error
    if at_most is not None and len(data) > at_most:
        raise InvalidInput(f"{path} is larger than {at_most / 1024**2:g} MiB", code="too_large")
    return data


def read_text(path: Path) -> str:
    """The content of a file of UTF-8 text, or of stdin for ``-``."""
    try:
        return read_bytes(path, at_most=1024 * 1024).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is not UTF-8 text", code="not_utf8") from error


def write_whole(path: Path, text: str) -> None:
    """Put ``text`` into a file, which is replaced whole or not at all. Raises PermanentError if it can't be written."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                os.fchmod(file.fileno(), 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise PermanentError(f"{path} can't be written: {error.strerror}", code="not_writable") from error
