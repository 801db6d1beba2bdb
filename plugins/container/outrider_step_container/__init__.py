"""The step types ``container.start``, ``stop``, ``restart``, ``exec``, ``wait``, ``logs`` and ``container.run``.

All but the last are programs that speak the control interface of the agent; ``container.run`` is the image
itself, run as the step.
"""

from __future__ import annotations

from typing import Any

from outrider.steps import Resources, StepContext, StepPlan, StepType, hookimpl
from outrider_step_container._models import (
    ExecOutputs,
    ExecParams,
    LogsOutputs,
    LogsParams,
    RestartParams,
    RunOutputs,
    RunParams,
    StartOutputs,
    StartParams,
    StateOutputs,
    StopParams,
    WaitOutputs,
    WaitParams,
)

__version__ = "0.1.0"

outrider_contract = ">=1,<2"
"""The versions of the plugin contract that this works with."""

IMAGE = f"outrider/step-container:{__version__}"
"""The image with the programs."""

_RESOURCES = Resources(memory_bytes=96 * 1024**2, pids=32)


def resolve_start(params: StartParams, context: StepContext) -> StepPlan:
    """The plan of ``container.start``."""
    return _controlling("start", params.as_inputs())


def resolve_stop(params: StopParams, context: StepContext) -> StepPlan:
    """The plan of ``container.stop``."""
    return _controlling("stop", params.model_dump(mode="json"))


def resolve_restart(params: RestartParams, context: StepContext) -> StepPlan:
    """The plan of ``container.restart``."""
    return _controlling("restart", params.model_dump(mode="json"))


def resolve_exec(params: ExecParams, context: StepContext) -> StepPlan:
    """The plan of ``container.exec``."""
    return _controlling("exec", params.model_dump(mode="json"))


def resolve_wait(params: WaitParams, context: StepContext) -> StepPlan:
    """The plan of ``container.wait``."""
    return _controlling("wait", params.model_dump(mode="json"))


def resolve_logs(params: LogsParams, context: StepContext) -> StepPlan:
    """The plan of ``container.logs``."""
    return _controlling("logs", params.model_dump(mode="json"))


def _controlling(action: str, inputs: dict[str, Any]) -> StepPlan:
    return StepPlan(image=IMAGE, args=(action,), control="containers", resources=_RESOURCES, inputs=inputs)


def resolve_run(params: RunParams, context: StepContext) -> StepPlan:
    """The plan of ``container.run``: the image that was asked for, like any other step's."""
    return StepPlan(
        image=params.image,
        args=tuple(params.args),
        entrypoint=None if params.entrypoint is None else tuple(params.entrypoint),
        env=params.env,
        network=params.network,
        resources=params.resources.as_resources(),
        workdir=params.workdir,
        user=params.user,
    )


@hookimpl
def outrider_step_types() -> list[StepType]:
    """Starting and stopping twice does no harm; a restart, and whatever a program or an image does, may."""
    return [
        StepType(
            name="container.start",
            description="Start a managed container, or adopt the one that is there, and wait until it is ready",
            params=StartParams,
            outputs=StartOutputs,
            resolve=resolve_start,
            idempotent=True,
        ),
        StepType(
            name="container.stop",
            description="Stop a managed container of this object or run",
            params=StopParams,
            outputs=StateOutputs,
            resolve=resolve_stop,
            idempotent=True,
        ),
        StepType(
            name="container.restart",
            description="Restart a managed container of this object or run in place, with its ports",
            params=RestartParams,
            outputs=StateOutputs,
            resolve=resolve_restart,
        ),
        StepType(
            name="container.exec",
            description="Run a program inside a managed container of this object or run",
            params=ExecParams,
            outputs=ExecOutputs,
            resolve=resolve_exec,
        ),
        StepType(
            name="container.wait",
            description="Wait until a managed container of this object or run has ended",
            params=WaitParams,
            outputs=WaitOutputs,
            resolve=resolve_wait,
            idempotent=True,
        ),
        StepType(
            name="container.logs",
            description="Write the log of a managed container of this object or run to a file",
            params=LogsParams,
            outputs=LogsOutputs,
            resolve=resolve_logs,
            idempotent=True,
        ),
        StepType(
            name="container.run",
            description="Run any image to completion as a step",
            params=RunParams,
            outputs=RunOutputs,
            resolve=resolve_run,
        ),
    ]
