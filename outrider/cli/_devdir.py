"""What can be refused before `outrider dev` loads anything: a directory in use, another's context, a taken port."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from outrider.cli._context import ContextFile
from outrider.cli._output import note
from outrider.errors import Conflict, InvalidInput
from outrider.locking import take_lock


def default_folder() -> Path:
    """``outrider/dev`` in the user's data directory (XDG base directory specification)."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "outrider" / "dev"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the data directory; it is made if it is not there. Raises Conflict if another `outrider dev` holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise InvalidInput(f"the data directory {folder} can't be used: {error.strerror}") from error
    with file:
        try:
            take_lock(file.fileno())
        except BlockingIOError as error:
            raise Conflict(
                f"another `outrider dev` runs on {folder}", hint="stop it, or give another --data-dir"
            ) from error
        yield


def spare_other_contexts(contexts: ContextFile, name: str, folder: Path) -> None:
    """Refuse to overwrite a context that is not that of ``folder``. Raises Conflict.

    That of an `outrider dev` that no longer runs may go; it is said.
    """
    there = contexts.contexts.get(name)
    if there is None or there.get("data_dir") == str(folder):
        return
    what = f"the context {name!r} in {contexts.path}"
    hint = "choose another name with --context NAME"
    if "data_dir" not in there:
        raise Conflict(f"{what} is not one that `outrider dev` made", hint=hint)
    if _listens(str(there.get("server"))):
        raise Conflict(f"{what} is of another `outrider dev` that runs on {there['data_dir']}", hint=hint)
    note(f"{what} was of a former `outrider dev` on {there['data_dir']}; it is replaced")


def _listens(server: str) -> bool:
    host, _, port = server.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=0.5):
            return True
    except (OSError, ValueError):
        return False
