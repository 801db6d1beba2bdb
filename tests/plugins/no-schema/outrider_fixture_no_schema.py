from collections.abc import Callable

from pydantic import BaseModel

from outrider.steps import StepContext, StepPlan, StepType, hookimpl

outrider_contract = ">=1,<2"


class Params(BaseModel, extra="forbid"):
    callback: Callable[[], None]


def resolve(params: Params, context: StepContext) -> StepPlan:
    return StepPlan(image="fixture/none:1")


@hookimpl
def outrider_step_types():
    return [StepType(name="no.schema", params=Params, resolve=resolve)]
