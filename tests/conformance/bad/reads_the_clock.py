"""Its resolve names something by the day: the plan of a retry after midnight would be another."""

from datetime import date as day
from typing import Any

from words import hook, plan

from outrider.steps import StepPlan


def resolve(_params: Any, _context: Any) -> StepPlan:
    return plan(args=(day.today().isoformat(),))


outrider_step_types = hook(resolve=resolve)
