"""The step types ``container.start``, ``container.stop``, ``container.restart`` and ``container.run``.

The first three are programs that speak the control interface of the agent; ``container.run`` is the image
itself, run as the step.
"""

from __future__ import annotations

from outrider.steps import Resources, StepContext, StepPlan, StepType, hookimpl
from outrider_step_container._models import (
    RestartParams,
    RunOutputs,
    RunParams,
    StartOutputs,
    StartParams,
    StateOutputs,
    StopParams,
)

__version__ = "0.1.0"

outrider_contract = ">=1,<2"
"""The versions of the plugin contract that this works with."""

IMAGE = f"outrider/step-container:{__version__}"
"""The image with the programs."""

_RESOURCES = Resources(memory_bytes=96 * 1024**2, pids=32)


def resolve_start(params: StartParams, context: StepContext) -> StepPlan:
    """The plan of ``container.start``."""
    inputs = {"request": params.as_request(), "env_from": params.env_from}
    return StepPlan(image=IMAGE, args=("start",), control="containers", resources=_RESOURCES, inputs=inputs)


def resolve_stop(params: StopParams, context: StepContext) -> StepPlan:
    """The plan of ``container.stop``."""
    inputs = params.model_dump(mode="json")
    return StepPlan(image=IMAGE, args=("stop",), control="containers", resources=_RESOURCES, inputs=inputs)


def resolve_restart(params: RestartParams, context: StepContext) -> StepPlan:
    """The plan of ``container.restart``."""
    inputs = params.model_dump(mode="json")
    return StepPlan(image=IMAGE, args=("restart",), control="containers", resources=_RESOURCES, inputs=inputs)


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
    """Starting and stopping twice does no harm; a restart, and whatever an image does, may."""
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
            name="container.run",
            description="Run any image to completion as a step",
            params=RunParams,
            outputs=RunOutputs,
            resolve=resolve_run,
        ),
    ]
