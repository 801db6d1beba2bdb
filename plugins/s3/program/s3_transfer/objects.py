"""What is transferred: objects on one side, files on the other, and the digest of many."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass

from outrider_stepkit import StepFailure
from outrider_stepkit.publish import STAGE_PREFIX

from s3_transfer.store import Store

CHUNK_BYTES = 1024**2
PART_BYTES = 16 * 1024**2
MAX_OBJECTS = 100_000
"""How many objects one step moves. All their names are held in memory."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An object and the file that belongs to it. ``name`` is relative to the prefix, with slashes."""

    key: str
    name: str
    size: int
    etag: str | None = None


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


def list_objects(store: Store, prefix: str) -> list[Entry]:
    """Everything below the prefix. Raises StepFailure if there is nothing, too much, or an unsafe name."""
    prefix = folder(prefix)
    what = f"prefix {prefix!r} of bucket {store.bucket!r}"
    entries: list[Entry] = []
    with store.errors(what):
        for page in store.client.get_paginator("list_objects_v2").paginate(Bucket=store.bucket, Prefix=prefix):
            for item in page.get("Contents", ()):
                name = item["Key"][len(prefix) :]
                if (not name or name.endswith("/")) and item["Size"] == 0:
                    continue  # what consoles create to show an empty folder
                entries.append(Entry(item["Key"], name, item["Size"], item.get("ETag")))
                if len(entries) > MAX_OBJECTS:
                    raise StepFailure(
                        f"{what} has more than {MAX_OBJECTS} objects: take a narrower prefix, or pack them",
                        code="too_many_objects",
                    )
    if not entries:
        raise StepFailure(f"there is no object below {what} at {store.endpoint}", code="no_such_key")
    _refuse_unsafe(entries, store)
    return entries


def _refuse_unsafe(entries: list[Entry], store: Store) -> None:
    names = {entry.name for entry in entries}
    for entry in entries:
        parts = entry.name.split("/")
        if any(part in {"", ".", ".."} or "\0" in part or len(os.fsencode(part)) > 255 for part in parts):
            raise StepFailure(
                f"{store.object(entry.key)} at {store.endpoint} can't be a file below the target: "
                "its name has an empty, '.', '..' or over-long part",
                code="unsafe_name",
            )
        if parts[0].startswith(STAGE_PREFIX):
            raise StepFailure(
                f"{store.object(entry.key)}: names beginning with {STAGE_PREFIX!r} are taken", code="unsafe_name"
            )
        for depth in range(1, len(parts)):
            if (parent := "/".join(parts[:depth])) in names:
                raise StepFailure(
                    f"{store.object(entry.key)} can't be a file: object {parent!r} is where its directory would be",
                    code="unsafe_name",
                )


def list_files(directory: str, prefix: str) -> list[Entry]:
    """Every file below a directory, sorted. Raises StepFailure for links, special files and an empty directory."""
    prefix = folder(prefix)
    entries: list[Entry] = []
    pending = [""]
    while pending:
        below = pending.pop()
        with os.scandir(os.path.join(directory, below)) as items:
            for item in items:
                name = f"{below}{item.name}"
                if item.name.startswith(STAGE_PREFIX):
                    continue  # another step's work, or what a killed one left
                info = item.stat(follow_symlinks=False)
                if stat.S_ISDIR(info.st_mode):
                    pending.append(f"{name}/")
                elif stat.S_ISREG(info.st_mode):
                    entries.append(Entry(_key(prefix, name, directory), name, info.st_size))
                else:
                    raise StepFailure(
                        f"{os.path.join(directory, name)!r} is a link or a special file, which an object can't be: "
                        "remove it, or pack the directory with archive.create",
                        code="not_a_file",
                    )
        if len(entries) > MAX_OBJECTS:
            raise StepFailure(
                f"{directory} has more than {MAX_OBJECTS} files: pack it with archive.create", code="too_many_objects"
            )
    if not entries:
        raise StepFailure(f"there is no file in {directory}", code="nothing_to_send")
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
