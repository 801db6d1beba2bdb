"""What the end of an attempt means: its exit, told apart by who or what brought it about."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Literal

from agent_core.orders import AttemptOrder
from agent_core.policy import LimitPolicy
from agent_core.runtimes.base import Exit
from agent_core.stepfiles import MAX_DIRECTORY_BYTES, ErrorLine
from outrider.errors import OperationTimeout, OutriderError, StepFailed, TemporaryError
from outrider.steps import EXIT_DONE, EXIT_TEMPORARY

Why = Literal["cancelled", "timeout", "output_limit", "directory_limit"]
"""Why the agent itself stopped a step."""

_SIGNALLED = 128  # a program ended by signal n has, by the convention of shells and engines, this code and n
_KILLED = _SIGNALLED + signal.SIGKILL
UNKNOWN_EXIT = 255
"""What engines from 23 on say of a container that ended while they were away. It may have been its own, too."""
_ASKED_TO_END = (_SIGNALLED + signal.SIGTERM, _SIGNALLED + signal.SIGINT)


class Uncertain(OutriderError):
    """Whether the step did its work can't be known. ``code`` says why."""

    default_code = "outcome_unknown"


def engine_stopped(step: str) -> Uncertain:
    """The engine went away and its containers with it: the exit code is of its making."""
    return Uncertain(
        f"the container engine stopped while step {step} was running, and its container with it",
        code="engine_stopped",
        hint="with the engine's `live-restore` its containers survive its restart",
    )


def start_forgotten(step: str) -> Uncertain:
    """The engine was ended in the middle of the start, and does not know of the container's program."""
    return Uncertain(
        f"the container engine was stopped while it started step {step}: how far it came can't be known,"
        " and what ran of it was ended",
        code="engine_stopped",
    )


def end_unseen(step: str) -> Uncertain:
    """The container ended while the engine was away, and the engine does not know how."""
    return Uncertain(
        f"the container of step {step} ended while the container engine was restarted, which can't say how",
        code="engine_stopped",
    )


def container_gone(step: str) -> Uncertain:
    """The container is not there any more, and nobody saw how it ended."""
    return Uncertain(f"the container of step {step} was removed by somebody else", code="container_removed")


def stopped(step: str, why: Why, limits: LimitPolicy) -> OutriderError:
    """The error of a step that the agent stopped."""
    match why:
        case "timeout":
            return OperationTimeout(f"step {step} did not end within its timeout", code="step_timeout")
        case "output_limit":
            return StepFailed(
                f"step {step} wrote more than {limits.step_log_bytes} bytes of output", code="output_limit"
            )
        case "directory_limit":
            return StepFailed(
                f"step {step} wrote more than {MAX_DIRECTORY_BYTES} bytes into /outrider", code="directory_limit"
            )
        case "cancelled":
            return OutriderError(f"step {step} was cancelled", code="cancelled")


def failure(
    order: AttemptOrder, end: Exit, said: ErrorLine | None, *, disk_is_full: Callable[[], bool]
) -> OutriderError | None:
    """What went wrong by the container's own end; None if nothing did. ``said``: the cause in the step's own words."""
    step, code = order.step, end.exit_code
    if code == EXIT_DONE:
        return None
    if end.oom_killed and (said is None or code == _KILLED):
        limit = order.resources.memory_bytes
        size = f" of {limit // 1024**2} MiB" if limit else ""
        return StepFailed(
            f"step {step} was killed because it needs more memory than its limit{size}",
            code="out_of_memory",
            hint="raise the step's resources.memory",
        )
    if end.removed:
        return StepFailed(
            f"the container of step {step} was removed by somebody else while it was running", code="container_removed"
        )
    if said is None and (code == _KILLED or (end.signalled and code in _ASKED_TO_END)):
        name = signal.Signals(code - _SIGNALLED).name
        by = "through the container engine" if end.signalled else "by neither its memory limit nor Outrider"
        return StepFailed(
            f"step {step} was killed from outside ({name}, {by})",
            code="killed",
            hint="" if end.signalled else "a person, or the kernel where the whole machine has no memory left",
        )
    message = f"step {step} failed: {said.message}" if said else f"step {step} ended with exit code {code}"
    hint = "" if said else "its log has the cause"
    full = disk_is_full()
    if full:
        message, hint = f"{message}; the node's disk is full", "free some space on the node"
    word = said.code if said else "disk_full" if full else "step_failed"
    return (TemporaryError if code == EXIT_TEMPORARY else StepFailed)(message, code=word, hint=hint)
