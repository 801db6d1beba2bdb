from pydantic import BaseModel

from outrider.steps import StepContext, StepPlan, StepType, hookimpl

outrider_contract = ">=1,<2"


class Params(BaseModel, extra="forbid"):
    pass


def resolve(params: Params, context: StepContext) -> StepPlan:
    return StepPlan(image="fixture/none:1")


@hookimpl
def outrider_step_types():
    return [StepType(name="bad.publicenvs", params=Params, resolve=resolve, envs=["TOKEN"], public_envs=["KEY"])]
