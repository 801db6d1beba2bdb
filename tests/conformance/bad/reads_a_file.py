"""Its resolve looks at the machine that it happens to run on."""

from pathlib import Path
from typing import Any

from words import hook, plan

from outrider.steps import StepPlan


def resolve(_params: Any, _context: Any) -> StepPlan:
    return plan(args=(Path("/etc/hostname").read_text(),)) if Path("/etc/hostname").exists() else plan()


outrider_step_types = hook(resolve=resolve)
