"""What went wrong with a request, in a sentence, and whether it may work when tried again."""

from __future__ import annotations

import email.utils
import http.client
import socket
import ssl
from email.message import Message

from outrider_stepkit import StepFailure

MAX_WAIT_S = 30.0
_TEMPORARY_STATUSES = frozenset({408, 425, 429})
_PERMANENT_SERVER_STATUSES = frozenset({501, 505, 507, 511})

WIRE_ERRORS = (OSError, http.client.HTTPException)
"""What connections and answers raise."""


class HttpFailure(StepFailure):
    """A request failed. ``sent`` says whether it may have reached the server; ``wait_s`` is the server's wish."""

    def __init__(
        self, message: str, *, code: str, temporary: bool = False, sent: bool = True, status: int = 0, wait_s: float = 0
    ) -> None:
        super().__init__(message, code=code, temporary=temporary)
        self.sent = sent
        self.status = status
        self.wait_s = wait_s


def of_status(status: int, headers: Message, shown: str) -> HttpFailure | None:
    """What an answer's status means; None if it is no failure. Redirects are not judged here."""
    if status < 400:
        return None
    if status in _TEMPORARY_STATUSES or (status >= 500 and status not in _PERMANENT_SERVER_STATUSES):
        return HttpFailure(
            f"{shown} can't be served now (status {status})",
            code="server_unavailable",
            temporary=True,
            status=status,
            wait_s=retry_after(headers),
        )
    hint = {
        401: ": it wants credentials, or other ones (HTTP_TOKEN, or HTTP_USER and HTTP_PASSWORD, or HTTP_AUTH_VALUE)",
        403: ": the credentials do not allow it",
        404: ": there is nothing at this address",
        407: ": the proxy wants credentials (HTTP_PROXY_USER and HTTP_PROXY_PASSWORD)",
        410: ": what was at this address is gone",
        412: ": what is there has changed, or a condition among the headers does not hold",
        413: ": the file is larger than the server takes",
        507: ": the server has no room for it",
    }.get(status, "")
    code = {
        401: "unauthenticated", 403: "denied", 404: "no_such_address", 407: "proxy", 410: "no_such_address",
        412: "condition_failed",
    }.get(status, "refused")  # fmt: skip
    return HttpFailure(f"{shown} answered with status {status}{hint}", code=code, status=status)


def retry_after(headers: Message) -> float:
    """Seconds that the server wants us to wait (RFC 9110, 10.2.3), at most 30; 0 if it says nothing."""
    value = headers.get("Retry-After", "").strip()
    try:
        if value.isascii() and value.isdigit():
            return min(float(value[:9]), MAX_WAIT_S)
        until = email.utils.parsedate_to_datetime(value)
        # Against the server's own clock: ours may be wrong.
        now = email.utils.parsedate_to_datetime(headers.get("Date", ""))
        return min(max((until - now).total_seconds(), 0.0), MAX_WAIT_S)
    except (TypeError, ValueError):
        return 0.0


def of_connecting(error: Exception, at: str) -> StepFailure:
    """Why there is no connection to ``at``. No text of the error is used: some name whole addresses."""
    match error:
        case StepFailure():
            return error
        case ssl.SSLCertVerificationError():
            reason = error.verify_message or "it does not verify"
            hint = "if its authority is your own, give it as HTTP_CA"
            return HttpFailure(f"the certificate of {at} is not trusted ({reason}): {hint}", code="tls", sent=False)
        case ssl.SSLEOFError():
            return HttpFailure(f"{at} ended the connection", code="cut", temporary=True, sent=False)
        case ssl.SSLError():
            message = f"no TLS connection to {at}: it does not speak TLS, or no version of it that can be trusted"
            return HttpFailure(message, code="tls", sent=False)
        case TimeoutError():
            return _unreachable(at, "no answer")
        case socket.gaierror() | UnicodeError():
            return _unreachable(at, "there is no such host")
        case ConnectionRefusedError():
            return _unreachable(at, "nothing listens there")
        case OSError():
            return _unreachable(at, error.strerror or "the connection failed")
    return HttpFailure(f"the request to {at} can't be made: {type(error).__name__}", code="invalid_request", sent=False)


def _unreachable(at: str, reason: str) -> HttpFailure:
    return HttpFailure(f"can't reach {at}: {reason}", code="unreachable", temporary=True, sent=False)


def of_exchange(error: Exception, at: str) -> StepFailure:
    """What went wrong after the connection to ``at`` stood."""
    match error:
        case StepFailure():
            return error
        case TimeoutError():
            return HttpFailure(f"{at} fell silent", code="idle", temporary=True)
        case http.client.RemoteDisconnected() | OSError() | http.client.IncompleteRead():
            return HttpFailure(f"the connection to {at} broke", code="cut", temporary=True)
        case http.client.HTTPException():
            return HttpFailure(f"{at} answers with something that is not HTTP", code="invalid_answer")
    return HttpFailure(f"the request to {at} can't be made: {type(error).__name__}", code="invalid_request", sent=False)
