"""Every error that Outrider raises on purpose.

The tree::

    OutriderError                   something went wrong, said in a sentence
    ├── TemporaryError              may work when tried again
    │   ├── Unavailable             the other side can't be reached now
    │   └── EngineUnavailable       the container engine can't be reached or is restarting
    ├── PermanentError              trying again changes nothing
    │   ├── InvalidInput            what was given is wrong; carries every problem found
    │   ├── NotFound                what was named does not exist
    │   ├── Conflict                it exists, has another version, or is busy
    │   ├── Unauthenticated         who is calling can't be told
    │   ├── PermissionDenied        the caller may not do this
    │   ├── PolicyViolation         the node's local policy or the step's allotment forbids it
    │   └── StepFailed              a step ended with a permanent failure
    └── OperationTimeout            a deadline passed; whether it happened must be looked up

Each has a stable ``code`` (for programs), a ``message`` (one sentence: what, where) and a ``hint``
(what would be right). Errors of docker, grpc and sqlalchemy are translated into these in one place
each and never leak past their driver. An error may carry ``retry_after_s``: the least wait before another try.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class ErrorClass(StrEnum):
    """What a failure means for trying again; see section "Errors and retries" of the design."""

    TEMPORARY = "temporary"
    PERMANENT = "permanent"
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a document: where it is, what it is, and what would be right.

    ``line`` and ``column`` are 1-based, 0 where they can't be said.
    """

    message: str
    path: str = ""
    line: int = 0
    column: int = 0
    hint: str = ""

    def __str__(self) -> str:
        place = f"line {self.line}: " if self.line else ""
        path = f"{self.path}: " if self.path else ""
        hint = f" ({self.hint})" if self.hint else ""
        return f"{place}{path}{self.message}{hint}"


class OutriderError(Exception):
    """The root. ``str()`` of it is fit to be shown to a person."""

    error_class: ErrorClass = ErrorClass.PERMANENT
    default_code = "error"

    def __init__(self, message: str, *, code: str = "", hint: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.hint = hint
        self.retry_after_s = retry_after_s
        """What the side that refused asks to be waited, in seconds, before the next try; None: it does not say."""

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class TemporaryError(OutriderError):
    """May work when tried again."""

    error_class = ErrorClass.TEMPORARY
    default_code = "temporary"


class Unavailable(TemporaryError):
    """The other side can't be reached now."""

    default_code = "unavailable"


class EngineUnavailable(TemporaryError):
    """The container engine can't be reached or is restarting."""

    default_code = "engine_unavailable"


class PermanentError(OutriderError):
    """Trying again changes nothing."""

    default_code = "permanent"


class InvalidInput(PermanentError):
    """What was given is wrong. ``problems`` has every problem found, in the order of the document."""

    default_code = "invalid_input"

    def __init__(self, message: str, problems: Sequence[Problem] = (), *, code: str = "", hint: str = "") -> None:
        super().__init__(message, code=code, hint=hint)
        self.problems = tuple(problems)


class NotFound(PermanentError):
    """What was named does not exist."""

    default_code = "not_found"


class Conflict(PermanentError):
    """It exists already, has another version, or is busy."""

    default_code = "conflict"


class Unauthenticated(PermanentError):
    """Who is calling can't be told: no token, a wrong one, or a revoked one."""

    default_code = "unauthenticated"


class PermissionDenied(PermanentError):
    """The caller may not do this."""

    default_code = "permission_denied"


class PolicyViolation(PermanentError):
    """The node's local policy or the step's allotment forbids it."""

    default_code = "policy_violation"


class StepFailed(PermanentError):
    """A step ended with a permanent failure."""

    default_code = "step_failed"


class OperationTimeout(OutriderError):
    """A deadline passed. Whether the operation happened must be looked up before it is tried again."""

    error_class = ErrorClass.TIMEOUT
    default_code = "timeout"
