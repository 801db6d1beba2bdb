"""It was made for a contract that there is not yet, and uses what that has."""

from outrider.steps import Dependencies, hookimpl

outrider_contract = ">=2,<3"


@hookimpl
def outrider_step_types():
    return [Dependencies()]
