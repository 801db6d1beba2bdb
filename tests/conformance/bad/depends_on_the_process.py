"""Its resolve makes arguments of a set, whose order is another in every process."""

from typing import Any

from words import hook, plan

from outrider.steps import StepPlan


def resolve(_params: Any, _context: Any) -> StepPlan:
    return plan(args=tuple({f"option-{number}" for number in range(50)}))


outrider_step_types = hook(resolve=resolve)
