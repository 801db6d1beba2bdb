"""The step type ``snapshot.take``. Its program is a shell script: nothing in the image is Outrider's.

The plan hands the parameters to the script as arguments, so that it has no JSON to read.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from outrider.steps import ReadPath, StepContext, StepPlan, StepType, WritePath, hookimpl

__version__ = "0.1.0"

outrider_contract = ">=1,<2"

IMAGE = f"outrider/step-snapshot:{__version__}"


class TakeParams(BaseModel, extra="forbid"):
    """``with:`` of ``snapshot.take``."""

    of: ReadPath = Field(description="the directory")
    to: WritePath = Field(description="the archive, a tar.gz")
    level: Annotated[int, Field(ge=1, le=9)] = Field(6, description="how hard gzip tries")


class TakeOutputs(BaseModel, extra="forbid"):
    """``steps.*.outputs`` of ``snapshot.take``."""

    bytes: int = Field(description="of the archive")
    sha256: str = Field(description="of the archive")


def resolve_take(params: TakeParams, context: StepContext) -> StepPlan:
    """The plan of ``snapshot.take``."""
    return StepPlan(image=IMAGE, args=(params.of, params.to, str(params.level)))


@hookimpl
def outrider_step_types() -> list[StepType]:
    """Taken twice of the same directory it is the same archive."""
    return [
        StepType(
            name="snapshot.take",
            params=TakeParams,
            outputs=TakeOutputs,
            resolve=resolve_take,
            idempotent=True,
            description="Pack a directory into a tar.gz",
        )
    ]
