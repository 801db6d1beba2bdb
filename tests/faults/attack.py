"""Kills a server at one commit after another while something is under way that needs all of them."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable
from types import TracebackType

from tests.faults.rig import Rig

_PATIENCE_S = 3.0
# Not only at the start of a line: the agent writes to the same file.
_FIRED = re.compile(r"failpoint (\S+): (?:kill|fail)")


class Attack:
    """Arms the rig's server at several failpoints at once; whenever one ends it, it is started with those left.

    While it is entered the server comes back by itself. On leaving, the server runs on without any.
    """

    def __init__(self, rig: Rig, points: Iterable[str], *, action: str = "kill", **env: str) -> None:
        self._rig = rig
        self._action = action
        self._env = env
        self._left = list(points)
        self._output = rig.folder / "output.log"
        self._read = 0
        self._noting = threading.Lock()  # of the tests' thread and of this one's
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._started_at = 0.0
        self._fired = 0
        self.deaths: list[int] = []
        """How the server ended each time; negative: by that signal."""
        self.said = ""
        """What server and agent wrote meanwhile."""

    def __enter__(self) -> Attack:
        self._read = self._output.stat().st_size
        self._rig.server.kill()
        self._start()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ending.set()
        self._thread.join(30)
        self._note()
        if self._action == "kill" and self._fired > len(self.deaths):
            self.deaths.append(self._rig.server.wait())  # it had said so, and was not gone yet
        self._rig.server.kill()
        self._rig.start_server(**self._env)

    @property
    def left(self) -> list[str]:
        """The failpoints that were not reached yet."""
        self._note()
        return list(self._left)

    def until_spent(self, within_s: float = 30.0) -> None:
        """Until every failpoint was reached; fails with those that never are."""
        try:
            self._rig.until(lambda: not self.left, within_s)
        except AssertionError as error:
            raise AssertionError(f"never reached: {self.left}\n{error}") from error

    def _start(self) -> None:
        armed = ", ".join(f"{point}={self._action}" for point in self._left)
        self._rig.start_server(failpoints=armed, **self._env)
        self._started_at = time.monotonic()

    def _watch(self) -> None:
        while not self._ending.wait(0.01):
            status = self._rig.server.poll()
            if status is not None:
                if status < 0 or self._action != "kill":
                    self.deaths.append(status)  # another end is that of a start that found its port taken
                self._rig.kills += 1
                self._note()
                self._start()
            elif time.monotonic() - self._started_at > _PATIENCE_S:
                self._started_at = time.monotonic()
                self._hurry_agent()

    def _hurry_agent(self) -> None:
        # One that never got a heartbeat answered between two kills waits up to half a minute, rightly. A new one
        # begins with the first wait.
        status = self._rig.status()
        if status and not status["server"]["connected"]:
            self._rig.kill_agent()

    def _note(self) -> None:
        with self._noting:
            self._read_on()

    def _read_on(self) -> None:
        with self._output.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        self._read += len(data)
        text = data.decode(errors="replace")
        self.said += text
        for point in _FIRED.findall(text):
            if point in self._left:
                self._left.remove(point)
                self._fired += 1
