"""What is transferred: objects on one side, files on the other, and the digest of many."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass

from outrider_stepkit import Selection, StepFailure
from outrider_stepkit.publish import STAGE_PREFIX

from s3_transfer.api import Api
from s3_transfer.settings import Settings

MAX_OBJECTS = 100_000
"""How many objects one step moves. All their names are held in memory."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An object and the file that belongs to it. ``name`` is relative to the prefix, with slashes."""

    key: str
    name: str
    size: int
    etag: str = ""


def folder(prefix: str) -> str:
    """The prefix as a folder: 'a/b' does not mean 'a/b-old/c'."""
    return prefix if not prefix or prefix.endswith("/") else f"{prefix}/"


def listing_sha256(digests: Iterable[tuple[str, str]]) -> str:
    """The SHA-256 of what ``sha256sum`` prints for (name, digest) pairs, in byte order of the names."""
    total = hashlib.sha256()
    for name, digest in sorted(digests, key=lambda pair: os.fsencode(pair[0])):
        # sha256sum escapes names with a backslash or a newline, and marks the line with a backslash.
        escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
        total.update(f"{chr(92) if escaped != name else ''}{digest}  {escaped}\n".encode())
    return total.hexdigest()


def list_objects(api: Api, prefix: str, chosen: Selection) -> list[Entry]:
    """What is chosen below the prefix. Raises StepFailure if that is nothing, too much, or has an unsafe name."""
    below = folder(prefix)
    what = f"prefix {below!r} of bucket {api.settings.bucket!r}"
    entries: list[Entry] = []
    seen = False
    for item in api.listing(below):
        name = item.key[len(below) :]
        if (not name or name.endswith("/")) and item.size == 0:
            continue  # what consoles create to show an empty folder
        seen = True
        if not chosen.wants(name):
            continue
        entries.append(Entry(item.key, name, item.size, item.etag))
        if len(entries) > MAX_OBJECTS:
            raise StepFailure(
                f"{what} has more than {MAX_OBJECTS} objects: take a narrower prefix, or pack them",
                code="too_many_objects",
            )
    if not entries:
        which = "no object that 'include' and 'exclude' leave" if seen else "no object"
        raise StepFailure(f"there is {which} below {what} at {api.settings.shown}", code="no_such_key")
    _refuse_unsafe(entries, api.settings)
    return entries


def _refuse_unsafe(entries: list[Entry], settings: Settings) -> None:
    names = {entry.name for entry in entries}
    for entry in entries:
        parts = entry.name.split("/")
        if any(part in {"", ".", ".."} or "\0" in part or len(os.fsencode(part)) > 255 for part in parts):
            raise StepFailure(
                f"{settings.object(entry.key)} at {settings.shown} can't be a file below the target: "
                "its name has an empty, '.', '..' or over-long part",
                code="unsafe_name",
            )
        if parts[0].startswith(STAGE_PREFIX):
            raise StepFailure(
                f"{settings.object(entry.key)}: names beginning with {STAGE_PREFIX!r} are taken", code="unsafe_name"
            )
        for depth in range(1, len(parts)):
            if (parent := "/".join(parts[:depth])) in names:
                raise StepFailure(
                    f"{settings.object(entry.key)} can't be a file: object {parent!r} is where its directory would be",
                    code="unsafe_name",
                )


def list_files(directory: str, prefix: str, chosen: Selection) -> list[Entry]:
    """Every chosen file below a directory, sorted. Raises StepFailure for links and special files among them, and if
    there is none."""
    below = folder(prefix)
    entries: list[Entry] = []
    pending = [""]
    while pending:
        at = pending.pop()
        with os.scandir(os.path.join(directory, at)) as items:
            for item in items:
                name = f"{at}{item.name}"
                if item.name.startswith(STAGE_PREFIX):
                    continue  # another step's work, or what a killed one left
                info = item.stat(follow_symlinks=False)
                if stat.S_ISDIR(info.st_mode):
                    pending.append(f"{name}/")
                elif not chosen.wants(name):
                    continue
                elif stat.S_ISREG(info.st_mode):
                    entries.append(Entry(_key(below, name, directory), name, info.st_size))
                else:
                    raise StepFailure(
                        f"{os.path.join(directory, name)!r} is a link or a special file, which an object can't be: "
                        "remove it, exclude it, or pack the directory with archive.create",
                        code="not_a_file",
                    )
        if len(entries) > MAX_OBJECTS:
            raise StepFailure(
                f"{directory} has more than {MAX_OBJECTS} files: pack it with archive.create", code="too_many_objects"
            )
    if not entries:
        raise StepFailure(f"there is no file to send in {directory}", code="nothing_to_send")
    return sorted(entries, key=lambda entry: entry.key)


def _key(prefix: str, name: str, directory: str) -> str:
    key = prefix + name
    try:
        encoded = key.encode()
    except UnicodeEncodeError as error:
        raise StepFailure(
            f"a file in {directory} has a name that is not UTF-8 ({name!r}), which a key has to be", code="unsafe_name"
        ) from error
    if len(encoded) > 1024:
        raise StepFailure(f"the key {key!r} has more than 1024 bytes", code="unsafe_name")
    return key
