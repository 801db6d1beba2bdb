"""Which steps a retried run takes over from the run before it, and which it carries out again.

A step is taken over if it succeeded, and so did everything before it. What was skipped is decided anew, on the same
grounds. What a step wrote into a volume of the run went with that run: if a step that is to run needs such a volume,
the steps that wrote to it run again, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from outrider._suggest import did_you_mean, listing
from outrider.errors import Conflict, NotFound
from outrider.pipeline import Pipeline, Step, ancestors
from outrider.v1 import types_pb2

SUCCEEDED = types_pb2.STEP_STATE_SUCCEEDED
SKIPPED = types_pb2.STEP_STATE_SKIPPED
UNKNOWN = types_pb2.STEP_STATE_UNKNOWN
_OF_THAT_RUN: tuple[Literal["progress", "stdout_bytes", "stderr_bytes", "errors", "reason"], ...] = (
    "progress", "stdout_bytes", "stderr_bytes", "errors", "reason",
)  # fmt: skip
_WENT_WRONG = frozenset({types_pb2.STEP_STATE_FAILED, types_pb2.STEP_STATE_CANCELLED, UNKNOWN})


@dataclass(frozen=True, slots=True)
class Resumption:
    """``taken_over``: statuses as the new run begins with them. ``again``: names of steps that had succeeded and are
    carried out again all the same, because of what they wrote into a volume of the run."""

    taken_over: list[types_pb2.StepStatus]
    again: list[str]


def plan(
    pipeline: Pipeline,
    run_id: str,
    statuses: Mapping[str, types_pb2.StepStatus],
    idempotent: Callable[[Step], bool],
    from_step: str = "",
) -> Resumption:
    """What a retry of run ``run_id`` takes over. ``from_step`` and all that comes after it is carried out again,
    whatever became of it.

    Raises NotFound if there is no such step, and Conflict if the outcome of a step is unknown, or if a step would be
    carried out a second time that isn't declared idempotent and that nobody asked for.
    """
    names = [step.name for step in pipeline.steps]
    if from_step and from_step not in names:
        hint = did_you_mean(from_step, names, otherwise=f"its steps are {listing(names)}")
        raise NotFound(f"run {run_id} has no step {from_step!r}", code="unknown_step", hint=hint)
    unknown = [name for name in names if statuses[name].state == UNKNOWN]
    if unknown:
        raise Conflict(
            f"what became of step {unknown[0]} of run {run_id} is not known, so it can't be decided whether it has to "
            "be carried out again",
            code="outcome_unknown",
            hint=f"look, then say it with `outrider runs resolve {run_id} {unknown[0]} --as …`",
        )
    before = ancestors(pipeline)

    def with_all_after(roots: set[str]) -> set[str]:
        return {name for name in names if name in roots or not before[name].isdisjoint(roots)}

    asked_for = with_all_after({from_step} if from_step else set())
    anew = asked_for | with_all_after({name for name in names if not _is_good(statuses[name])})
    active = set(anew)
    if _was_cut_short(statuses):
        # These were never decided by their own conditions: they will probably run now.
        active |= {name for name in names if statuses[name].state == SKIPPED}
    again = _writers_again(pipeline, statuses, anew, active, with_all_after)
    refused = [name for name in again if not idempotent(pipeline.step(name)) and name not in asked_for]
    if refused:
        raise Conflict(
            f"step {refused[0]} of run {run_id} would have to be carried out again, because what it wrote into a "
            "volume of the run is gone with the run, and it is not declared idempotent",
            code="not_idempotent",
            hint=f"if doing it again does no harm: outrider runs retry {run_id} --from {refused[0]}",
        )
    kept = [name for name in names if statuses[name].state == SUCCEEDED and name not in anew]
    return Resumption([_taken_over(statuses[name], run_id) for name in kept], again)


def _is_good(status: types_pb2.StepStatus) -> bool:
    return status.state in (SUCCEEDED, SKIPPED)


def _was_cut_short(statuses: Mapping[str, types_pb2.StepStatus]) -> bool:
    """Whether steps were skipped for another reason than their conditions: the run could not begin, or the outcome of
    a step was unknown then and an operator has settled it since."""
    nothing_went_wrong = not any(status.state in _WENT_WRONG for status in statuses.values())
    return nothing_went_wrong or any(status.HasField("settlement") for status in statuses.values())


def _writers_again(
    pipeline: Pipeline,
    statuses: Mapping[str, types_pb2.StepStatus],
    anew: set[str],
    active: set[str],
    with_all_after: Callable[[set[str]], set[str]],
) -> list[str]:
    """Add to ``anew`` what has to run again for its volumes' sake; returns those steps, in order, that succeeded."""
    own = {name for name, volume in pipeline.volumes.items() if volume.scope == "run"}
    again: set[str] = set()
    while True:
        needed = {name for step in pipeline.steps if step.name in active for name in step.volumes if name in own}
        writers = {
            step.name
            for step in pipeline.steps
            if step.name not in anew
            and statuses[step.name].state == SUCCEEDED
            and any(mount.writable and name in needed for name, mount in step.volumes.items())
        }
        if not writers:
            return [step.name for step in pipeline.steps if step.name in again]
        more = with_all_after(writers) - anew
        again |= {name for name in more if statuses[name].state == SUCCEEDED}
        anew |= more
        active |= more


def _taken_over(status: types_pb2.StepStatus, run_id: str) -> types_pb2.StepStatus:
    """The status as another run has it from its beginning. The log stays with the run that wrote it."""
    taken = types_pb2.StepStatus()
    taken.CopyFrom(status)
    taken.from_run = status.from_run or run_id
    for field in _OF_THAT_RUN:
        taken.ClearField(field)
    return taken
