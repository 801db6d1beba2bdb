"""``bluegreen.deploy``: a new version beside the old one, proven, and only then in its place.

An example of what a stranger can write on the control socket: nothing here is more than docs/control-socket.md says.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from outrider.steps import StepContext, StepPlan, StepType, VolumeMounts, hookimpl

outrider_contract = ">=1,<2"
IMAGE = "outrider/step-bluegreen:0.1.0"


class DeployParams(BaseModel):
    """What is deployed. There are never more than two of it: NAME-blue and NAME-green."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,40}$")
    image: str
    args: list[str] = Field(default_factory=list)
    env: dict[str, str] = Field(default_factory=dict)
    port: int = Field(ge=1, le=65535, description="the one that it serves on, inside")
    volumes: VolumeMounts = Field(default_factory=dict)
    check: list[str] = Field(min_length=1, description="run inside the new one: it takes over if this ends with 0")


class DeployOutputs(BaseModel):
    """Where the players are to go now."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    colour: str
    container: str
    address: str
    port: int


def resolve_deploy(params: DeployParams, context: StepContext) -> StepPlan:
    """A program with the control socket, and nothing else: no network, no volume."""
    inputs: dict[str, Any] = params.model_dump(mode="json")
    return StepPlan(image=IMAGE, args=("deploy",), control="containers", inputs=inputs)


@hookimpl
def outrider_step_types() -> list[StepType]:
    """The one step type; it may be tried again, because every call of the socket may."""
    return [
        StepType(
            name="bluegreen.deploy",
            description="Start a new version beside the old one, prove it, and stop the old one",
            params=DeployParams,
            outputs=DeployOutputs,
            resolve=resolve_deploy,
            idempotent=True,
        )
    ]
