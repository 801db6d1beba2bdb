"""The one place where a store's answers, and the errors of the transport to it, become sentences."""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Mapping
from xml.etree import ElementTree

from outrider_stepkit import StepFailure
from urllib3 import exceptions as http3

# What stores say when they want to be asked again, beside every 5xx and 429.
_TEMPORARY_CODES = frozenset(
    {
        "InternalError",
        "OperationAborted",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "SlowDown",
        "SlowDownRead",
        "SlowDownWrite",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
    }
)

_CREDENTIAL_CODES = frozenset(
    {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AuthorizationHeaderMalformed"}
)

TRANSPORT_ERRORS = (http3.HTTPError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


class Refused(StepFailure):
    """The store answered, and not with what was asked for. ``error_code`` is its own word for it, ``status`` HTTP's."""

    def __init__(self, message: str, *, code: str, error_code: str, status: int, temporary: bool = False) -> None:
        super().__init__(message, code=code, temporary=temporary)
        self.error_code, self.status = error_code, status


def from_transport(error: Exception, *, what: str, endpoint: str) -> StepFailure:
    """What urllib3 raised while ``what`` ("object 'a/b' of bucket 'c'") was moved.

    Only our own words are used: a request as urllib3 prints it carries a signature.
    """
    match error:
        case http3.SSLError() | ssl.SSLError():
            return StepFailure(
                f"no trusted TLS connection to {endpoint}: its certificate does not verify, or it does not speak TLS "
                "(an authority of your own goes into the env S3_CA, as PEM)",
                code="tls",
            )
        case http3.ConnectTimeoutError() | http3.NewConnectionError() | http3.NameResolutionError():
            return StepFailure(f"can't reach {endpoint} for {what}", code="unreachable", temporary=True)
        case http3.ReadTimeoutError() | TimeoutError():
            return StepFailure(f"{endpoint} fell silent while {what} was transferred", code="idle", temporary=True)
    return StepFailure(f"the connection to {endpoint} broke while {what} was transferred", code="cut", temporary=True)


def error_code(body: bytes) -> str:
    """The code in an answer's XML; empty where there is none."""
    try:
        root = ElementTree.fromstring(body)  # noqa: S314  # expat 2.4 and later stop entities that multiply
    except ElementTree.ParseError:
        return ""
    return (root.findtext("{*}Code") or root.findtext("{*}Error/{*}Code") or "").strip()


def from_answer(
    status: int, body: bytes, headers: Mapping[str, str], *, what: str, bucket: str, endpoint: str
) -> Refused:
    """What an answer that is not a success means. A store's message is not repeated: it may hold a signature."""
    code = error_code(body)

    def refused(message: str, cause: str, *, temporary: bool = False) -> Refused:
        return Refused(message, code=cause, error_code=code, status=status, temporary=temporary)

    if code == "NoSuchBucket":
        return refused(f"there is no bucket {bucket!r} at {endpoint}", "no_such_bucket")
    if code in {"NoSuchKey", "NoSuchVersion"} or (status == 404 and code in {"", "404", "NotFound"}):
        return refused(f"there is no {what} at {endpoint}", "no_such_key")
    if code in _CREDENTIAL_CODES:
        return refused(
            f"{endpoint} does not accept the credentials for {what} ({code}): check S3_ACCESS_KEY_ID, "
            "S3_SECRET_ACCESS_KEY and the region",
            "bad_credentials",
        )
    if code in {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}:
        return refused(f"the credentials for {what} at {endpoint} have expired", "expired_credentials")
    if code == "RequestTimeTooSkewed":
        return refused(f"{endpoint} refuses {what}: this node's clock is too far off", "clock_skew")
    if code in _TEMPORARY_CODES or status == 429 or (status >= 500 and status not in {501, 505}):
        return refused(f"{endpoint} can't serve {what} now ({code or status})", "store_unavailable", temporary=True)
    if status in {301, 307, 308} or code in {"PermanentRedirect", "TemporaryRedirect"}:
        region = headers.get("x-amz-bucket-region")
        hint = f"set the region to {region!r}" if region else "set the endpoint or the region that the bucket is in"
        return refused(f"bucket {bucket!r} is not served by {endpoint}: {hint}", "wrong_region")
    if status == 412 or code in {"PreconditionFailed", "ConditionalRequestConflict"}:
        return refused(f"{what} at {endpoint} was replaced while it was transferred", "changed", temporary=True)
    if code in {"BadDigest", "NoSuchUpload", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}:
        return refused(f"{what} did not reach {endpoint} intact ({code})", "damaged", temporary=True)
    if status in {401, 403}:
        return refused(
            f"{endpoint} denies access to {what} ({code or status}): check the credentials and their permissions",
            "denied",
        )
    return refused(f"{endpoint} refuses {what}: {code or 'no reason given'} (status {status})", "refused")
