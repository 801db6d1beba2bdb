"""Points at which a test can make a process die, freeze or fail: off unless the environment arms them.

``failpoint("journal.attempt_intended.after")`` marks an instant at which a crash must lose nothing. In production
it costs a look into an empty dictionary. A test arms it in the environment of the process that it starts:

    OUTRIDER_FAILPOINTS="journal.attempt_intended.after=kill, store.create_run.before=stop@3"

=========  ==============================================================================================
``kill``   SIGKILL to this process: nothing is flushed, nothing is said
``stop``   SIGSTOP to this process, until somebody continues it
``fail``   OSError(ENOSPC), as a full disk raises it
``sleep``  a second's sleep of the calling thread
=========  ==============================================================================================

``@n`` means from the n-th time on that the point is reached (1 if left out); each arming acts once.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable

ENVIRONMENT = "OUTRIDER_FAILPOINTS"


def _fail() -> None:
    raise OSError(errno.ENOSPC, "no space left on device (failpoint)")


_ACTIONS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "fail": _fail,
    "sleep": lambda: time.sleep(1.0),
}
_lock = threading.Lock()
_armed: dict[str, tuple[str, int]] = {}


def failpoint(name: str) -> None:
    """Act as armed, if ``name`` is armed."""
    if _armed:
        _reach(name)


def arm(specification: str) -> None:
    """Arm what ``specification`` lists, instead of what was armed before. ValueError if it can't be read."""
    armed = {}
    for item in filter(None, (each.strip() for each in specification.split(","))):
        name, equals, action = item.partition("=")
        action, _, count = action.partition("@")
        if not equals or action not in _ACTIONS or not (count or "1").isdigit():
            actions = ", ".join(_ACTIONS)
            raise ValueError(f"{ENVIRONMENT}: {item!r} is not NAME=ACTION or NAME=ACTION@COUNT; actions: {actions}")
        armed[name.strip()] = (action, int(count or "1"))
    with _lock:
        _armed.clear()
        _armed.update(armed)


def _reach(name: str) -> None:
    with _lock:
        if name not in _armed:
            return
        action, left = _armed[name]
        if left > 1:
            _armed[name] = (action, left - 1)
            return
        del _armed[name]
    os.write(2, f"failpoint {name}: {action}\n".encode())  # nothing else can tell which of several it was
    _ACTIONS[action]()


arm(os.environ.get(ENVIRONMENT, ""))
