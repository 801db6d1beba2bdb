"""One connection at a time to the origin that is asked: guarded, by way of a proxy if one is given, kept while useful.

It is http.client's, and not a larger library's: that takes longer to import than a hundred megabytes take to arrive on
a fast link, and copies once more what arrives.
"""

from __future__ import annotations

import base64
import http.client
import re
import socket
import ssl
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property

from outrider_stepkit import StepFailure
from outrider_stepkit.network import AddressGuard

from http_transfer.address import Url
from http_transfer.failures import WIRE_ERRORS, HttpFailure, of_connecting, of_exchange

_SHORT_S = 0.25
_READ_BYTES = 64 * 1024


@dataclass(frozen=True)
class Settings:
    """What all connections of a step have in common."""

    guard: AddressGuard
    connect_s: float
    idle_s: float
    ca_pem: str | None = None
    proxy: Url | None = None
    proxy_headers: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def tls(self) -> ssl.SSLContext:
        """Made when it is needed: reading a hundred and more authorities takes longer than a small file."""
        return tls_context(self.ca_pem)


def tls_context(ca_pem: str | None) -> ssl.SSLContext:
    """Public authorities and, if given, one's own. Raises StepFailure if that is no certificate."""
    context = ssl.create_default_context()
    if ca_pem:
        try:
            context.load_verify_locations(cadata=ca_pem)
        except (ssl.SSLError, ValueError) as error:
            raise StepFailure(
                "HTTP_CA (or the file of `ca`) has to hold the certificate of an authority as PEM text", code="bad_ca"
            ) from error
    context.set_alpn_protocols(["http/1.1"])
    return context


def proxy_credentials(user: str | None, password: str | None) -> dict[str, str]:
    """The headers for a proxy that wants to know who calls."""
    if not user:
        return {}
    return {"Proxy-Authorization": "Basic " + base64.b64encode(f"{user}:{password or ''}".encode()).decode()}


class _Connection(http.client.HTTPConnection):
    """Connects through the guard; TLS where the address says so, through the proxy's tunnel where there is one."""

    def __init__(self, url: Url, settings: Settings) -> None:
        peer = settings.proxy or url
        super().__init__(peer.host, peer.port, timeout=settings.idle_s)
        self._url, self._settings, self._at = url, settings, peer.shown if settings.proxy else url.shown
        if settings.proxy and url.secure:
            self.set_tunnel(url.host, url.port, dict(settings.proxy_headers))

    def connect(self) -> None:
        settings, url = self._settings, self._url
        try:
            self.sock = settings.guard.connect(self.host, self.port, settings.connect_s)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if settings.proxy and url.secure:
                self._through_proxy()
            if url.secure:
                self.sock = settings.tls.wrap_socket(self.sock, server_hostname=url.host)
            self.sock.settimeout(settings.idle_s)
        except (*WIRE_ERRORS, ValueError, StepFailure) as error:
            self.close()
            raise of_connecting(error, self._at) from error

    def _through_proxy(self) -> None:
        try:
            self._tunnel()  # type: ignore[attr-defined]  # http.client's own, for those who override connect()
        except OSError as error:
            answered = re.match(r"Tunnel connection failed: (\d{3})", str(error))
            if answered is None:
                raise
            status = int(answered[1])
            hint = ": it wants credentials (HTTP_PROXY_USER and HTTP_PROXY_PASSWORD)" if status == 407 else ""
            raise HttpFailure(
                f"the proxy {self._at} does not connect to {self._url.shown} (status {status}){hint}",
                code="proxy",
                temporary=status in {502, 503, 504},
                sent=False,
                status=status,
            ) from error


