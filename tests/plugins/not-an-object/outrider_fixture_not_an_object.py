from pydantic import RootModel

from outrider.steps import StepContext, StepPlan, StepType, hookimpl

outrider_contract = ">=1,<2"


class Params(RootModel[list[str]]):
    pass


def resolve(params: Params, context: StepContext) -> StepPlan:
    return StepPlan(image="fixture/none:1")


@hookimpl
def outrider_step_types():
    return [StepType(name="no.object", params=Params, resolve=resolve)]
