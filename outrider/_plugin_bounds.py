"""Running a stranger's code: for a time, in a thread of its own, and whatever it raises is only its own failure."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

from outrider._plugin_discovery import PluginError

LIMIT_S = 30.0
"""How long the import of a plugin, or a call of one of its hooks, may take, in seconds."""

T = TypeVar("T")


class Raised(Exception):
    """What a stranger's code raised: ``error``. Also KeyboardInterrupt is only its own then, and not a person's."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(type(error).__name__))
        self.error = error


def guarded(call: Callable[[], T], what: str, limit_s: float = LIMIT_S) -> T:
    """Call a stranger's code, in a thread of its own, for ``limit_s`` seconds at most.

    Raises PluginError, ``what`` with what was raised, and that as its cause; also for SystemExit and AssertionError,
    which are only its own failure, not the host's.
    """
    try:
        return bounded(call, limit_s)
    except Raised as raised:
        raise PluginError(f"{what}: {said(raised.error)}") from raised.error
    except TimeoutError as error:
        raise PluginError(f"{what}: it had not ended after {limit_s:g} s") from error


def bounded(call: Callable[[], T], limit_s: float) -> T:
    """Call a stranger's code in a thread of its own, and wait ``limit_s`` seconds for it.

    Raises Raised for whatever it raises, and TimeoutError: then it is told to end. A loop of Python ends at that;
    what waits in the system stays behind, and is ended with the process.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="plugin", daemon=True)
    thread.start()
    thread.join(limit_s)
    if outcome:
        return outcome[0]
    if failure:
        raise Raised(failure[0]) from failure[0]
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
    raise TimeoutError


def said(error: BaseException, limit: int = 400) -> str:
    """An exception in one line that can be shown and sent, whatever a stranger's ``__str__`` does."""
    try:
        text = " ".join(str(error).split())
    except BaseException:
        text = ""
    kind = type(error).__name__
    text = "".join(c if c.isprintable() else "\ufffd" for c in (f"{kind}: {text}" if text else kind))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def article(value: object) -> str:
    """A value by its kind, never by its own word: `a str`, `the class X`, `None`."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"{'an' if type(value).__name__[:1].lower() in 'aeiou' else 'a'} {type(value).__name__}"
