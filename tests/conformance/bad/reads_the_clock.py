"""Its resolve does something else from a certain day on: the plan of a retry after it would be another.

A day that is past, so that the one check which it is for fails, whatever the hour is where.
"""

from datetime import date as day
from typing import Any

from words import hook, plan

from outrider.steps import StepPlan


def resolve(_params: Any, _context: Any) -> StepPlan:
    return plan(args=("new" if day.today() > day(2020, 2, 29) else "old",))


outrider_step_types = hook(resolve=resolve)
