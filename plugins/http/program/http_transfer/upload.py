"""http.upload: send a file with PUT or POST, as it is or as part of a form."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any, BinaryIO

from outrider_stepkit import Meter, StepFailure
from outrider_stepkit.checksums import CHUNK

from http_transfer.client import Client
from http_transfer.failures import HttpFailure
from http_transfer.patience import persist

_MIN_CHUNK = 16 * 1024

Report = Callable[[int, int | None, str], None]


def upload(params: Mapping[str, Any], env: Mapping[str, str], report: Report) -> dict[str, Any]:
    """Send ``params["from"]``; the outputs of the step. ``report(done, total, rate)`` gets bytes.

    Raises StepFailure or OSError.
    """
    client = Client(params, env)
    source, form = params["from"], params.get("form")
    method = params.get("method") or ("POST" if form is not None else "PUT")
    expected = {name: params[name].lower() for name in ("sha256", "sha512") if params.get(name)}
    with _open(source) as file:
        body = _Body(file, source, form, expected, report, params.get("limit_bytes_per_s"))
        body.check(before=True)
        headers = {"Content-Length": str(len(body))}
        # A form says itself where its parts end; of a file the pipeline knows what it is, or nobody does.
        if form is not None or not any(name.lower() == "content-type" for name in params.get("headers", {})):
            headers["Content-Type"] = body.content_type

        def attempt() -> tuple[int, str | None]:
            with closing(client.send(method, headers, body)) as answer:
                return answer.status, answer.headers.get("ETag")

        try:
            status, etag = persist(attempt, lambda: 0, lambda error: method == "PUT" or _surely_not_done(error))
        except HttpFailure as error:
            if method == "PUT" or not error.temporary or error.status or not error.sent:
                raise
            raise StepFailure(
                f"{error}: whether {client.shown} took the POST is not known, so it was not sent again",
                code="outcome_unknown",
            ) from error
        body.check(before=False)
    outputs = {"path": source, "bytes": body.size, "status": status, **body.digests()}
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
    """What is sent: the file, of the length that it had when it was opened, hashed on its way; a form around it.

    Each iteration sends it from its start.
    """

    def __init__(
        self,
        file: BinaryIO,
        path: str,
        form: Mapping[str, Any] | None,
        expected: Mapping[str, str],
        report: Report,
        limit: int | None,
    ) -> None:
        self._file, self._path, self._expected = file, path, expected
        self.size = os.fstat(file.fileno()).st_size
        self._report, self._limit = report, limit
        self._sent = 0
        self._digests = self._new_digests()
        self.content_type, self._head, self._tail = "application/octet-stream", b"", b""
        if form is not None:
            boundary = f"outrider-{secrets.token_hex(16)}"
            self.content_type = f"multipart/form-data; boundary={boundary}"
            self._head, self._tail = form_around(boundary, form, os.path.basename(path))

    def __len__(self) -> int:
        return len(self._head) + self.size + len(self._tail)

    def __iter__(self) -> Iterator[bytes | memoryview]:
        if self._head:
            yield self._head
        yield from self._content()
        if self._tail:
            yield self._tail

    def _content(self) -> Iterator[memoryview]:
        meter = Meter(self.size, self._report, limit=self._limit)
        self._sent, self._digests = 0, self._new_digests()
        self._file.seek(0)
        size = CHUNK if self._limit is None else min(CHUNK, max(_MIN_CHUNK, self._limit // 4))
        buffer = memoryview(bytearray(size))
        while self._sent < self.size:
            count = os.readv(self._file.fileno(), [buffer[: self.size - self._sent]])
            if not count:
                raise self._changed()
            self._hash(buffer[:count])
            yield buffer[:count]
            self._sent += count
            meter.add(count)
        meter.skip(0)

    def check(self, *, before: bool) -> None:
        """Raises StepFailure if the file is not what it has to be: before it is sent, or what was sent of it."""
        if before:
            if not self._expected:
                return
            for _ in self._read_all():
                pass
        elif self._sent != self.size:
            raise StepFailure(f"the server took only {self._sent} of {self.size} bytes of {self._path}", code="cut")
        found = self.digests()
        for name, digest in self._expected.items():
            if found[name] != digest:
                if not before:
                    raise self._changed()
                raise StepFailure(
                    f"{self._path} has {name.upper()[:3]}-{name[3:]} {found[name]}, not {digest}; nothing was sent",
                    code="checksum_mismatch",
                )

    def _read_all(self) -> Iterator[None]:
        self._digests = self._new_digests()
        self._file.seek(0)
        buffer = memoryview(bytearray(CHUNK))
        while count := os.readv(self._file.fileno(), [buffer]):
            self._hash(buffer[:count])
            yield

    def _hash(self, data: memoryview) -> None:
        for digest in self._digests.values():
            digest.update(data)

    def _new_digests(self) -> dict[str, Any]:
        return {name: hashlib.new(name) for name in {"sha256", *self._expected}}

    def digests(self) -> dict[str, str]:
        """Of what was read last, by name."""
        return {name: digest.hexdigest() for name, digest in self._digests.items()}

    def _changed(self) -> StepFailure:
        return StepFailure(
            f"{self._path} was changed while it was being sent: stop what writes to it first", code="changed"
        )


def form_around(boundary: str, form: Mapping[str, Any], name: str) -> tuple[bytes, bytes]:
    """What stands before and after the file in a form (RFC 7578). ``form`` is the parameter, ``name`` the file's."""
    lines: list[str] = []
    for field, value in form.get("fields", {}).items():
        lines += [f"--{boundary}", f'Content-Disposition: form-data; name="{_quoted(field)}"', "", value]
    filename = form.get("filename") or name
    lines += [
        f"--{boundary}",
        f'Content-Disposition: form-data; name="{_quoted(form["file"])}"; filename="{_quoted(filename)}"',
        f"Content-Type: {form.get('content_type', 'application/octet-stream')}",
        "",
        "",
    ]
    return "\r\n".join(lines).encode(), f"\r\n--{boundary}--\r\n".encode()


def _quoted(name: str) -> str:
    """As browsers do it (HTML, multipart/form-data encoding algorithm)."""
    return name.encode("utf-8", "replace").decode().replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
