"""It takes a secret from the environment at import and puts it into the arguments."""

import os
from typing import Any

from words import hook, plan

from outrider.steps import StepPlan

TOKEN = os.environ.get("WORDS_TOKEN", "")


def resolve(_params: Any, _context: Any) -> StepPlan:
    return plan(args=(f"--token={TOKEN}",) if TOKEN else ())


outrider_step_types = hook(resolve=resolve)
