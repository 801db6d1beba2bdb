"""Signed requests over one pool of connections."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import urllib3

from s3_transfer.errors import TRANSPORT_ERRORS, from_answer, from_transport
from s3_transfer.settings import Settings
from s3_transfer.signing import UNSIGNED, Signer, canonical

CHUNK_BYTES = 1024**2
"""How much is read from or written to a connection at once."""
_EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
_MAX_ANSWER_BYTES = 16 * 1024**2
_MAX_CONNECT_S = 10.0
_AGENT = "outrider-step-s3"

Body = bytes | Iterable[bytes]


class Transport:
    """Requests to one bucket. Used from several threads at once."""

    def __init__(self, settings: Settings, connections: int) -> None:
        self.settings = settings
        host, _, port = settings.host.rpartition(":") if _has_port(settings.host) else (settings.host, "", "")
        options: dict[str, Any] = {
            "timeout": urllib3.Timeout(connect=min(_MAX_CONNECT_S, settings.idle_s), read=settings.idle_s),
            "maxsize": connections + 1,
            "retries": False,
            "blocksize": CHUNK_BYTES,
        }
        where = host.strip("[]"), int(port) if port else None
        self._pool: urllib3.HTTPConnectionPool
        if settings.secure:
            self._pool = urllib3.HTTPSConnectionPool(*where, ssl_context=settings.tls(), **options)
        else:
            self._pool = urllib3.HTTPConnectionPool(*where, **options)
        given = settings.credentials
        self._signer = Signer(given, settings.region) if given else None

    @contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """Raise StepFailure for whatever goes wrong on the wire while ``what`` is transferred."""
        try:
            yield
        except TRANSPORT_ERRORS as error:
            raise from_transport(error, what=what, endpoint=self.settings.shown) from error

    def open(
        self,
        method: str,
        key: str = "",
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: Body | None = None,
        *,
        sha256: str | None = None,
        what: str = "",
    ) -> urllib3.BaseHTTPResponse:
        """Send a request; the answer with its body still to be read. Raises StepFailure for any but a success.

        A ``body`` in pieces comes with its Content-Length among the headers. ``sha256`` is its digest, as hexadecimal;
        over TLS it may be left out, since TLS itself lets nothing be changed on the way.
        """
        what = what or (self.settings.object(key) if key else f"bucket {self.settings.bucket!r}")
        text = canonical(query or {})
        sent = {"Accept-Encoding": "identity", "User-Agent": _AGENT, **(headers or {})}
        if body is None:
            sha256 = _EMPTY_SHA256
        elif isinstance(body, bytes) and sha256 is None:
            sha256 = hashlib.sha256(body).hexdigest()
        if self._signer:
            self._signer.headers(method, self.settings, key, text, sent, sha256 or UNSIGNED)
        with self.errors(what):
            answer = self._pool.urlopen(
                method,
                self.settings.path(key) + (f"?{text}" if text else ""),
                body=body,
                headers=sent,
                redirect=False,
                assert_same_host=False,
                preload_content=False,
                decode_content=False,
            )
            if answer.status >= 300:
                said = _whole(answer)
        if answer.status >= 300:
            raise from_answer(
                answer.status,
                said,
                answer.headers,
                what=what,
                bucket=self.settings.bucket,
                endpoint=self.settings.shown,
            )
        return answer

    def call(self, *args: Any, **options: Any) -> tuple[Mapping[str, str], bytes]:
        """``open``, and the answer read to its end: its headers and its body."""
        answer = self.open(*args, **options)
        with self.errors(options.get("what") or f"bucket {self.settings.bucket!r}"):
            return answer.headers, _whole(answer)


def _whole(answer: urllib3.BaseHTTPResponse) -> bytes:
    """The body to its end. A single read may return less than there is, and then not notice that it was cut."""
    body = bytearray()
    while (chunk := answer.read(CHUNK_BYTES)) and len(body) < _MAX_ANSWER_BYTES:
        body += chunk
    answer.release_conn()
    return bytes(body)


def _has_port(host: str) -> bool:
    return host.rpartition(":")[2].isdigit() and not host.endswith("]")
