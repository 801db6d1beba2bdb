"""From the staged tree to where it belongs."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from outrider_stepkit import StepFailure
from outrider_stepkit.publish import STAGE_PREFIX, is_mount, swap, sync_directory, sync_filesystem


def check_target(target: Path, existing: str) -> None:
    """Refuse a target that can't be published to, before any work is done."""
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise StepFailure(f"{target} lies below a file, so no directory can be there", code="not_a_directory") from None
    if not stat.S_ISDIR(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "a file"
        raise StepFailure(f"{target} is {kind}; the target of an extraction is a directory", code="not_a_directory")
    if existing == "refuse" and _contents(target):
        raise StepFailure(
            f'{target} exists and is not empty: choose another directory, or existing: "merge" or "replace"',
            code="exists",
        )


def publish(tree: Path, target: Path, existing: str, aside: Path) -> None:
    """Make ``tree`` (complete, on the volume of ``target``) the content of ``target``.

    A new directory and ``replace`` appear in one instant. ``merge``, and a target that is the root of a volume (which
    can't be renamed), go entry by entry, each in one instant; whether all of them can is checked before the first.
    ``aside`` is an empty directory for what is replaced.
    """
    check_target(target, existing)
    sync_filesystem(tree)
    if not target.exists():
        tree.rename(target)
    elif existing == "merge":
        _check_merge(tree, target, target)
        _merge(tree, target)
        sync_filesystem(target)
    elif is_mount(target):
        for entry in _contents(target):
            (target / entry).rename(aside / entry)
        for entry in os.listdir(tree):
            (tree / entry).rename(target / entry)
        sync_filesystem(target)
    else:
        _exchange(tree, target, aside)
    sync_directory(target.parent if not is_mount(target) else target)


def _contents(directory: Path) -> list[str]:
    """What is in ``directory``, without stages of this kit and without what mkfs puts into a new file system."""
    return [name for name in os.listdir(directory) if not name.startswith(STAGE_PREFIX) and name != "lost+found"]


def _exchange(tree: Path, target: Path, aside: Path) -> None:
    try:
        swap(tree, target)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL):
            raise
        # A file system that can't exchange: for an instant there is no target.
        target.rename(aside / "former")
        tree.rename(target)


def _entries(tree: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(tree) as found:
        yield from sorted(found, key=lambda entry: entry.name)


def _check_merge(tree: Path, target: Path, top: Path) -> None:
    """Refuse where one side has a directory and the other a file or link: neither may silently go."""
    for entry in _entries(tree):
        there = target / entry.name
        try:
            mode = there.lstat().st_mode
        except FileNotFoundError:
            continue
        new = entry.is_dir(follow_symlinks=False)
        if new != stat.S_ISDIR(mode):
            kinds = ("a directory", "a file or a link")
            raise StepFailure(
                f"{there} is {kinds[new]} and in the archive {kinds[not new]}: remove it, or choose"
                f' existing: "replace"; {top} was left as it is',
                code="merge_conflict",
            )
        if new:
            _check_merge(tree / entry.name, there, top)


def _merge(tree: Path, target: Path) -> None:
    for entry in _entries(tree):
        source, there = tree / entry.name, target / entry.name
        with suppress(FileNotFoundError):
            if stat.S_ISDIR(there.lstat().st_mode) and entry.is_dir(follow_symlinks=False):
                _merge(source, there)
                continue
        source.rename(there)
