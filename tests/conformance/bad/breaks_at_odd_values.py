"""Its resolve breaks at a value that its model lets pass."""

from typing import Any

from words import hook, plan

from outrider.steps import StepPlan


def resolve(params: Any, _context: Any) -> StepPlan:
    return plan(args={0: (), 0.5: ("slow",)}[params.pause_s])


outrider_step_types = hook(resolve=resolve)
