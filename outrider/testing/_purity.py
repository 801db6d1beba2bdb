"""Watching a function for what a pure one does not do: I/O, the clock, randomness, the environment.

Two nets. Python's audit events tell of files, processes and connections, however they are reached; a profile function
sees every call of a built-in, so also of a clock, whatever name it was imported by. Importing a module is no sin.
"""

from __future__ import annotations

import datetime
import os
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

# Audit events (docs.python.org/3/library/audit_events.html) by their beginning; what follows is what a person reads.
_EVENTS = {
    "open": "opens a file",
    "socket.": "uses the network",
    "subprocess.": "starts a process",
    "os.system": "starts a process",
    "os.exec": "starts a process",
    "os.fork": "starts a process",
    "os.posix_spawn": "starts a process",
    "os.listdir": "lists a directory",
    "os.scandir": "lists a directory",
    "os.putenv": "changes the environment",
    "os.unsetenv": "changes the environment",
    "os.": "touches the disk",
    "shutil.": "touches the disk",
    "tempfile.": "makes a temporary file",
    "sqlite3.": "opens a database",
    "urllib.Request": "uses the network",
    "http.client.": "uses the network",
    "ftplib.": "uses the network",
    "smtplib.": "uses the network",
}
_HARMLESS = {"fspath", "fsencode", "fsdecode", "get_blocking", "cpu_count", "WIFEXITED", "strerror"}
_NO_CLOCKS = {"mktime", "strptime"}  # of the module time; all the rest of it may be one, also what is added to it
_ENVIRON = {
    getattr(type(os.environ), name).__code__ for name in ("__getitem__", "__iter__", "__setitem__", "__delitem__")
}
# Rows of random._inst; a generator with a seed of its own is as pure as its seed.
_RANDOM = random._inst  # what random.random() and its fellows are methods of


class _Watch:
    """What is being watched in this process: the hook that audit events go to can't be taken away again."""

    def __init__(self) -> None:
        self.installed = False
        self.thread: int | None = None
        self.found: list[str] = []

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.thread != threading.get_ident():
            return
        for beginning, meaning in _EVENTS.items():
            if event.startswith(beginning):
                frame = sys._getframe(1)
                if not _importing(frame):
                    what = f" {arguments[0]!r}" if arguments and isinstance(arguments[0], str | bytes) else ""
                    self.note(f"{meaning}{what}", frame)
                return

    def profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code in _ENVIRON:
            if frame.f_back is not None and not _importing(frame):
                self.note("reads or changes the environment (os.environ)", frame.f_back)
        elif event == "c_call" and (meaning := _meaning(argument)) and not _importing(frame):
            self.note(meaning, frame)

    def note(self, what: str, frame: FrameType) -> None:
        sentence = f"it {what}{_place(frame)}"
        if sentence not in self.found:
            self.found.append(sentence)


_watch = _Watch()


@contextmanager
def watched() -> Iterator[list[str]]:
    """Watch this thread within the context; the list has a sentence for each thing that a pure function does not do."""
    if not _watch.installed:
        sys.addaudithook(_watch.audit)
        _watch.installed = True
    found: list[str] = []
    _watch.found, _watch.thread = found, threading.get_ident()
    former = sys.getprofile()
    sys.setprofile(_watch.profile)
    try:
        yield found
    finally:
        sys.setprofile(former)
        _watch.thread = None


def _meaning(function: Any) -> str:
    """What a call of a built-in is, if it is none that a pure function makes."""
    name, module, owner = function.__name__, getattr(function, "__module__", None), getattr(function, "__self__", None)
    if module == "time" and name not in _NO_CLOCKS:
        return f"reads the clock (time.{name})"
    if isinstance(owner, type) and issubclass(owner, datetime.date) and name in ("now", "utcnow", "today"):
        return f"reads the clock ({owner.__name__}.{name})"
    if owner is _RANDOM or (module == "posix" and name in ("urandom", "getrandom")):
        return "uses randomness"
    if module == "posix" and name not in _HARMLESS:
        return f"asks the system (os.{name})"
    if module == "_thread" and name.startswith("start_"):
        return "starts a thread"  # and what that does, nobody watches
    if module == "_posixsubprocess":
        return "starts a process"
    if module == "_socket":
        return f"uses the network (socket.{name})"
    return ""


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


_LIBRARY = tuple({str(Path(os.__file__).parent), str(Path(sys.base_prefix) / "lib")})


def _place(frame: FrameType | None) -> str:
    """The nearest line that is no library's."""
    while frame is not None:
        name = frame.f_code.co_filename
        ours = "outrider/testing/" in name.replace(os.sep, "/")
        if not name.startswith(("<", *_LIBRARY)) and "site-packages" not in name and not ours:
            return f", at {Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
