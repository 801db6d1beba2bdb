"""Starts agents and servers in a twentieth of a second: each is a fork of a process that has everything imported.

What runs in the fork is `outrider agent run` (or whatever is asked for) from its arguments on, in a process of its
own that can be killed, stopped and armed. Fault tests start hundreds of them; a second of imports each is most of
what they would take.

`Launcher` is the tests' side. Run as a program, this module is the process that forks: requests come as lines of
JSON on stdin, and the ends of children go out on stdout.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OUTRIDER = Path(sys.executable).with_name("outrider")
ROOT = Path(__file__).resolve().parents[2]


class Child:
    """A process of the product. Its output is appended to a file."""

    def __init__(
        self,
        pid: int,
        number: int = 0,
        launcher: Launcher | None = None,
        process: subprocess.Popen[bytes] | None = None,
    ) -> None:
        """``number``: which of the launcher's forks it is."""
        self.pid = pid
        self._number = number
        self._launcher = launcher
        self._process = process
        self._status: int | None = None

    def poll(self) -> int | None:
        """How it ended, as subprocess says it (negative: by that signal); None: it runs."""
        if self._status is None:
            if self._process is not None:
                self._status = self._process.poll()
            elif self._launcher is not None:
                self._status = self._launcher.ended(self._number)
        return self._status

    def wait(self, within_s: float = 30.0) -> int:
        """Until it has ended."""
        deadline = time.monotonic() + within_s
        while (status := self.poll()) is None:
            assert time.monotonic() < deadline, f"process {self.pid} did not end within {within_s:g} s"
            time.sleep(0.01)
        return status

    def send(self, number: int) -> None:
        """Send a signal; one that has ended gets none."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.send(signal.SIGKILL)
        self.wait()

    def stop(self, within_s: float = 30.0) -> int:
        """SIGTERM, and wait; how it ended."""
        self.send(signal.SIGTERM)
        return self.wait(within_s)

    def freeze(self) -> None:
        """SIGSTOP."""
        self.send(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self.send(signal.SIGCONT)


class Launcher:
    """The tests' side: `start` forks, `exec` starts the command itself (where something has to stand before it)."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.launcher"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
        )
        # By number: in the time that these tests take the kernel gives a process id away again.
        self._ended: dict[int, int] = {}
        self._started: list[tuple[int, int]] = []
        self._news = threading.Condition()
        self._asking = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def start(self, arguments: Sequence[object], env: Mapping[str, str], output: Path) -> Child:
        """`outrider` with these arguments, as a fork."""
        request = {"arguments": [str(each) for each in arguments], "env": dict(env), "output": str(output)}
        with self._asking:
            assert self._server.stdin is not None
            self._server.stdin.write(json.dumps(request).encode() + b"\n")
            self._server.stdin.flush()
            with self._news:
                found = self._news.wait_for(lambda: self._started, timeout=60)
                assert found, "the launcher does not answer"
                pid, number = self._started.pop(0)
                return Child(pid, number, self)

    @staticmethod
    def exec(arguments: Sequence[object], env: Mapping[str, str], output: Path, prefix: Sequence[str] = ()) -> Child:
        """`outrider` as a program, behind ``prefix`` (``ip netns exec x``, say)."""
        with output.open("ab") as file:
            process = subprocess.Popen(
                [*prefix, str(OUTRIDER), *map(str, arguments)], env=dict(env), stdout=file, stderr=file
            )
        return Child(process.pid, process=process)

    def ended(self, number: int) -> int | None:
        """How this child ended; None: it runs."""
        with self._news:
            return self._ended.get(number)

    def close(self) -> None:
        """End the process that forks; its children are the callers' to end."""
        if self._server.stdin is not None:
            self._server.stdin.close()
        self._server.wait(30)
        self._reader.join(10)
        if self._server.stdout is not None:
            self._server.stdout.close()

    def _read(self) -> None:
        assert self._server.stdout is not None
        for line in self._server.stdout:
            message: dict[str, int] = json.loads(line)
            with self._news:
                if "started" in message:
                    self._started.append((message["started"], message["number"]))
                else:
                    self._ended[message["ended"]] = message["status"]
                self._news.notify_all()


def _serve() -> None:
    import server_core.server  # noqa: F401 - imported to be there in every fork
    from agent_core.plugins import PluginHost

    PluginHost.load(None, [])
    answers = sys.stdout.buffer
    woken, wake = os.pipe()
    for descriptor in (woken, wake):
        os.set_blocking(descriptor, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    numbers = itertools.count(1)
    running: dict[int, int] = {}
    buffer = b""
    while True:
        ready, _, _ = select.select([0, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            for pid, status in _reap():
                answers.write(json.dumps({"ended": running.pop(pid), "status": status}).encode() + b"\n")
            answers.flush()
        if 0 in ready:
            read = os.read(0, 65536)
            if not read:
                return
            buffer += read
            while b"\n" in buffer:
                line, _, buffer = buffer.partition(b"\n")
                pid = os.fork()
                if pid == 0:
                    os.close(woken)
                    os.close(wake)
                    _become(json.loads(line))
                running[pid] = next(numbers)
                answers.write(json.dumps({"started": pid, "number": running[pid]}).encode() + b"\n")
                answers.flush()


def _reap() -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        found.append((pid, os.waitstatus_to_exitcode(status)))


def _become(request: dict[str, Any]) -> None:
    """In the fork: be the process that was asked for."""
    from outrider import failpoints
    from outrider.cli._main import run

    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request["env"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        failpoints.arm(os.environ.get(failpoints.ENVIRONMENT, ""))
        code = run(request["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve()
