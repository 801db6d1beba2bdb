"""What both sides share on the wire: errors as statuses, times, and free-form values as JSON.

A refused call carries an `ErrorDetail` in the details of its google.rpc.Status (the field's rich error
model: the binary trailer ``grpc-status-details-bin``), so that a caller gets the same error class, code,
message, hint and list of problems that the server raised. This is the one place where grpc's errors are
translated: `to_status` and `abort` on the side that answers, `from_rpc_error` on the side that called.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NoReturn

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2

from outrider import errors
from outrider.errors import ErrorClass, InvalidInput, OutriderError, Problem
from outrider.v1 import control_service_pb2, types_pb2

STATUS_DETAILS_KEY = "grpc-status-details-bin"

_MAX_MESSAGE = 2_000
# Trailers are metadata, and a client that has not raised its limit drops a call with more than 8 KiB of it.
# Ours have (see outrider.tls), but a document with thousands of mistakes must not break even that.
_MAX_PROBLEMS_BYTES = 64 * 1024

_CLASS_TO_PROTO = {
    ErrorClass.TEMPORARY: types_pb2.ERROR_CLASS_TEMPORARY,
    ErrorClass.PERMANENT: types_pb2.ERROR_CLASS_PERMANENT,
    ErrorClass.TIMEOUT: types_pb2.ERROR_CLASS_TIMEOUT,
}

# The first class that fits wins: subclasses stand before their bases.
_STATUS_BY_TYPE: tuple[tuple[type[OutriderError], grpc.StatusCode], ...] = (
    (errors.InvalidInput, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.Conflict, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (errors.PermissionDenied, grpc.StatusCode.PERMISSION_DENIED),
    (errors.PolicyViolation, grpc.StatusCode.PERMISSION_DENIED),
    (errors.PermanentError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.TemporaryError, grpc.StatusCode.UNAVAILABLE),
    (errors.OperationTimeout, grpc.StatusCode.DEADLINE_EXCEEDED),
)
# Codes of ours for which gRPC has a word of its own.
_STATUS_BY_CODE = {
    "already_exists": grpc.StatusCode.ALREADY_EXISTS,
    "version_conflict": grpc.StatusCode.ABORTED,
    "resource_exhausted": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "unimplemented": grpc.StatusCode.UNIMPLEMENTED,
    "internal": grpc.StatusCode.INTERNAL,
}
_TYPE_BY_STATUS: Mapping[grpc.StatusCode, type[OutriderError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidInput,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidInput,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.ALREADY_EXISTS: errors.Conflict,
    grpc.StatusCode.FAILED_PRECONDITION: errors.Conflict,
    grpc.StatusCode.ABORTED: errors.TemporaryError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.TemporaryError,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.OperationTimeout,
}
_TYPE_BY_CODE: Mapping[str, type[OutriderError]] = {
    kind.default_code: kind
    for kind in (
        errors.TemporaryError,
        errors.Unavailable,
        errors.EngineUnavailable,
        errors.PermanentError,
        errors.InvalidInput,
        errors.NotFound,
        errors.Conflict,
        errors.Unauthenticated,
        errors.PermissionDenied,
        errors.PolicyViolation,
        errors.StepFailed,
        errors.OperationTimeout,
    )
} | {"already_exists": errors.Conflict, "version_conflict": errors.Conflict}


# -- errors ------------------------------------------------------------------------------------------------


def status_code(error: OutriderError) -> grpc.StatusCode:
    """The gRPC status code that says the same as ``error``."""
    if error.code in _STATUS_BY_CODE:
        return _STATUS_BY_CODE[error.code]
    for kind, code in _STATUS_BY_TYPE:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL


def failure_of(error: BaseException) -> types_pb2.Failure:
    """``error`` as a Failure message. What is not an OutriderError becomes a permanent one with code "internal"."""
    if isinstance(error, OutriderError):
        return types_pb2.Failure(
            error_class=class_to_proto(error.error_class),
            code=error.code,
            message=_clip(error.message),
            hint=_clip(error.hint),
        )
    return types_pb2.Failure(
        error_class=types_pb2.ERROR_CLASS_PERMANENT, code="internal", message=_clip(f"{type(error).__name__}: {error}")
    )


def error_of(failure: types_pb2.Failure, problems: Sequence[Problem] = ()) -> OutriderError:
    """The error that ``failure`` tells of; the inverse of `failure_of`."""
    kind = _TYPE_BY_CODE.get(failure.code)
    if kind is None and (failure.code.endswith("_not_found") or failure.code.startswith("unknown_")):
        kind = errors.NotFound
    if kind is None:
        kind = {
            types_pb2.ERROR_CLASS_TEMPORARY: errors.TemporaryError,
            types_pb2.ERROR_CLASS_TIMEOUT: errors.OperationTimeout,
        }.get(failure.error_class, errors.PermanentError)
    return _make(kind, failure.message, failure.code, failure.hint, problems)


def to_status(error: BaseException) -> status_pb2.Status:
    """``error`` as a google.rpc.Status that carries an ErrorDetail, and a RetryInfo if it says how long to wait."""
    known = error if isinstance(error, OutriderError) else internal(error)
    detail = control_service_pb2.ErrorDetail(failure=failure_of(known))
    if isinstance(known, InvalidInput):
        detail.problems.extend(_fitting(known.problems))
    status = status_pb2.Status(code=status_code(known).value[0], message=_clip(str(known)))
    status.details.add().Pack(detail)
    if known.retry_after_s is not None:
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=duration(known.retry_after_s)))
    return status


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: BaseException) -> NoReturn:
    """End a call with ``error``: its status code, its sentence, and the ErrorDetail in the trailers."""
    status = to_status(error)
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    await context.abort(code, status.message, ((STATUS_DETAILS_KEY, status.SerializeToString()),))
    raise AssertionError("abort does not return")


def internal(error: BaseException) -> OutriderError:
    """What a caller is told of an error that nobody foresaw: its kind, without its innards."""
    return OutriderError(
        f"the server failed with an unforeseen {type(error).__name__}", code="internal", hint="its log has the details"
    )


def from_rpc_error(error: grpc.RpcError, *, target: str = "the server") -> OutriderError:
    """The OutriderError that a failed call stands for.

    Calls that our server refused give back the very error that it raised. Those that failed on the way (no
    listener, wrong CA, wrong name, deadline) are told in a sentence that names ``target``. A RetryInfo, of our server
    or of a proxy before it, becomes ``retry_after_s``.
    """
    made = _from_rpc_error(error, target)
    made.retry_after_s = _retry_after(error)
    return made


def _from_rpc_error(error: grpc.RpcError, target: str) -> OutriderError:
    code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    details = (error.details() if hasattr(error, "details") else None) or ""
    detail = _detail_of(error)
    if detail is not None:
        failure = detail.failure
        problems = [problem_of(item) for item in detail.problems]
        kind = _TYPE_BY_CODE.get(failure.code)
        if kind is None:
            kind = _TYPE_BY_STATUS.get(code, errors.OutriderError)
            if kind.error_class is not _class_of(failure.error_class):
                kind = type(error_of(failure))
        return _make(kind, failure.message, failure.code, failure.hint, problems)
    return _transport_error(code, details, target)


def _transport_error(code: grpc.StatusCode, details: str, target: str) -> OutriderError:
    lower = details.lower()
    if code is grpc.StatusCode.UNAVAILABLE:
        if "certificate_verify_failed" in lower:
            return errors.Unavailable(
                f"the certificate of {target} is not signed by the CA that is trusted here",
                code="tls_untrusted",
                hint="give the server's own CA file (`ca_file` of an agent, OUTRIDER_CA or `ca` of a context)",
            )
        if "hostname verification check failed" in lower or "peer name" in lower:
            return errors.Unavailable(
                f"the certificate of {target} is for another name",
                code="tls_wrong_name",
                hint="add this name to `names` in the server's configuration, or use one that the certificate has",
            )
        if "wrong_version_number" in lower or "handshake" in lower or "ssl" in lower:
            return errors.Unavailable(
                f"no TLS connection could be made with {target}",
                code="tls_handshake",
                hint="the port must be that of an Outrider server, which speaks TLS only",
            )
        if "connection refused" in lower:
            return errors.Unavailable(
                f"nothing listens at {target}", code="connection_refused", hint="check the address and that it runs"
            )
        if "dns" in lower or "name resolution" in lower or "domain name" in lower:
            return errors.Unavailable(f"the name of {target} can't be resolved", code="unknown_host")
        return errors.Unavailable(f"{target} can't be reached: {_first_cause(details)}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.OperationTimeout(f"{target} did not answer in time")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in lower:
        return errors.InvalidInput(f"the message is too large for {target}: {details}", code="too_large")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return errors.PermanentError(
            f"{target} does not know this call", code="unimplemented", hint="its version is older than this program's"
        )
    if code is grpc.StatusCode.CANCELLED:
        return errors.Unavailable(f"the call to {target} was cut off", code="cancelled")
    kind = _TYPE_BY_STATUS.get(code, errors.OutriderError)
    return _make(kind, details or f"{target} answered {code.name}", "", "", ())


def _first_cause(details: str) -> str:
    cause = details.rsplit("last error: ", 1)[-1]
    return re.sub(r"^(UNKNOWN|UNAVAILABLE|INTERNAL): ", "", cause).strip() or "no connection"


def _make(kind: type[OutriderError], message: str, code: str, hint: str, problems: Sequence[Problem]) -> OutriderError:
    if issubclass(kind, InvalidInput):
        return kind(message, problems, code=code, hint=hint)
    return kind(message, code=code, hint=hint)


def class_to_proto(error_class: ErrorClass) -> types_pb2.ErrorClass.ValueType:
    """The number on the wire."""
    return _CLASS_TO_PROTO[error_class]


def _class_of(value: int) -> ErrorClass:
    return next((ours for ours, proto in _CLASS_TO_PROTO.items() if proto == value), ErrorClass.PERMANENT)


def _detail_of(error: grpc.RpcError) -> control_service_pb2.ErrorDetail | None:
    detail = control_service_pb2.ErrorDetail()
    return detail if any(packed.Unpack(detail) for packed in _details(error)) else None


def _retry_after(error: grpc.RpcError) -> float | None:
    info = error_details_pb2.RetryInfo()
    return max(0.0, seconds(info.retry_delay)) if any(packed.Unpack(info) for packed in _details(error)) else None


def _details(error: grpc.RpcError) -> list[Any]:
    trailers: Iterable[Any] = ()  # metadata pairs; the stubs of grpc and grpc.aio call them differently
    if hasattr(error, "trailing_metadata"):
        trailers = error.trailing_metadata() or ()
    for key, value in trailers:
        if key == STATUS_DETAILS_KEY and isinstance(value, bytes):
            try:
                return list(status_pb2.Status.FromString(value).details)
            except DecodeError:  # whatever made it, it was not ours
                return []
    return []


def _clip(text: str) -> str:
    return text if len(text) <= _MAX_MESSAGE else text[: _MAX_MESSAGE - 1] + "…"


# -- problems ----------------------------------------------------------------------------------------------


def problem_to_proto(problem: Problem) -> types_pb2.Problem:
    return types_pb2.Problem(
        path=problem.path,
        line=problem.line,
        column=problem.column,
        message=_clip(problem.message),
        hint=_clip(problem.hint),
    )


def problem_of(message: types_pb2.Problem) -> Problem:
    return Problem(message.message, path=message.path, line=message.line, column=message.column, hint=message.hint)


def _fitting(problems: Sequence[Problem]) -> list[types_pb2.Problem]:
    fitting: list[types_pb2.Problem] = []
    size = 0
    for problem in problems:
        message = problem_to_proto(problem)
        size += message.ByteSize()
        if size > _MAX_PROBLEMS_BYTES:
            fitting.append(types_pb2.Problem(message=f"and {len(problems) - len(fitting)} more problems"))
            break
        fitting.append(message)
    return fitting


# -- times and values --------------------------------------------------------------------------------------


def now() -> datetime:
    """The wall clock, in UTC: for people only; nothing is decided by it."""
    return datetime.now(UTC)


def timestamp(moment: datetime | float | None) -> Timestamp | None:
    """A moment (aware, or seconds since 1970) as a protobuf Timestamp; None stays None."""
    if moment is None:
        return None
    stamp = Timestamp()
    if isinstance(moment, datetime):
        stamp.FromDatetime(moment.astimezone(UTC).replace(tzinfo=None))
    else:
        stamp.FromMicroseconds(int(moment * 1e6))
    return stamp


def moment(stamp: Timestamp) -> datetime | None:
    """The aware UTC datetime of ``stamp``; None where it is not set."""
    return stamp.ToDatetime(tzinfo=UTC) if stamp.seconds or stamp.nanos else None


def duration(seconds: float | None) -> Duration | None:
    """Seconds as a protobuf Duration; None stays None."""
    if seconds is None:
        return None
    message = Duration()
    message.FromMicroseconds(round(seconds * 1e6))
    return message


def seconds(message: Duration) -> float:
    """The seconds of a protobuf Duration."""
    return message.seconds + message.nanos / 1e9


# What json reads without a word and nobody can write again: half a surrogate pair, and 1e999, which is infinite.
_SUSPICIOUS = re.compile(rb"\\u[dD][89a-fA-F]|[0-9][eE]")


def dump_json(value: Any) -> bytes:
    """A free-form value (JSON: any type) as compact UTF-8 JSON; NaN and infinities are refused with ValueError."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def load_json(data: bytes, default: Any = None) -> Any:
    """The value of a ``*_json`` field; ``default`` where the field is empty. Raises InvalidInput if it is not JSON."""
    if not data:
        return default
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
        if _SUSPICIOUS.search(data):
            dump_json(value)
        return value
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"this is not JSON: {error}", code="invalid_json") from error


def load_json_object(data: bytes, what: str) -> dict[str, Any]:
    """Like `load_json`, for fields that must hold a JSON object; empty gives {}. ``what`` names it in the error."""
    value = load_json(data, {})
    if not isinstance(value, dict):
        raise InvalidInput(f"{what} must be a JSON object, not {type(value).__name__}", code="invalid_json")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")
