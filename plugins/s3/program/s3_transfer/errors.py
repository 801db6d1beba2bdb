"""The one place where errors of botocore and of its transport become sentences."""

from __future__ import annotations

from botocore import exceptions as aws
from outrider_stepkit import StepFailure
from urllib3 import exceptions as http

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


def from_store(error: Exception, *, what: str, bucket: str, endpoint: str) -> StepFailure:
    """Translate what botocore or its transport raised while ``what`` ("object 'a/b' of bucket 'c'") was moved.

    Only codes and our own words are used: a store's message, or a request as urllib3 prints it, may carry
    a signature or a key.
    """
    at = f"at {endpoint}"
    match error:
        case aws.ClientError():
            return _from_answer(error, what=what, bucket=bucket, endpoint=endpoint)
        case aws.SSLError():
            return StepFailure(
                f"no trusted TLS connection to {endpoint}: its certificate does not verify, or it does not speak TLS",
                code="tls",
            )
        case aws.ConnectTimeoutError() | aws.EndpointConnectionError() | aws.ProxyConnectionError():
            return StepFailure(f"can't reach {endpoint} for {what}", code="unreachable", temporary=True)
        case aws.ReadTimeoutError() | http.ReadTimeoutError():
            return StepFailure(f"{endpoint} fell silent while {what} was transferred", code="idle", temporary=True)
        case (
            aws.ConnectionClosedError()
            | aws.ResponseStreamingError()
            | aws.IncompleteReadError()
            | aws.HTTPClientError()
        ):
            return StepFailure(
                f"the connection to {endpoint} broke while {what} was transferred", code="cut", temporary=True
            )
        case http.HTTPError() | ConnectionError() | TimeoutError():
            return StepFailure(
                f"the connection to {endpoint} broke while {what} was transferred", code="cut", temporary=True
            )
        case aws.BotoCoreError() | ValueError():
            return StepFailure(f"the request for {what} {at} can't be made: {error}", code="invalid_request")
    return StepFailure(f"{what} {at}: {type(error).__name__}: {error}", code="internal")


def _from_answer(error: aws.ClientError, *, what: str, bucket: str, endpoint: str) -> StepFailure:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code == "NoSuchBucket":
        return StepFailure(f"there is no bucket {bucket!r} at {endpoint}", code="no_such_bucket")
    if code in {"NoSuchKey", "NoSuchVersion"} or (status == 404 and code in {"404", "NotFound"}):
        return StepFailure(f"there is no {what} at {endpoint}", code="no_such_key")
    if code in _CREDENTIAL_CODES:
        return StepFailure(
            f"{endpoint} does not accept the credentials for {what} ({code}): check S3_ACCESS_KEY_ID, "
            "S3_SECRET_ACCESS_KEY and the region",
            code="bad_credentials",
        )
    if code in {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}:
        return StepFailure(f"the credentials for {what} at {endpoint} have expired", code="expired_credentials")
    if code == "RequestTimeTooSkewed":
        return StepFailure(f"{endpoint} refuses {what}: this node's clock is too far off", code="clock_skew")
    if code in _TEMPORARY_CODES or status == 429 or (status >= 500 and status not in {501, 505}):
        return StepFailure(
            f"{endpoint} can't serve {what} now ({code or status})", code="store_unavailable", temporary=True
        )
    if code == "PreconditionFailed" or status == 412:
        return StepFailure(
            f"{what} at {endpoint} was replaced while it was transferred", code="changed", temporary=True
        )
    if code in {"BadDigest", "NoSuchUpload"}:
        return StepFailure(f"{what} did not reach {endpoint} intact ({code})", code="damaged", temporary=True)
    if status in {401, 403}:
        return StepFailure(
            f"{endpoint} denies access to {what} ({code or status}): check the credentials and their permissions",
            code="denied",
        )
    return StepFailure(f"{endpoint} refuses {what}: {code or 'no reason given'} (status {status})", code="refused")
