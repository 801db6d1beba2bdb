"""Requests to one address: its credentials, its redirects, and what its answers mean."""

from __future__ import annotations

import base64
import email.utils
import random
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import requests
from outrider_stepkit import StepFailure
from requests import exceptions as failed
from urllib3 import exceptions as transport

T = TypeVar("T")

MAX_REDIRECTS = 10
_FIRST_WAIT_S, _MAX_WAIT_S, _MAX_RETRIES = 0.1, 30.0, 5

_TEMPORARY_STATUSES = frozenset({408, 425, 429})
_PERMANENT_SERVER_STATUSES = frozenset({501, 505})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_BASE_HEADERS = {"User-Agent": "outrider-step-http", "Accept": "*/*", "Accept-Encoding": "identity"}


class HttpFailure(StepFailure):
    """A request failed. ``sent`` says whether it may have reached the server; ``wait_s`` is the server's wish."""

    def __init__(
        self, message: str, *, code: str, temporary: bool = False, sent: bool = True, status: int = 0, wait_s: float = 0
    ) -> None:
        super().__init__(message, code=code, temporary=temporary)
        self.sent = sent
        self.status = status
        self.wait_s = wait_s


class Client:
    """Sends requests to the address of ``params`` with the credentials of ``env``."""

    def __init__(self, params: Mapping[str, Any], env: Mapping[str, str]) -> None:
        self.url: str = params["url"]
        self.shown = shown(self.url)
        self._timeouts = (float(params.get("connect_timeout_s", 10)), float(params.get("idle_timeout_s", 60)))
        self._given = {**params.get("headers", {}), **_credentials(env)}
        self._session = requests.Session()
        # No .netrc and no proxy variables: what decides about a request stands in the step.
        self._session.trust_env = False

    def send(self, method: str, headers: Mapping[str, str] | None = None, body: Any = None) -> requests.Response:
        """The first answer that is no redirect, its body not read yet. Close it.

        ``headers`` go to every origin; the given ones and the credentials to the first origin only. ``body``
        is sent again from its start where a redirect says so. Raises HttpFailure for statuses from 400 on.
        """
        url, given = self.url, self._given
        for _ in range(MAX_REDIRECTS + 1):
            response = self._send_once(method, url, {**_BASE_HEADERS, **given, **(headers or {})}, body)
            location = self._session.get_redirect_target(response) if response.status_code in _REDIRECTS else None
            if location is None or (response.status_code == 303 and method == "POST"):
                # 303 to a POST: it was carried out, and its result can be seen elsewhere (RFC 9110, 15.4.4).
                _raise_for_status(response, url)
                return response
            response.close()
            if body is not None and response.status_code not in {307, 308}:
                raise HttpFailure(
                    f"{shown(url)} answers a {method} with a redirect of status {response.status_code} to "
                    f"{shown(urljoin(url, location))}, which would drop the body: give that address",
                    code="redirect",
                )
            target = urljoin(url, location)
            _check_redirect(url, target)
            if _origin(target) != _origin(url):
                given = {}
            url = target
            if body is not None and hasattr(body, "seek"):
                body.seek(0)
        raise HttpFailure(f"{self.shown} leads to more than {MAX_REDIRECTS} redirects", code="redirect")

    def _send_once(self, method: str, url: str, headers: Mapping[str, str], body: Any) -> requests.Response:
        try:
            # Prepared apart from the session, which would add cookies.
            request = requests.Request(method, url, headers=dict(headers), data=body).prepare()
            return self._session.send(request, stream=True, allow_redirects=False, timeout=self._timeouts)
        except (failed.RequestException, transport.HTTPError, OSError, ValueError) as error:
            raise translated(error, url) from error


def _credentials(env: Mapping[str, str]) -> dict[str, str]:
    token, user, password = (env.get(f"HTTP_{name}") for name in ("TOKEN", "USER", "PASSWORD"))
    if token and (user or password):
        raise StepFailure("HTTP_TOKEN and HTTP_USER are both given: allot one of them", code="bad_credentials")
    if bool(user) != bool(password):
        present, missing = ("HTTP_USER", "HTTP_PASSWORD") if user else ("HTTP_PASSWORD", "HTTP_USER")
        raise StepFailure(f"{present} is given without {missing}: allot both, or neither", code="bad_credentials")
    if token:
        if not token.isascii() or not token.isprintable() or " " in token:
            raise StepFailure("the value of HTTP_TOKEN has characters that a token can't have", code="bad_credentials")
        return {"Authorization": f"Bearer {token}"}
    if user and password:
        return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
    return {}


