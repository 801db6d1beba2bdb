"""`resolve` in an interpreter of its own, for the check of determinism: a request on stdin, the plans on stdout.

The caller gives the interpreter another hash seed, home, time zone and working directory, and canaries as envs; a
function that is what it says makes the same plans there.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from outrider.steps import ObjectContext, StepContext, VolumeMount


def context_as_json(context: StepContext) -> dict[str, Any]:
    """A context that another process can make again."""
    return {
        "run_id": context.run_id,
        "step": context.step,
        "volumes": [[mount.name, mount.path, mount.writable] for mount in context.volumes],
        "envs": list(context.envs),
        "object": None
        if context.object is None
        else [context.object.kind, context.object.name, dict(context.object.attributes)],
        "node": dict(context.node),
    }


def context_from_json(data: dict[str, Any]) -> StepContext:
    """The context again."""
    return StepContext(
        run_id=data["run_id"],
        step=data["step"],
        volumes=tuple(VolumeMount(*mount) for mount in data["volumes"]),
        envs=tuple(data["envs"]),
        object=None if data["object"] is None else ObjectContext(*data["object"]),
        node=data["node"],
    )


def main() -> None:
    """Read ``{"path", "module", "attribute", "step_type", "cases": [{"params", "context"}]}``, print the plans."""
    request = json.load(sys.stdin)
    sys.path[:0] = [entry for entry in request["path"] if entry not in sys.path]
    plugin: Any = importlib.import_module(request["module"])
    for part in filter(None, request["attribute"].split(".")):
        plugin = getattr(plugin, part)
    step_type = next(each for each in plugin.outrider_step_types() if each.name == request["step_type"])
    plans = []
    for case in request["cases"]:
        params = step_type.params.model_validate(case["params"])
        plan = step_type.resolve(params, context_from_json(case["context"]))
        plans.append(plan.model_dump(mode="json"))
    print(json.dumps(plans))


if __name__ == "__main__":
    main()
