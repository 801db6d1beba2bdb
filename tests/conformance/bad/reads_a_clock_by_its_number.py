"""Its resolve asks the system for a clock that it names by a number."""

import time
from typing import Any

from words import hook, plan

from outrider.steps import StepPlan


def resolve(_params: Any, _context: Any) -> StepPlan:
    return plan(args=("new" if time.clock_gettime(time.CLOCK_REALTIME) > 1_582_934_400 else "old",))


outrider_step_types = hook(resolve=resolve)