def shown(url: str) -> str:
    """An address as it may be shown: without query, which may be a signature, and without user and password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _check_redirect(url: str, target: str) -> None:
    try:
        parts = urlsplit(target)
        usable = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.username is not None:
        raise HttpFailure(f"{shown(url)} redirects to an address that can't be followed", code="redirect")
    if urlsplit(url).scheme == "https" and parts.scheme == "http":
        raise HttpFailure(
            f"{shown(url)} redirects from HTTPS to {shown(target)}, where nobody would notice a forged answer",
            code="redirect",
        )


def _raise_for_status(response: requests.Response, url: str) -> None:
    status = response.status_code
    if status < 300 or status == 303:
        return
    with closing(response):
        if status in _TEMPORARY_STATUSES or (status >= 500 and status not in _PERMANENT_SERVER_STATUSES):
            raise HttpFailure(
                f"{shown(url)} can't be served now (status {status})",
                code="server_unavailable",
                temporary=True,
                status=status,
                wait_s=_retry_after(response),
            )
        hint = {
            401: ": it wants credentials, or other ones (HTTP_TOKEN, or HTTP_USER and HTTP_PASSWORD)",
            403: ": the credentials do not allow it",
            404: ": there is nothing at this address",
            410: ": what was at this address is gone",
            413: ": the file is larger than the server takes",
        }.get(status, "")
        code = {401: "unauthenticated", 403: "denied", 404: "no_such_address", 410: "no_such_address"}
        raise HttpFailure(
            f"{shown(url)} answered with status {status}{hint}", code=code.get(status, "refused"), status=status
        )


def _retry_after(response: requests.Response) -> float:
    """Seconds that the server wants us to wait (RFC 9110, 10.2.3), at most 30; 0 if it says nothing."""
    value = response.headers.get("Retry-After", "").strip()
    try:
        if value.isdigit():
            return min(float(value), _MAX_WAIT_S)
        until = email.utils.parsedate_to_datetime(value)
        # Against the server's own clock: ours may be wrong.
        now = email.utils.parsedate_to_datetime(response.headers.get("Date", ""))
        return min(max((until - now).total_seconds(), 0.0), _MAX_WAIT_S)
    except (TypeError, ValueError):
        return 0.0


def translated(error: Exception, url: str) -> HttpFailure:
    """Say in a sentence what went wrong with the connection. No text of the error is used: it names whole addresses."""
    at = shown(url)
    match error:
        case failed.SSLError() | transport.SSLError():
            message = f"no trusted TLS connection for {at}: the certificate does not verify, or it does not speak TLS"
            return HttpFailure(message, code="tls", sent=False)
        case failed.ConnectTimeout():
            return HttpFailure(f"can't reach {at}: no answer", code="unreachable", temporary=True, sent=False)
        case failed.ReadTimeout() | transport.ReadTimeoutError():
            return HttpFailure(f"{at} fell silent", code="idle", temporary=True)
        case failed.ConnectionError() if isinstance(_reason(error), transport.NewConnectionError):
            return HttpFailure(
                f"can't reach {at}: no such host, or nothing listens", code="unreachable", temporary=True, sent=False
            )
        case failed.ConnectionError() if isinstance(_reason(error), transport.ReadTimeoutError):
            return HttpFailure(f"{at} fell silent", code="idle", temporary=True)
        case failed.ConnectionError() | failed.ChunkedEncodingError() | transport.HTTPError() | OSError() if not (
            isinstance(error, failed.InvalidURL | failed.InvalidSchema | failed.InvalidHeader)
        ):
            return HttpFailure(f"the connection to {at} broke", code="cut", temporary=True)
    return HttpFailure(f"the request to {at} can't be made: {type(error).__name__}", code="invalid_request", sent=False)


def _reason(error: Exception) -> object:
    inner = error.args[0] if error.args else None
    return inner.reason if isinstance(inner, transport.MaxRetryError) else inner


def persist(attempt: Callable[[], T], position: Callable[[], int], again: Callable[[HttpFailure], bool]) -> T:
    """Call ``attempt()`` until it returns, with backoff, as long as ``again`` says so about what it raised.

    Gives up after five retries in a row in which ``position()`` reached nothing new, so that a long transfer
    over a bad link may be cut any number of times as long as it gets on.
    """
    retry, reached = 0, position()
    while True:
        try:
            return attempt()
        except HttpFailure as error:
            if position() > reached:
                retry, reached = 0, position()
            if not error.temporary or not again(error) or retry == _MAX_RETRIES:
                raise
            retry += 1
            time.sleep(max(error.wait_s, wait_s(retry)))


def wait_s(retry: int) -> float:
    """The wait before retry number ``retry`` (from 1): doubling from 100 ms, jitter 20 %, at most 30 s."""
    wait = min(_FIRST_WAIT_S * 2.0 ** (retry - 1), _MAX_WAIT_S)
    return min(wait * random.uniform(0.8, 1.2), _MAX_WAIT_S)  # noqa: S311  # spreads load, guards nothing
