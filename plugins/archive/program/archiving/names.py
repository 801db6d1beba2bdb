"""Names out of an archive: which of them stay below the directory that is unpacked to."""

from __future__ import annotations

import os
import re

from outrider_stepkit import StepFailure

MAX_DEPTH = 128
MAX_NAME_BYTES = 255  # of every file system that matters
MAX_PATH_BYTES = 3072  # leaves room for the path of the target below the kernel's 4096

Parts = tuple[str, ...]


def shown(name: str) -> str:
    """A name from an archive, fit for a sentence: quoted, control characters escaped, not too long."""
    text = ascii(name) if not name.isprintable() else repr(name)
    return text if len(text) <= 160 else f"{text[:120]}…{text[-30:]}"


def safe_parts(name: str, *, backslash: bool) -> Parts:
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
    check_lengths(name, parts)
    return parts


def check_lengths(name: str, parts: Parts) -> None:
    """Refuse what no file system takes, before anything is written."""
    try:
        sizes = [len(os.fsencode(part)) for part in parts]
    except UnicodeEncodeError:
        raise _refused(name, "has a name that can't be written to a file system") from None
    if len(parts) > MAX_DEPTH:
        raise _refused(name, f"lies {len(parts)} folders deep; {MAX_DEPTH} are allowed")
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


def _refused(name: str, why: str) -> StepFailure:
    return StepFailure(f"the archive is refused: its entry {shown(name)} {why}", code="archive_unsafe")
