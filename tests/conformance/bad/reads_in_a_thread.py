"""Its resolve lets a thread look at the machine that it happens to run on."""

import threading
from pathlib import Path
from typing import Any

from words import hook, plan

from outrider.steps import StepPlan


def resolve(_params: Any, _context: Any) -> StepPlan:
    there: list[bool] = []
    thread = threading.Thread(target=lambda: there.append(Path("/etc/hostname").exists()))
    thread.start()
    thread.join()
    return plan(args=("named",) if there == [True] else ())


outrider_step_types = hook(resolve=resolve)
