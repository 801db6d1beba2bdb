from pydantic import BaseModel, Field

from outrider.steps import StepContext, StepPlan, StepType, hookimpl

outrider_contract = ">=1,<2"


class Params(BaseModel, extra="forbid"):
    choice: str = Field("", description="x" * 1_000_000)


def resolve(params: Params, context: StepContext) -> StepPlan:
    return StepPlan(image="fixture/none:1")


@hookimpl
def outrider_step_types():
    return [StepType(name="huge.schema", params=Params, resolve=resolve)]
