"""The program 7zz: it decodes and encodes, and decides nothing about names and places.

To unpack, it writes the contents of all entries, one after another, into a pipe; which file each belongs to is known
from headers that were vetted before. A password goes through its standard input: arguments can be seen by others.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from typing import IO

from outrider_stepkit import StepFailure

from archiving.formats import PASSWORD_ENV, Damaged
from archiving.names import shown
from archiving.streams import Incoming
from archiving.tarhead import BadHeader


def program() -> str | None:
    """Where 7zz is, if it is there. (Debian's package is called 7zip.)"""
    return shutil.which("7zz")


class Contents:
    """The contents of all entries of an archive, in its order, decoded by 7zz in a process of its own."""

    def __init__(self, path: str, password: str | None) -> None:
        command = program()
        assert command is not None
        self._path = path
        self._messages: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed by close)
        reader, writer = _data_pipe()
        try:
            self._process = subprocess.Popen(
                [command, "x", "-so", "-bd", "-y", "-spd", "-snl", "--", path],
                stdin=subprocess.PIPE,
                stdout=writer,
                stderr=self._messages,
                env=environment(),
            )
        finally:
            os.close(writer)
        self._reader = reader
        hand_over(self._process, password)
        self._stream = Incoming.of_descriptor(reader)

    def entry(self, name: str, size: int, checksum: int | None) -> Iterator[memoryview]:
        """The next ``size`` bytes, in pieces; verified against the CRC-32 ``checksum`` where there is one."""
        found = 0
        for piece in self._stream.pieces(size, name):
            if checksum is not None:
                found = zlib.crc32(piece, found)
            yield piece
        if checksum is not None and found != checksum:
            raise BadHeader(f"the checksum of {shown(name)} does not match")

    def finish(self) -> None:
        """Everything was read: 7zz must be content, too."""
        if self._stream.upto(1):
            raise BadHeader("it holds more than its headers say")
        self._judge()

    def explained(self, error: StepFailure) -> StepFailure:
        """What 7zz itself has to say, where ``error`` is about damage: it may be a wrong password."""
        if not isinstance(error, Damaged):
            return error
        try:
            # It may also wait for somebody to read what it decodes: then it has no reason of its own.
            self._process.wait(timeout=2)
            self._judge()
        except subprocess.TimeoutExpired:
            pass
        except StepFailure as failure:
            return failure
        return error

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._reader)
        self._messages.close()

    def _judge(self) -> None:
        code = self._process.wait()
        if code:
            self._messages.seek(0)
            raise failure_of(self._path, code, self._messages.read(65536).decode("utf-8", "replace"))


def _data_pipe() -> tuple[int, int]:
    """A pipe with as much room as the kernel gives without asking."""
    reader, writer = os.pipe()
    with contextlib.suppress(OSError):
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1024 * 1024)
    return reader, writer


def environment() -> dict[str, str]:
    """Nothing of ours: no secret, and one language."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}


def hand_over(process: subprocess.Popen[bytes], password: str | None, times: int = 1) -> None:
    """Answer 7zz's question for a password; without one it sees the end of its input, and gives up."""
    assert process.stdin is not None
    try:
        if password is not None:
            process.stdin.write((password + "\n").encode() * times)
        process.stdin.close()
    except BrokenPipeError:
        pass  # it has ended; why, it has said elsewhere


def failure_of(path: str, code: int, messages: str) -> StepFailure:
    """The sentence for a 7zz that ended with ``code``."""
    lower = messages.lower()
    if "wrong password" in lower:
        return StepFailure(f"the password in {PASSWORD_ENV} is not that of {path}", code="wrong_password")
    if "break signaled" in lower or "enter password" in lower:
        return encrypted(path)
    if "unsupported method" in lower:
        return StepFailure(f"{path} uses a compression that is not supported", code="archive_unsupported")
    if "can't allocate" in lower or "not enough memory" in lower or code in (-9, 8):
        return StepFailure(
            f"there is too little memory for {path} (its dictionary may be large): raise resources.memory",
            code="memory",
        )
    lines = [line.strip() for line in messages.splitlines()]
    reasons = [line for line in lines if line and line not in ("ERRORS:", "Archives with Errors: 1")]
    why = "; ".join(dict.fromkeys(reasons[:3])) or f"7zz ended with {code}"
    return Damaged(path, why.removeprefix("ERROR: "))


def encrypted(path: str) -> StepFailure:
    return StepFailure(
        f"{path} is encrypted: give its password to the step as the env {PASSWORD_ENV}", code="archive_encrypted"
    )
