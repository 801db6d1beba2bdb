"""Names out of an archive: which of them stay below the directory that is unpacked to."""

from __future__ import annotations

import os
import re

from outrider_stepkit import StepFailure

MAX_NAME_BYTES = 255  # of every file system that matters
MAX_PATH_BYTES = 3072  # leaves room for the path of the target below the kernel's 4096
MAX_DEPTH = 128
"""How many folders deep an entry may lie, if nothing else is said: what is packed can be unpacked. The default of
archive.extract's max_depth is the same."""

Parts = tuple[str, ...]


def shown(name: str) -> str:
    """A name from an archive, fit for a sentence: quoted, control characters escaped, not too long."""
    text = ascii(name) if not name.isprintable() else repr(name)
    return text if len(text) <= 160 else f"{text[:120]}…{text[-30:]}"


class Names:
    """``safe_parts`` for many names of one archive, which come in rows from the same folders."""

    def __init__(self, max_depth: int) -> None:
        self._max_depth = max_depth
        self._folder: str | None = None
        self._folder_parts: Parts = ()

    def parts(self, name: str, *, backslash: bool) -> Parts:
        folder, _, last = name.rpartition("/")
        # What is plain in its last part, and in a folder that was vetted just now, is plain altogether.
        if folder == self._folder and _is_plain(last) and len(name) * 4 <= MAX_PATH_BYTES:
            return (*self._folder_parts, last)
        parts = safe_parts(name, backslash=backslash, max_depth=self._max_depth)
        if folder and last:
            self._folder, self._folder_parts = folder, parts[:-1]
        return parts


def _is_plain(name: str) -> bool:
    if name in ("", ".", "..") or len(name) * 4 > MAX_NAME_BYTES or not name.isprintable():
        return False
    return "\\" not in name and ":" not in name


def safe_parts(name: str, *, backslash: bool, max_depth: int = MAX_DEPTH) -> Parts:
    """The components of ``name``; ``()`` for the root itself.

    Refuses what leads out: absolute names, drive letters, ``..`` anywhere. That ``a/../b`` would stay inside is no
    excuse: no honest archiver writes it, and what ``a`` is can change in between. ``backslash`` says that it
    separates, too (7z and zip come from Windows as well).
    """
    text = name.replace("\\", "/") if backslash else name
    if "\0" in text:
        raise _refused(name, "has a zero byte in its name")
    if text.startswith("/"):
        raise _refused(name, "has an absolute path")
    if backslash and re.match(r"[A-Za-z]:", text):
        raise _refused(name, "names a drive")
    parts = tuple(part for part in text.split("/") if part not in ("", "."))
    if ".." in parts:
        raise _refused(name, "would be unpacked outside of the target directory")
    _check_lengths(name, parts)
    if len(parts) > max_depth + 1:
        raise StepFailure(
            f"the archive is refused: its entry {shown(name)} lies {len(parts) - 1} folders deep and {max_depth} are"
            " allowed: raise max_depth if that is meant to be so",
            code="archive_too_large",
        )
    return parts


def _check_lengths(name: str, parts: Parts) -> None:
    """Refuse what no file system takes, before anything is written."""
    try:
        sizes = [len(os.fsencode(part)) for part in parts]
    except UnicodeEncodeError:
        raise _refused(name, "has a name that can't be written to a file system") from None
    if max(sizes, default=0) > MAX_NAME_BYTES or sum(sizes) + len(sizes) > MAX_PATH_BYTES:
        raise _refused(name, "has a name that is too long for a file system")


def check_link(name: str, parts: Parts, target: str) -> None:
    """Refuse a symbolic link at ``parts`` whose ``target`` could lead out of the tree.

    A target is relative, and goes up only at its beginning, by no more folders than the link lies deep. The folder
    that holds the link is a real one (see tree.py), so those steps up are exact; the rest goes down, perhaps through
    other links, of which each obeys the same rule. So no chain of links can lead out.
    """
    if not target or "\0" in target:
        raise _refused(name, "is a link without a target")
    if target.startswith("/"):
        raise _refused(name, f"is a link to the absolute path {shown(target)}")
    if len(os.fsencode(target)) > MAX_PATH_BYTES:
        raise _refused(name, "is a link whose target is too long")
    steps = [step for step in target.split("/") if step not in ("", ".")]
    up = 0
    while up < len(steps) and steps[up] == "..":
        up += 1
    if ".." in steps[up:] or up > len(parts) - 1:
        raise _refused(name, f"is a link that leads out of the target directory: {shown(target)}")


def check_name(name: str) -> None:
    """Refuse names that can't stand in a 7z or zip as they are."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise _unfit(name, "is not in UTF-8") from None
    if "\\" in name:
        raise _unfit(name, "has a backslash, which 7z and zip take for a separator")


def _unfit(name: str, why: str) -> StepFailure:
    return StepFailure(f"{shown(name)} {why}: choose a tar format, or exclude it", code="name_unfit")


def _refused(name: str, why: str) -> StepFailure:
    return StepFailure(f"the archive is refused: its entry {shown(name)} {why}", code="archive_unsafe")