class Answer:
    """An answer whose body is still to be read. Close it."""

    def __init__(self, url: Url, response: http.client.HTTPResponse, sock: socket.socket | None) -> None:
        self.url = url
        self.status = response.status
        self.headers = response.headers
        self._response = response
        self._sock = sock if response.length is not None else None
        self._broken: Exception | None = None
        self._begun = self._ended = False
        self.length = response.length
        """Bytes of the body, None if the server does not say (then it comes in chunks, or until the end)."""
        self.left = response.length

    def fill(self, view: memoryview) -> int:
        """Read into ``view``: until it is full, the body is over, or a moment has passed. 0: the body is over.

        What arrived before the connection broke is given first; the call after it raises. (http.client's ``readinto``
        would wait for all of it, and lose it.)
        """
        if self._broken is not None:
            raise of_exchange(self._broken, self.url.shown) from self._broken
        try:
            if self._sock is None or not self._begun:
                self._begun = True
                return self._read(view)
            return self._receive(self._sock, view)
        except WIRE_ERRORS as error:
            raise of_exchange(error, self.url.shown) from error

    def _read(self, view: memoryview) -> int:
        # What came with the headers is in the response's buffer, and given first.
        data = self._response.read1(min(len(view), _READ_BYTES))
        self._ended = not data
        view[: len(data)] = data
        if self.left is not None:
            self.left -= len(data)
            if not data and self.left:
                raise http.client.IncompleteRead(b"")
        return len(data)

    def _receive(self, sock: socket.socket, view: memoryview) -> int:
        assert self.left is not None
        wanted, got, until = min(len(view), self.left), 0, time.monotonic() + _SHORT_S
        while got < wanted:
            try:
                count = sock.recv_into(view[got:wanted])
                if not count:
                    raise http.client.IncompleteRead(b"")
            except WIRE_ERRORS as error:
                if not got:
                    raise
                self._broken = error
                break
            got += count
            if time.monotonic() > until:
                break
        self.left -= got
        return got

    @property
    def over(self) -> bool:
        """Whether the body was read to its end, so that the connection can be used again."""
        return self.left == 0 or (self.left is None and self._ended)

    def discard(self, at_most: int) -> None:
        """Read the body away if it is no longer than that, to keep the connection."""
        with suppress(StepFailure):
            scrap = memoryview(bytearray(_READ_BYTES))
            while not self.over and at_most > 0 and (count := self.fill(scrap)):
                at_most -= count

    def close(self) -> None:
        """Idempotent. A body that was not read to its end takes the connection with it."""
        self._response.close()


class Wire:
    """Sends requests, one after another, over a connection that it keeps. One thread's."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._connection: _Connection | None = None
        self._origin: tuple[str, str, int] | None = None
        self._answer: Answer | None = None

    def request(
        self, method: str, url: Url, headers: Mapping[str, str], body: Iterable[bytes | memoryview] | None = None
    ) -> Answer:
        """Send one request; its answer, whatever its status. The former answer is closed.

        ``body`` comes with its Content-Length among the headers. Raises HttpFailure or AddressRefused.
        """
        kept = self._keep(url)
        try:
            return self._exchange(method, url, headers, body)
        except HttpFailure as error:
            # A server ends what was idle whenever it likes; that says nothing about the request.
            if not kept or body is not None or error.code != "cut":
                raise
        self._keep(url)
        return self._exchange(method, url, headers, body)

    def _keep(self, url: Url) -> bool:
        """Have a connection to this origin; whether it is a used one."""
        answer, self._answer = self._answer, None
        if answer is not None:
            useful = answer.over
            answer.close()
            if useful and self._origin == url.origin and self._connection and self._connection.sock is not None:
                return True
        self.close()
        if self._settings.proxy:
            # The proxy resolves the name, and answers for where it leads; an address that is written out is seen here.
            self._settings.guard.check_literal(url.host)
        self._connection, self._origin = _Connection(url, self._settings), url.origin
        return False

    def _exchange(
        self, method: str, url: Url, headers: Mapping[str, str], body: Iterable[bytes | memoryview] | None
    ) -> Answer:
        connection, settings = self._connection, self._settings
        assert connection is not None
        through = settings.proxy is not None and not url.secure
        try:
            connection.putrequest(
                method, url.whole() if through else url.target, skip_host=True, skip_accept_encoding=True
            )
            connection.putheader("Host", url.authority)
            for name, value in {**headers, **(settings.proxy_headers if through else {})}.items():
                connection.putheader(name, value.encode("latin-1"))
            connection.endheaders()
            sock = connection.sock
            if body is not None:
                self._send(connection, body)
            response = connection.getresponse()
        except StepFailure:
            self.close()
            raise
        except (*WIRE_ERRORS, ValueError) as error:
            self.close()
            raise of_exchange(error, url.shown) from error
        # One that ends with its body has been handed over to the response.
        self._answer = Answer(url, response, sock if connection.sock is not None else None)
        return self._answer

    @staticmethod
    def _send(connection: _Connection, body: Iterable[bytes | memoryview]) -> None:
        try:
            for piece in body:
                connection.send(piece)
        except (BrokenPipeError, ConnectionResetError, ssl.SSLError) as error:
            # It may have answered (too large, not allowed) and hung up in the middle: then that is what to say.
            try:
                early = connection.sock.recv(1, socket.MSG_PEEK) if type(connection.sock) is socket.socket else b"?"
            except OSError:
                early = b""
            if not early:
                raise error from None

    def abort(self) -> None:
        """Have whatever waits for this connection in another thread fail at once."""
        connection = self._connection
        sock = connection.sock if connection is not None else None
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Idempotent."""
        if self._answer is not None:
            self._answer.close()
            self._answer = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
