"""Its image is whatever bears the name that day."""

from typing import Any

from words import hook, plan

from outrider.steps import StepPlan


def resolve(_params: Any, _context: Any) -> StepPlan:
    return plan(image="outrider/base:latest")


outrider_step_types = hook(resolve=resolve)
