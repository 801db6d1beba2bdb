"""What has been fetched and not yet published: kept beside the target, so that a killed attempt is gone on with.

A folder with a name that the step kit's own stages have as well, so that whoever writes to the same target removes it.
In it each object has a file, named by what the store says about its bytes, and all of them one log: of the ranges that
are there, and of the objects that are whole. The log is written without syncing: it outlives the process, which is
what gets killed. It is not believed after a reboot, because it may then know of bytes that never reached the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from outrider_stepkit import StepFailure
from outrider_stepkit.publish import STAGE_PREFIX, is_mount, remove_tree

_MAX_NAME_BYTES = 120
_MAX_LOG_BYTES = 64 * 1024**2
_LOG = "log"
_FORMAT = "1"


class Partials:
    """The folder of one target, and its log. Objects are called by what identifies their bytes."""

    def __init__(self, folder: Path) -> None:
        """Reads what a former attempt has left, if it can be believed."""
        self.folder = folder
        self.whole: dict[str, str] = {}
        """The SHA-256 of each object that is there from its first byte to its last."""
        self.ranges: dict[str, dict[int, int]] = defaultdict(dict)
        """For each other one: how many bytes there are from an offset on."""
        head = f"{_FORMAT} {_boot_id()}"
        known = self._read(head)
        if not known:
            for entry in os.scandir(folder):
                os.unlink(entry.path)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(folder / _LOG, flags, 0o644)
        if not known:
            self._write(head)

    def path(self, identity: str) -> str:
        return os.path.join(self.folder, identity)

    def note(self, identity: str, offset: int, length: int) -> None:
        """``length`` bytes from ``offset`` on are in the object's file."""
        self._write(f"{identity} {offset} {length}")

    def finish(self, identity: str, sha256: str) -> None:
        """The object's file is whole."""
        self.whole[identity] = sha256
        self._write(f"{identity} whole {sha256}")

    def forget(self, identity: str) -> None:
        """What there is of an object is of no use."""
        self.whole.pop(identity, None)
        self.ranges.pop(identity, None)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(identity))

    def keep_only(self, identities: set[str]) -> None:
        """Remove what nobody asks for any more: objects that were replaced since, or are not wanted now."""
        for entry in os.scandir(self.folder):
            if entry.name != _LOG and entry.name not in identities:
                self.forget(entry.name)
        for identity in [*self.whole, *self.ranges]:
            if not os.path.exists(self.path(identity)):
                self.forget(identity)

    def used_bytes(self) -> int:
        """What all of it takes on the disk; files have holes where ranges are missing."""
        return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in os.scandir(self.folder))

    def _write(self, line: str) -> None:
        os.write(self._descriptor, f"{line}\n".encode())

    def _read(self, head: str) -> bool:
        try:
            with (self.folder / _LOG).open("rb") as file:
                lines = file.read(_MAX_LOG_BYTES).decode("utf-8", "replace").split("\n")
        except FileNotFoundError:
            return False
        if lines[0] != head:
            return False
        for line in lines[1:-1]:  # what follows the last line's end was cut short
            identity, what, value = (*line.split(" "), "", "")[:3]
            if what == "whole":
                self.whole[identity] = value
            elif what.isdigit() and value.isdigit():
                here = self.ranges[identity]
                here[int(what)] = max(int(value), here.get(int(what), 0))
        for identity in self.whole:
            self.ranges.pop(identity, None)
        return True


@contextmanager
def partials(target: Path, *, directory: bool) -> Iterator[Partials]:
    """What is fetched to ``target``; ``directory`` says that this is one.

    The folder goes when the block ends, unless that is by a temporary failure: then the next attempt finds it. Where
    another process is at work in it, this one gets a folder of its own.
    """
    inside = directory and is_mount(target)
    place = target if inside else target.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise StepFailure(f"{place} is a file; it would have to be a directory", code="not_a_directory") from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
    name = os.fsencode(target.name)[:_MAX_NAME_BYTES].decode("utf-8", "replace").replace("\ufffd", "_")
    folder, keep, descriptor = place / f"{STAGE_PREFIX}{name}.resume", False, -1
    try:
        folder, descriptor = _locked(folder, target)
        yield Partials(folder)
    except StepFailure as failure:
        keep = failure.temporary and failure.code != "changed"
        raise
    finally:
        if descriptor >= 0:
            if not keep:
                remove_tree(folder)
            os.close(descriptor)


def _locked(folder: Path, target: Path) -> tuple[Path, int]:
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o755)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return _locked(folder.with_suffix(f".{secrets.token_hex(6)}"), target)
    return folder, descriptor


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return secrets.token_hex(8)  # never the same again: what was left is not believed
