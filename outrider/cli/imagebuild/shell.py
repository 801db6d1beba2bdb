"""Programs that the build starts, what it says while they run, and the one error it raises."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager


class BuildError(Exception):
    """The build can't go on. The text is one sentence with what, where and what would help."""


class UnknownImage(BuildError):
    """A name that no image here has."""


class Progress:
    """Says on stderr what is being done: one line that changes on a terminal, plain lines elsewhere."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.current = 0
        self._terminal = sys.stderr.isatty()
        self._label = ""
        self._started = 0.0
        self._said = 0.0

    @contextmanager
    def task(self, label: str) -> Iterator[None]:
        """One of the ``total`` tasks; its duration is said when it is done."""
        self.current += 1
        self._label, self._started = f"[{self.current}/{self.total}] {label}", time.monotonic()
        self._said = self._started
        self._line(self._label, end="" if self._terminal else "\n")
        try:
            yield
        except BaseException:
            self._line(f"{self._label}: failed", end="\n")
            raise
        self._line(f"{self._label}: done in {time.monotonic() - self._started:.1f} s", end="\n")

    def note(self, text: str) -> None:
        """What the current task is at. On a terminal it replaces the line; elsewhere it is said every ten seconds."""
        now = time.monotonic()
        if self._terminal:
            width = shutil.get_terminal_size().columns
            self._line(f"{self._label}: {text}"[: width - 8] + f" {now - self._started:.0f} s", end="")
        elif now - self._said >= 10:
            self._said = now
            self._line(f"{self._label}: {text}, {now - self._started:.0f} s", end="\n")

    def _line(self, text: str, end: str) -> None:
        sys.stderr.write(("\r\x1b[K" if self._terminal else "") + text + end)
        sys.stderr.flush()


def as_root(command: Sequence[str]) -> list[str]:
    """``command``, through sudo where this process is not root."""
    if os.geteuid() == 0:
        return list(command)
    if shutil.which("sudo") is None:
        raise BuildError(f"{command[0]} needs root, and there is no sudo here: run the build as root")
    return ["sudo", *command]


def run(
    command: Sequence[str],
    *,
    what: str,
    silence_s: float = 600.0,
    on_line: Callable[[str], None] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
) -> str:
    """Run ``command`` and return what it printed (both streams, in order).

    ``silence_s`` ends a program that prints nothing for that long. ``BuildError`` says that ``what`` failed and
    carries the last lines of its output.
    """
    try:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            cwd=cwd,
        )
    except FileNotFoundError as error:
        raise BuildError(f"{what} needs the program {command[0]!r}, which is not installed") from error
    assert process.stdout is not None
    output = bytearray()
    seen = 0
    with process:
        try:
            while True:
                ready, _, _ = select.select([process.stdout], [], [], silence_s)
                if not ready:
                    raise BuildError(f"{what} said nothing for {silence_s:.0f} s and was ended")
                chunk = os.read(process.stdout.fileno(), 65536)
                if not chunk:
                    break
                output += chunk
                end = output.rfind(b"\n")
                if on_line is not None and end > seen:
                    on_line(output[:end].rsplit(b"\n", 1)[-1].decode(errors="replace").strip())
                    seen = end
        except BaseException:
            process.kill()
            raise
    text = output.decode(errors="replace")
    if process.returncode != 0:
        tail = "\n".join(f"    {line}" for line in text.strip().splitlines()[-15:])
        raise BuildError(f"{what} failed with exit code {process.returncode}; its last words:\n{tail}")
    return text
