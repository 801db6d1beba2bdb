"""http.upload: send a file with PUT or POST."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any, BinaryIO

from outrider_stepkit import StepFailure, sha256_of

from http_transfer.client import Client, HttpFailure, persist

_CHUNK_BYTES = 1024**2

Report = Callable[[int, int], None]


def upload(params: Mapping[str, Any], env: Mapping[str, str], report: Report) -> dict[str, Any]:
    """Send ``params["from"]``; the outputs of the step. ``report(done, total)`` gets bytes.

    Raises StepFailure or OSError.
    """
    client = Client(params, env)
    source, method, expected = params["from"], params.get("method", "PUT"), params.get("sha256")
    with _open(source) as file:
        if expected is not None and (digest := sha256_of(source)) != expected.lower():
            raise StepFailure(
                f"{source} has SHA-256 {digest}, not {expected.lower()}; nothing was sent", code="checksum_mismatch"
            )
        body = _Body(file, source, report)
        headers = {"Content-Type": "application/octet-stream"}
        if any(name.lower() == "content-type" for name in params.get("headers", {})):
            headers = {}

        def attempt() -> tuple[int, str | None]:
            body.seek(0)
            # An empty body is given as bytes: requests would send a stream without length in chunks.
            with closing(client.send(method, headers, body if len(body) else b"")) as response:
                return response.status_code, response.headers.get("ETag")

        try:
            status, etag = persist(attempt, lambda: 0, lambda error: method == "PUT" or _surely_not_done(error))
        except HttpFailure as error:
            if method == "PUT" or not error.temporary or error.status or not error.sent:
                raise
            raise StepFailure(
                f"{error}: whether {client.shown} took the POST is not known, so it was not sent again",
                code="outcome_unknown",
            ) from error
        digest = body.hexdigest()
        if expected is not None and digest != expected.lower():
            raise _changed(source)
    if not body.size:
        report(0, 0)
    outputs = {"path": source, "bytes": body.size, "sha256": digest, "status": status}
    return outputs | ({"etag": etag} if etag else {})


def _surely_not_done(error: HttpFailure) -> bool:
    """Whether a POST may be sent again: it never reached the server, or was refused before it was carried out."""
    return not error.sent or error.status in {425, 429, 503}


def _open(path: str) -> BinaryIO:
    # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StepFailure(f"{path} is not a file: pack a directory with archive.create", code="not_a_file")
    return os.fdopen(descriptor, "rb", buffering=0)


class _Body:
    """The file as a request's body: of the length that it had when it was opened, and hashed while it is sent."""

    def __init__(self, file: BinaryIO, path: str, report: Report) -> None:
        self._file, self._path, self._report = file, path, report
        self.size = os.fstat(file.fileno()).st_size
        self._position = 0
        self._digest = hashlib.sha256()

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[bytes]:
        while chunk := self.read(_CHUNK_BYTES):
            yield chunk

    def read(self, size: int = -1) -> bytes:
        wanted = min(self.size - self._position, _CHUNK_BYTES if size < 0 else size)
        data = self._file.read(wanted)
        if wanted and not data:
            raise _changed(self._path)
        self._digest.update(data)
        self._position += len(data)
        if data:
            self._report(self._position, self.size)
        return data

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int) -> None:
        """Back to the start, for another try; there is no other place to go to."""
        if offset:
            raise ValueError("a body can only be sent from its start")
        self._file.seek(0)
        self._position = 0
        self._digest = hashlib.sha256()

    def hexdigest(self) -> str:
        """The SHA-256 of what was sent. Raises StepFailure if that is not the whole file."""
        if self._position != self.size:
            raise StepFailure(f"the server took only {self._position} of {self.size} bytes of {self._path}", code="cut")
        return self._digest.hexdigest()


def _changed(path: str) -> StepFailure:
    return StepFailure(f"{path} was changed while it was being sent: stop what writes to it first", code="changed")
