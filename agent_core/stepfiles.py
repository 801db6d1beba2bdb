"""The directory that a step sees as /outrider, handled as what it is: written to by a stranger's program.

Nothing in it is opened through a link, nothing is waited for, nothing is read beyond a limit.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from outrider.errors import StepFailed
from outrider.masking import contains_secret, mask_text

MAX_DIRECTORY_BYTES = 16 * 1024**2
MAX_OUTPUTS_BYTES = 64 * 1024
_MAX_FILE_BYTES = 1024**2
_MAX_PROGRESS_READ = 256 * 1024
_MAX_LINE = 16 * 1024
_MAX_ENTRIES = 1000


@dataclass(frozen=True, slots=True)
class ProgressLine:
    """The last word of a step about how far it is."""

    done: int
    total: int
    unit: str
    message: str


@dataclass(frozen=True, slots=True)
class ErrorLine:
    """The cause of a failure, as the step itself says it."""

    message: str
    code: str


class StepDirectory:
    """/outrider of one attempt, at ``path`` on the host."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.progress: ProgressLine | None = None
        self.error: ErrorLine | None = None
        self._offset = 0
        self._rest = b""

    def prepare(self, inputs: bytes, uid: int, gid: int) -> None:
        """Make it, with inputs.json and empty outputs and progress; what an interrupted try left is kept out.

        The directory itself stays the agent's: a step that could make files in it would have a place of any size
        (an unlinked file that it holds open is seen by nobody), and could put others in place of the agent's.
        """
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)
        directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name, content, mode in (
                ("inputs.json", inputs, 0o444),
                ("outputs", b"", 0o600),
                ("progress", b"", 0o600),
            ):
                descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode, dir_fd=directory)
                try:
                    os.fchmod(descriptor, mode)
                    if content:
                        _write_all(descriptor, content)
                    elif os.geteuid() == 0:
                        os.fchown(descriptor, uid, gid)
                finally:
                    os.close(descriptor)
            os.fchmod(directory, 0o755)
        finally:
            os.close(directory)

    def fence(self) -> None:
        """Rename it, so that a start of its container that is still on its way is refused by the engine."""
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(self._fenced)

    def unfence(self) -> None:
        """The container had started before the fence: what it writes counts. A mount follows its directory."""
        with contextlib.suppress(FileNotFoundError):
            self._fenced.rename(self.path)

    def remove(self) -> None:
        """With everything in it. The step's own directory stays: it says that the step was begun."""
        for path in (self.path, self._fenced):
            shutil.rmtree(path, ignore_errors=True)

    @property
    def _fenced(self) -> Path:
        return self.path.with_name(self.path.name + ".fenced")

    def size(self) -> int:
        """Bytes of everything in it; more than is allowed also where there are too many files to count."""
        total = count = 0
        with contextlib.suppress(OSError):
            for _, directories, files, descriptor in os.fwalk(self.path, follow_symlinks=False):
                for name in (*directories, *files):
                    count += 1
                    if count > _MAX_ENTRIES:
                        return MAX_DIRECTORY_BYTES + 1
                    with contextlib.suppress(OSError):
                        total += os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_blocks * 512
        return total

    def raw(self, name: str) -> bytes:
        """The file ``name`` as the step left it, up to 1 MiB; b"" if it is missing or no regular file."""
        try:
            return self._read(name, 0, _MAX_FILE_BYTES)
        except OSError:
            return b""

    def read_progress(self, secrets: tuple[str, ...] = ()) -> bool:
        """Take what has been added to `progress`, masked; whether there was anything new in it."""
        data = self._read("progress", self._offset, _MAX_PROGRESS_READ)
        if not data:
            return False
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_LINE:
            self._rest = b""
        changed = False
        for line in lines:
            changed = self._progress_line(line, secrets) or changed
        return changed

    def read_outputs(self) -> dict[str, Any]:
        """The objects in `outputs`, merged in order. StepFailed if they are not what the contract says."""
        try:
            data = self._read("outputs", 0, _MAX_FILE_BYTES + 1)
        except OSError as error:
            raise _refused("/outrider/outputs is not a regular file") from error
        if len(data) > _MAX_FILE_BYTES:
            raise _refused(f"/outrider/outputs is longer than {_MAX_FILE_BYTES} bytes", code="outputs_too_long")
        merged: dict[str, Any] = {}
        for number, line in enumerate(data.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line, parse_constant=_no_constant)
            except (ValueError, RecursionError) as error:
                raise _refused(f"line {number} of /outrider/outputs is not JSON") from error
            if not isinstance(value, dict):
                raise _refused(f"line {number} of /outrider/outputs is not a JSON object")
            if not _is_text(value):
                raise _refused(f"line {number} of /outrider/outputs has an infinite number, or half a surrogate pair")
            merged.update(value)
        return merged

    def _progress_line(self, line: bytes, secrets: tuple[str, ...]) -> bool:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            return False
        if not isinstance(value, dict):
            return False
        if isinstance(value.get("error"), str):
            self.error = ErrorLine(
                _text(" ".join(value["error"].split()), 2000, secrets), _word(value.get("code"), secrets)
            )
            return False
        self.progress = ProgressLine(
            _count(value.get("done")),
            _count(value.get("total")),
            _text(value.get("unit"), 32, secrets),
            _text(value.get("message"), 200, secrets),
        )
        return True

    def _read(self, name: str, offset: int, limit: int) -> bytes:
        """At most ``limit`` bytes; b"" if it is missing. OSError if it is no regular file, or a link."""
        directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            # NONBLOCK: opening a pipe that nobody writes to would wait for ever.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
            try:
                descriptor = os.open(name, flags, dir_fd=directory)
            except FileNotFoundError:
                return b""
        finally:
            os.close(directory)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(f"{name} is not a regular file")
            return os.pread(descriptor, limit, offset)
        finally:
            os.close(descriptor)


def _write_all(descriptor: int, content: bytes) -> None:
    # A disk that gets full takes a part of it, says so, and refuses the next write.
    done = 0
    while done < len(content):
        done += os.write(descriptor, memoryview(content)[done:])


def _refused(message: str, *, code: str = "outputs_invalid") -> StepFailed:
    return StepFailed(message, code=code, hint="each line is a JSON object of outputs")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0
    try:
        return max(0, min(int(value), 2**63 - 1))
    except (OverflowError, ValueError):
        return 0


def _text(value: object, limit: int, secrets: tuple[str, ...]) -> str:
    """Masked before it is cut: half a secret would not be found."""
    return mask_text(str(value or ""), secrets).encode("utf-8", "replace").decode()[:limit]


def _is_text(value: dict[str, Any]) -> bool:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return False
    return True


def _word(value: object, secrets: tuple[str, ...]) -> str:
    text = value if isinstance(value, str) and not contains_secret(value.encode("utf-8", "replace"), secrets) else ""
    return text if text.replace("_", "").isalnum() and text.isascii() and len(text) <= 64 else "step_failed"
