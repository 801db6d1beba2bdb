"""From a step of the pipeline to its plan: rendered, validated, resolved by its plugin, checked against the node.

Nothing here does anything: a plan that is refused has cost nothing.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from agent_core.plugins import PluginError, PluginHost, RegisteredStepType, guarded
from agent_core.policy import NodePolicy
from outrider.errors import InvalidInput, NotFound, OutriderError, PermanentError, Problem, StepFailed
from outrider.expressions import render_params
from outrider.masking import contains_secret
from outrider.pipeline import Pipeline, Step
from outrider.schema import check_params, check_steps
from outrider.steps import ObjectContext, Resources, StepContext, StepPlan, VolumeMount

MAX_OUTPUTS_BYTES = 64 * 1024


@dataclass(frozen=True)
class PlannedStep:
    """A plan and what it was made from. ``inputs`` is the content of /outrider/inputs.json."""

    plan: StepPlan
    params: dict[str, Any]
    resources: Resources
    context: StepContext

    @property
    def plan_json(self) -> str:
        return self.plan.model_dump_json()

    @property
    def params_json(self) -> str:
        return json.dumps(self.params)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.plan_json.encode()).hexdigest()

    @property
    def inputs(self) -> bytes:
        return json.dumps(self.params if self.plan.inputs is None else self.plan.inputs).encode()


class Planner:
    """Plans the steps of one run. Each method raises an OutriderError that says what is wrong with the step."""

    def __init__(
        self,
        pipeline: Pipeline,
        run_id: str,
        plugins: PluginHost,
        policy: NodePolicy,
        facts: Mapping[str, Any],
        object_: ObjectContext | None,
    ) -> None:
        self._pipeline = pipeline
        self._run_id = run_id
        self._plugins = plugins
        self._policy = policy
        self._facts = facts
        self._object = object_

    def check(self) -> None:
        """The whole pipeline against this node's step types. InvalidInput has every problem."""
        problems = check_steps(self._pipeline, self._plugins.step_types, where="this node")
        if problems:
            raise InvalidInput(_sentence(f"pipeline {self._pipeline.name} can't run on this node", problems), problems)

    def step_type(self, step: Step) -> RegisteredStepType:
        """What ``uses:`` names."""
        found = self._plugins.step_types.get(step.uses)
        if found is None:
            raise NotFound(f"this node has no step type {step.uses}", code="unknown_step_type")
        return found

    def plan(self, step: Step, context: Mapping[str, Any]) -> PlannedStep:
        """The plan of ``step`` with the values that its expressions have now."""
        step_type = self.step_type(step)
        rendered = render_params(step.with_, step_type.params_schema, context)
        problems = check_params(step, rendered, step_type)
        if problems:
            raise InvalidInput(_sentence(f"the parameters of step {step.name} are wrong", problems), problems)
        params, dumped = self._validated(step, step_type, rendered)
        try:
            plan = guarded(
                lambda: step_type.step_type.resolve(params, self.context(step)),
                f"step type {step.uses} can't make a plan for step {step.name}",
                self._plugins.limit_s,
            )
        except PluginError as error:
            if isinstance(error.__cause__, OutriderError):
                raise error.__cause__ from error
            raise PermanentError(str(error), code="plan_failed") from error
        if not isinstance(plan, StepPlan):
            raise PermanentError(f"step type {step.uses} made no StepPlan for step {step.name}", code="plan_failed")
        return self._checked(step, plan, dumped, self.context(step))

    def recall(self, step: Step, plan: Mapping[str, Any], params: dict[str, Any]) -> PlannedStep:
        """The plan as the journal has it; the node's policy may have become stricter since."""
        return self._checked(step, StepPlan.model_validate(plan), params, self.context(step))

    def context(self, step: Step) -> StepContext:
        """What ``resolve`` and the hooks may know."""
        mounts = tuple(VolumeMount(name, each.path, each.writable) for name, each in step.volumes.items())
        return StepContext(
            run_id=self._run_id,
            step=step.name,
            volumes=mounts,
            envs=tuple(step.envs),
            # Copies: what a plugin does to them is seen by nobody else.
            object=copy.deepcopy(self._object),
            node=copy.deepcopy(dict(self._facts)),
        )

    def outputs(
        self, step: Step, given: dict[str, Any], secrets: tuple[str, ...], env: Mapping[str, str]
    ) -> dict[str, Any]:
        """What the step gave, by its outputs model. StepFailed if it is not that, too long, or has a secret in it.

        ``env`` is what the step was allotted: some of it may be shown although it comes from an env set.
        """
        step_type = self.step_type(step).step_type
        model = step_type.outputs
        try:
            outputs = guarded(
                lambda: model.model_validate(given).model_dump(mode="json", by_alias=True),
                f"the outputs of step {step.name} can't be checked by {step.uses}",
                self._plugins.limit_s,
            )
        except PluginError as error:
            if not isinstance(error.__cause__, ValidationError):
                raise StepFailed(str(error), code="outputs_invalid") from error
            raise StepFailed(
                f"the outputs of step {step.name} are not what {step.uses} promises: {_first(error.__cause__)}",
                code="outputs_invalid",
            ) from error
        text = json.dumps(outputs, ensure_ascii=False)
        if len(text.encode("utf-8", "surrogatepass")) > MAX_OUTPUTS_BYTES:
            raise StepFailed(
                f"the outputs of step {step.name} are longer than {MAX_OUTPUTS_BYTES} bytes",
                code="outputs_too_long",
                hint="write data to a volume, and its path to the outputs",
            )
        # The same value under another name, which the pipeline may have mixed up with it, stays a secret.
        hidden = {value for name, value in env.items() if name not in step_type.public_envs}
        public = {env[name] for name in step_type.public_envs if name in env} - hidden
        kept = [secret for secret in secrets if secret not in public]
        if kept and contains_secret(text.encode("utf-8", "surrogatepass"), kept):
            raise StepFailed(
                f"the outputs of step {step.name} contain a secret",
                code="secret_in_outputs",
                hint="let it write to a file on a volume what all who may see the run must not read",
            )
        return outputs

    def _validated(
        self, step: Step, step_type: RegisteredStepType, rendered: dict[str, Any]
    ) -> tuple[BaseModel, dict[str, Any]]:
        """The parameters as ``resolve`` gets them, and as JSON. A validator that breaks is its plugin's failure."""

        def validate() -> tuple[BaseModel, dict[str, Any]]:
            params = step_type.step_type.params.model_validate(rendered)
            return params, params.model_dump(mode="json", by_alias=True)

        what = f"the parameters of step {step.name} can't be checked by {step.uses}"
        try:
            return guarded(validate, what, self._plugins.limit_s)
        except PluginError as error:
            if not isinstance(error.__cause__, ValidationError):
                raise PermanentError(str(error), code="plan_failed") from error
            problems = [
                Problem(
                    item["msg"].removeprefix("Value error, "),
                    path="with." + ".".join(str(part) for part in item["loc"]),
                )
                for item in error.__cause__.errors(include_url=False, include_input=False)
            ]
            wrong = f"the parameters of step {step.name} are wrong"
            raise InvalidInput(_sentence(wrong, problems), problems) from error

    def _checked(self, step: Step, plan: StepPlan, params: dict[str, Any], context: StepContext) -> PlannedStep:
        wanted = Resources(
            memory_bytes=step.resources.memory_bytes or plan.resources.memory_bytes,
            cpus=step.resources.cpus or plan.resources.cpus,
            pids=step.resources.pids or plan.resources.pids,
        )
        self._policy.check_plan(plan)
        return PlannedStep(plan, params, self._policy.limits_for(wanted), context)


def _sentence(what: str, problems: list[Problem]) -> str:
    return f"{what}: {'; '.join(str(problem) for problem in problems[:20])}"


def _first(error: ValidationError) -> str:
    item = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}"
