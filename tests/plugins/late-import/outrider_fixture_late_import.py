"""It works, and takes its time to be imported."""

import time

from pydantic import BaseModel

from outrider.steps import StepContext, StepPlan, StepType, hookimpl

time.sleep(0.3)  # what a heavy library takes

outrider_contract = ">=1,<2"


class Params(BaseModel, extra="forbid"):
    pass


def resolve(params: Params, context: StepContext) -> StepPlan:
    return StepPlan(image="fixture/none:1")


@hookimpl
def outrider_step_types():
    return [StepType(name="late.step", params=Params, resolve=resolve)]
