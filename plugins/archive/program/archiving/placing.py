"""From the staged tree to where it belongs."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from outrider_stepkit import StepFailure
from outrider_stepkit.publish import STAGE_PREFIX, is_mount, move_all, swap, sync_directory, sync_filesystem


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


def publish(tree: Path, target: Path, existing: str) -> None:
    """Make ``tree`` (complete, in a stage for ``target``) the content of ``target``.

    A new directory and ``replace`` appear in one instant. ``merge``, and a target that is the root of a volume (which
    can't be renamed), go entry by entry; whether all of them can is checked before the first.
    """
    check_target(target, existing)
    sync_filesystem(tree)
    if not target.exists():
        tree.rename(target)
        sync_directory(target.parent)
    elif existing == "merge":
        move_all(tree.parent, target, _merged(tree, target))
    elif is_mount(target) or not _exchanged(tree, target):
        everything = ((f"{tree.name}/{name}", name) for name in os.listdir(tree))
        move_all(tree.parent, target, everything, former=_contents(target))


def _contents(directory: Path) -> list[str]:
    """What is in ``directory``, without stages of this kit and without what mkfs puts into a new file system."""
    return [name for name in os.listdir(directory) if not name.startswith(STAGE_PREFIX) and name != "lost+found"]


def _exchanged(tree: Path, target: Path) -> bool:
    """Exchange them; False on a file system that can't."""
    try:
        swap(tree, target)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL):
            raise
        return False
    sync_directory(target.parent)
    return True


def _merged(tree: Path, target: Path) -> Iterator[tuple[str, str]]:
    """What to move, as paths in the stage and in the target: whole directories where the target has none.

    Refuses where one side has a directory and the other a file or link: neither may silently go.
    """
    folders = [""]
    while folders:
        folder = folders.pop()
        with os.scandir(tree / folder) as found:
            entries = list(found)
        for entry in entries:
            name = folder + entry.name
            there = target / name
            new = entry.is_dir(follow_symlinks=False)
            try:
                mode = there.lstat().st_mode
            except FileNotFoundError:
                yield f"{tree.name}/{name}", name
                continue
            if new != stat.S_ISDIR(mode):
                kinds = ("a directory", "a file or a link")
                raise StepFailure(
                    f"{there} is {kinds[new]} and in the archive {kinds[not new]}: remove it, or choose"
                    f' existing: "replace"; {target} was left as it is',
                    code="merge_conflict",
                )
            if new:
                folders.append(f"{name}/")
            else:
                yield f"{tree.name}/{name}", name
