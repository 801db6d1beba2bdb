"""One step without a pipeline of its own: what is to be done, as a pipeline of that step, and its plan.

For those who try a plugin: nothing here needs a server or an engine (`agent_core.trial` carries it out).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agent_core.planning import PlannedStep, Planner
from agent_core.plugins import PluginHost
from agent_core.policy import NodePolicy
from agent_core.telemetry.node import machine_facts
from outrider.errors import InvalidInput
from outrider.pipeline import Pipeline, load_pipeline
from outrider.steps import ObjectContext

SET = "trial"
"""The name of the pipeline, and of the env set that its envs come from."""


@dataclass(frozen=True, slots=True)
class GivenVolume:
    """A directory of this machine that stands for a volume: where it is mounted in the step, and how."""

    directory: Path
    path: str
    writable: bool = False


@dataclass(frozen=True, slots=True)
class StepRequest:
    """One step to be tried. ``params`` are values, as the program is to get them: nothing in them is an expression."""

    uses: str
    params: Mapping[str, Any]
    volumes: Mapping[str, GivenVolume] = field(default_factory=dict)
    envs: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)  # envs, too; masked wherever they turn up
    object_ref: str = ""  # "kind/name" of the run's object; "": it has none
    attributes: Mapping[str, Any] = field(default_factory=dict)  # of the object
    timeout_s: float = 3600.0
    cpus: float | None = None  # a limit for this step; None: as its plan says

    @property
    def step(self) -> str:
        """The name of the one step of the pipeline."""
        return self.uses.rpartition(".")[2][:32] or "step"

    def pipeline(self) -> Pipeline:
        """The pipeline of this one step. InvalidInput if it can't be one."""
        return load_pipeline(self.yaml())

    def yaml(self) -> str:
        """Its text. InvalidInput if the parameters hold what a pipeline would take for an expression."""
        given = json.dumps(dict(self.params))
        if "${{" in given:
            raise InvalidInput(
                "the parameters hold a ${{ expression }}, and there is no pipeline here that gives it a value",
                hint="write the value that it is to have",
            )
        step: dict[str, Any] = {"name": self.step, "uses": self.uses, "with": dict(self.params), "retry": {"max": 0}}
        step["timeout"] = f"{max(1, round(self.timeout_s))}s"
        if self.cpus is not None:
            step["resources"] = {"cpus": self.cpus}
        names = (*self.envs, *self.secrets)
        document: dict[str, Any] = {"name": SET, "steps": [step]}
        if names:
            document["envs"] = [{"set": SET}]
            step["envs"] = {name: f"{SET}.{name}" for name in names}
        if self.volumes:
            document["volumes"] = {name: {} for name in self.volumes}
            step["volumes"] = {
                name: f"{each.path}:rw" if each.writable else each.path for name, each in self.volumes.items()
            }
        return json.dumps(document)


def plan_step(request: StepRequest, plugins: PluginHost, policy: NodePolicy | None = None) -> PlannedStep:
    """What the step comes to on a node with these plugins and this policy; needs no engine and does nothing.

    Raises an OutriderError that says what is wrong with it, as the agent would.
    """
    try:
        pipeline = request.pipeline()
        planner = Planner(pipeline, "trial", plugins, policy or NodePolicy(), machine_facts(), _object_of(request))
        planner.check()
    except InvalidInput as error:
        raise _about_the_step(request, error) from error
    return planner.plan(pipeline.step(request.step), {"args": {}, "node": {}, "run": {}, "volumes": {}, "steps": {}})


def _about_the_step(request: StepRequest, error: InvalidInput) -> InvalidInput:
    """``error`` without lines and paths of the pipeline that the step was put into: nobody has written that one."""
    if not error.problems:
        return error
    problems = [replace(each, path=each.path.removeprefix("steps[0]."), line=0, column=0) for each in error.problems]
    told = "; ".join(map(str, problems))
    return InvalidInput(f"a step {request.uses} can't be made of this: {told}", problems, code=error.code)


def _object_of(request: StepRequest) -> ObjectContext | None:
    kind, _, name = request.object_ref.partition("/")
    return ObjectContext(kind, name, request.attributes) if request.object_ref else None
