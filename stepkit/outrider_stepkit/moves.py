"""Publishing that takes more than one rename: into a directory that exists, or of several files.

A cancellation waits until the last of them. A kill does not, so a journal of all moves lies in the stage while they are
made, and whoever next stages for the same place finishes what it says (see publish.py).

Each move has one end in the stage, which nobody else touches. Whether something is there tells whether the move has
been made, so the journal is written once, and can be gone through again from any state.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

JOURNAL = ".outrider-journal"
_VERSION = "1"
_OUT, _IN = "out", "in"  # as the target sees it
_PIECE = 1024 * 1024
_IN_THE_WAY = (errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST)

Move = tuple[str, str, str]
"""Out of or into the target, the path in the stage, the path in the target."""


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A cancellation (SIGTERM, or SIGINT at a terminal) that comes in this block acts when it has ended.

    SIGKILL follows after the node's grace, so the block must be short.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are handled in the main thread alone
        return
    came: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        came.append(number)

    # Not by a mask of signals: another thread would take them, and Python runs the handler in this one all the same.
    former = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            former[number] = signal.signal(number, note)
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


def move_all(
    stage: Path, target: Path, moves: Iterable[tuple[str, str]], *, former: Iterable[str] | None = None
) -> None:
    """Move files and directories out of ``stage`` into the directory ``target``: the one beside it or around it.

    ``moves`` are pairs of a path in the stage and one in the target; all of them are drawn before the first is made, so
    what they raise leaves the target as it is. What is to be moved must be on the disk.

    With ``former``, names in the target that make room first, an OSError on the way puts everything back. Without, what
    has been replaced by then stays replaced. The OSError is raised in both cases. Where putting back fails as well, the
    stage keeps its journal and must not be removed: the next attempt tries again.
    """
    fresh = stage / f"{JOURNAL}.new"
    with fresh.open("wb") as file:
        _put_fields(file.write, _VERSION, "merge" if former is None else "replace", _way_to(stage, target))
        if former is not None:
            (stage / "former").mkdir()
        for number, name in enumerate(former or ()):
            _put_fields(file.write, _OUT, f"former/{number}", name)
        for inside, name in moves:
            _put_fields(file.write, _IN, inside, name)
        file.flush()
        os.fsync(file.fileno())
    with uninterrupted():
        os.replace(fresh, stage / JOURNAL)
        sync_directory(stage)
        _carry_out(stage, target)


def is_unfinished(stage: Path) -> bool:
    """Whether something of ``stage`` is still to be moved, or put back."""
    return os.path.lexists(stage / JOURNAL)


def finish(stage: Path, name: str) -> bool:
    """Go on with the moves of ``stage``, whose process is dead, if they are into the directory ``name`` beside it or
    the one around it; whether the stage may be removed then.

    Raises OSError where things can neither be moved nor put back.
    """
    version, _, way = _head(stage)
    # Another name can look like ours where it is long. What makes no sense was not written by this kit.
    if version != _VERSION or way not in ("..", f"../{name}") or not all(map(_is_sound, _moves(stage))):
        return False
    target = stage.parent if way == ".." else stage.parent / name
    try:
        with uninterrupted():
            _carry_out(stage, target, again=True)
    except OSError as error:
        if is_unfinished(stage):
            raise
        print(f"what a killed attempt had begun to publish in {target} could not be finished: {error}")
    else:
        print(f"finished what a killed attempt had begun to publish in {target}")
    return True


def sync_directory(path: Path) -> None:
    """Have the names in ``path`` reach the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _carry_out(stage: Path, target: Path, *, again: bool = False) -> None:
    can_go_back = _head(stage)[1] == "replace"
    displaced = stage if again and can_go_back else None
    touched = {os.fspath(target)}
    try:
        for way, inside, name in _moves(stage):
            here, there = os.path.join(stage, inside), os.path.join(target, name)
            if way == _IN:
                _put(here, there, displaced)
                touched.add(os.path.dirname(there))
            elif not os.path.lexists(here):
                with suppress(FileNotFoundError):
                    os.rename(there, here)
        for directory in touched:
            sync_directory(Path(directory))
    except BaseException:
        if can_go_back:
            _go_back(stage, target)
        (stage / JOURNAL).unlink()
        raise
    (stage / JOURNAL).unlink()
    # Before the stage is removed: a journal that outlived a part of it would be read wrongly.
    sync_directory(stage)


def _go_back(stage: Path, target: Path) -> None:
    for way, inside, name in reversed(list(_moves(stage))):
        here, there = os.path.join(stage, inside), os.path.join(target, name)
        if way == _OUT:
            _put(here, there, stage)
        elif not os.path.lexists(here):
            with suppress(FileNotFoundError):
                os.rename(there, here)


def _put(source: str, there: str, displaced: Path | None) -> None:
    """Move ``source``, if it is still there. What somebody has put into its way goes to ``displaced``, if given."""
    try:
        os.replace(source, there)
    except FileNotFoundError:
        if os.path.lexists(source):
            # The machine went down before the new directory had reached the disk.
            os.makedirs(os.path.dirname(there), exist_ok=True)
            os.replace(source, there)
    except OSError as error:
        if displaced is None or error.errno not in _IN_THE_WAY:
            raise
        os.rename(there, displaced / os.urandom(6).hex())
        os.replace(source, there)


def _way_to(stage: Path, target: Path) -> str:
    # Relative: the next attempt may have the volume mounted elsewhere.
    if target == stage.parent:
        return ".."
    if target.parent != stage.parent:
        raise ValueError(f"{target} is neither beside {stage} nor around it")
    return f"../{target.name}"


def _put_fields(write: Callable[[bytes], object], *fields: str) -> None:
    write(b"".join(os.fsencode(field) + b"\0" for field in fields))


def _head(stage: Path) -> tuple[str, str, str]:
    """Version, kind, and the way from the stage to the target."""
    fields = _fields(stage / JOURNAL)
    return next(fields, ""), next(fields, ""), next(fields, "")


def _moves(stage: Path) -> Iterator[Move]:
    fields = _fields(stage / JOURNAL)
    for _ in range(3):
        next(fields, "")
    for way in fields:
        yield way, next(fields, ""), next(fields, "")


def _fields(journal: Path) -> Iterator[str]:
    """In pieces: a journal may have a million moves."""
    with journal.open("rb") as file:
        rest = b""
        while piece := file.read(_PIECE):
            *whole, rest = (rest + piece).split(b"\0")
            yield from map(os.fsdecode, whole)


def _is_sound(move: Move) -> bool:
    way, *paths = move
    return way in (_OUT, _IN) and all(
        path and not path.startswith("/") and ".." not in path.split("/") for path in paths
    )
