"""Pipelines against step types: the checks that need the JSON Schemas of parameters, and the schema for editors.

The same checks run where a pipeline is written (with the plugins installed there), on the server (with what the node
reported) and on the node (with real values in place of expressions).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from outrider._pipeline_reader import mount_problem
from outrider._schema_errors import schema_problems
from outrider._suggest import did_you_mean, listing
from outrider.errors import Problem
from outrider.expressions import reference_paths
from outrider.pipeline import Pipeline, Step
from outrider.steps import StepType

__all__ = [
    "KNOWN_DISTRIBUTIONS",
    "StepTypeLike",
    "StepTypeSpec",
    "check_params",
    "check_steps",
    "installed_step_types",
    "marked_values",
    "pipeline_schema",
]

KNOWN_DISTRIBUTIONS = {
    "s3": "outrider-step-s3",
    "http": "outrider-step-http",
    "archive": "outrider-step-archive",
    "container": "outrider-step-container",
}
"""Where step types come from, by the first part of their name: for saying what to install."""

JSONSchema = Mapping[str, Any]


class StepTypeLike(Protocol):
    """What the checks need to know of a step type."""

    @property
    def name(self) -> str: ...
    @property
    def params_schema(self) -> JSONSchema: ...
    @property
    def envs(self) -> Sequence[str]: ...
    @property
    def distribution(self) -> str: ...


@dataclass(frozen=True, slots=True)
class StepTypeSpec:
    """A step type as it is told to others: its schemas instead of its models."""

    name: str
    params_schema: JSONSchema
    envs: tuple[str, ...] = ()
    distribution: str = ""
    idempotent: bool = False
    outputs_schema: JSONSchema = field(default_factory=dict)
    plugin: str = ""
    version: str = ""
    description: str = ""

    @classmethod
    def of(cls, step_type: StepType, *, distribution: str = "", version: str = "", plugin: str = "") -> StepTypeSpec:
        """The description of an installed step type. Raises what pydantic raises for models without a JSON Schema."""
        return cls(
            name=step_type.name,
            params_schema=step_type.params.model_json_schema(),
            envs=tuple(step_type.envs),
            distribution=distribution,
            idempotent=step_type.idempotent,
            outputs_schema=step_type.outputs.model_json_schema(mode="serialization"),
            plugin=plugin,
            version=version,
            description=step_type.description,
        )


def check_steps(
    pipeline: Pipeline,
    step_types: Mapping[str, StepTypeLike],
    *,
    where: str = "this machine",
    missing: Mapping[str, str] | None = None,
) -> list[Problem]:
    """Everything that the step types say is wrong with the pipeline, in its order.

    Unknown step types, wrong parameters (where they are no expressions), paths outside the step's volumes or written
    to read-only ones, envs that a step type doesn't understand, outputs that a step type doesn't have. ``where`` is
    who has the step types, for the message: "node n7". ``missing`` says for step types that are not there what would
    be right, where more is known than this machine does.
    """
    problems: list[Problem] = []
    for index, step in enumerate(pipeline.steps):
        path = f"steps[{index}]"
        step_type = step_types.get(step.uses)
        if step_type is None:
            problems.append(_placed(pipeline, _unknown(step.uses, step_types, where, f"{path}.uses", missing or {})))
            continue
        params = _check_values(step, step.with_, step_type, f"{path}.with", expressions=True)
        found = [*params, *_check_envs(step, step_type, path)]
        problems += [_placed(pipeline, problem) for problem in found]
    problems += [_placed(pipeline, problem) for problem in _check_outputs(pipeline, step_types)]
    return sorted(problems, key=lambda problem: (problem.line, problem.column))


def check_params(step: Step, params: Mapping[str, Any], step_type: StepTypeLike) -> list[Problem]:
    """What is wrong with ``params`` for ``step``, now that expressions have their values.

    Types, missing and unknown parameters, paths and volumes. Every text is what it is: one that came from outside and
    holds a `${{` is checked like any other.
    """
    return _check_values(step, params, step_type, "with", expressions=False)


def _check_values(
    step: Step, params: Mapping[str, Any], step_type: StepTypeLike, path: str, *, expressions: bool
) -> list[Problem]:
    """With ``expressions``, a text that holds one is taken to be right as far as it isn't known."""
    problems = schema_problems(
        step_type.params_schema, params, path, f"step type {step_type.name}", expressions=expressions
    )
    for value_path, value, keyword, meaning in marked_values(step_type.params_schema, dict(params), path):
        if keyword == "x-outrider-path" and isinstance(value, str):
            problems += _check_path(step, value_path, value, meaning == "write", expressions=expressions)
        elif keyword == "x-outrider-volumes" and isinstance(value, Mapping):
            problems += _check_volumes(step, value_path, value, expressions=expressions)
    return problems


def _placed(pipeline: Pipeline, problem: Problem) -> Problem:
    line, column = pipeline.place(problem.path)
    return Problem(problem.message, problem.path, line, column, problem.hint)


def _unknown(
    uses: str, step_types: Mapping[str, StepTypeLike], where: str, path: str, missing: Mapping[str, str]
) -> Problem:
    if missing.get(uses):
        return Problem(f"{where} has no step type {uses}", path, hint=missing[uses])
    distribution = KNOWN_DISTRIBUTIONS.get(uses.split(".")[0])
    near = did_you_mean(uses, step_types)
    siblings = any(name.startswith(uses.split(".")[0] + ".") for name in step_types)
    if distribution and not siblings:
        hint = f"it comes from {distribution}, which is to be installed there"
    else:
        hint = near or (f"there are {listing(step_types)}" if step_types else "no step plugin is installed there")
    return Problem(f"{where} has no step type {uses}", path, hint=hint)


def _check_envs(step: Step, step_type: StepTypeLike, path: str) -> Iterator[Problem]:
    """A step type that names no env, or "*", takes any: an image of the user's own, say."""
    if not step_type.envs or "*" in step_type.envs:
        return
    for name in step.envs:
        if name not in step_type.envs:
            hint = did_you_mean(name, step_type.envs, otherwise=f"it understands {listing(step_type.envs)}")
            yield Problem(f"{step_type.name} has no use for the env {name}", f"{path}.envs.{name}", hint=hint)


def _check_path(step: Step, path: str, value: str, write: bool, *, expressions: bool) -> Iterator[Problem]:
    literal, expression, _ = value.partition("${{") if expressions else (value, "", "")
    if expression:  # what is certain is the directory before it
        literal = literal[: literal.rfind("/") + 1]
        if not literal:
            return
    if ".." in literal.split("/"):
        yield Problem(f"{literal!r} leaves its directory with '..'", path, hint="write the path without it")
        return
    place = "/" + "/".join(part for part in literal.split("/") if part not in ("", "."))
    mounts = sorted(step.volumes.items(), key=lambda item: -len(item[1].path))
    for name, mount in mounts:
        if place == mount.path or place.startswith(mount.path + "/"):
            if write and not mount.writable:
                hint = f'allot it for writing: {name}: "{mount.path}:rw"'
                yield Problem(f"{value} is written to, but the volume {name} is read-only here", path, hint=hint)
            return
        if expression and (place == "/" or mount.path.startswith(place + "/")):
            return  # the expression may yet lead there
    has = ", ".join(f"{name} at {mount.path}" for name, mount in sorted(step.volumes.items()))
    yield Problem(
        f"{value} is below no volume of this step",
        path,
        hint=f"it has {has}" if has else "allot it one with `volumes:`",
    )


def _check_volumes(step: Step, path: str, value: Mapping[str, Any], *, expressions: bool) -> Iterator[Problem]:
    for name, mount in value.items():
        if name not in step.volumes:
            known = f"it has {listing(step.volumes)}" if step.volumes else "allot it with the step's own `volumes:`"
            hint = did_you_mean(name, step.volumes, otherwise=known)
            yield Problem(f"this step was not given the volume {name}", f"{path}.{name}", hint=hint)
            continue
        if not isinstance(mount, str) or (expressions and "${{" in mount):
            continue
        target, _, mode = mount.partition(":")
        if mode not in ("", "ro", "rw"):
            yield Problem(f"the mode {mode!r} is not known", f"{path}.{name}", hint="a mount reads like /data:rw")
        elif wrong := mount_problem(target):
            yield Problem(f"{target!r} {wrong}", f"{path}.{name}", hint="a mount reads like /data or /data:rw")
        elif mode == "rw" and not step.volumes[name].writable:
            hint = f'allot it for writing: {name}: "{step.volumes[name].path}:rw"'
            yield Problem(
                f"the volume {name} is handed on rw, but this step has it read-only", f"{path}.{name}", hint=hint
            )


def marked_values(schema: JSONSchema, value: Any, path: str) -> Iterator[tuple[str, Any, str, Any]]:
    """Each value that the schema marks with an ``x-outrider-*`` keyword: (path, value, keyword, what it says)."""
    yield from _walk(schema, schema, value, path, 0)


def _walk(root: JSONSchema, schema: Any, value: Any, path: str, depth: int) -> Iterator[tuple[str, Any, str, Any]]:
    if not isinstance(schema, Mapping) or depth > 100:  # a schema may refer to itself without end
        return
    for keyword in ("x-outrider-path", "x-outrider-volumes"):
        if keyword in schema:
            yield path, value, keyword, schema[keyword]
    target = resolve_ref(root, schema)
    if target is not None:
        yield from _walk(root, target, value, path, depth + 1)
    for keyword in ("anyOf", "oneOf", "allOf"):
        seen = []
        for branch in _list(schema.get(keyword)):
            for found in _walk(root, branch, value, path, depth + 1):
                if found not in seen:
                    seen.append(found)
                    yield found
    if isinstance(value, Mapping):
        given = schema.get("properties")
        properties = given if isinstance(given, Mapping) else {}
        for key, item in value.items():
            inner = properties.get(key, schema.get("additionalProperties"))
            yield from _walk(root, inner, item, f"{path}.{key}", depth + 1)
    elif isinstance(value, list):
        first = _list(schema.get("prefixItems"))
        for index, item in enumerate(value):
            inner = first[index] if index < len(first) else schema.get("items")
            yield from _walk(root, inner, item, f"{path}[{index}]", depth + 1)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def resolve_ref(root: JSONSchema, schema: JSONSchema) -> JSONSchema | None:
    """What a schema's local ``$ref`` points to; ``None`` without one, or if it points nowhere."""
    ref = schema.get("$ref")
    if not isinstance(ref, str) or not ref.startswith("#"):
        return None
    target: Any = root
    for part in ref[1:].split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(target, Mapping) or part not in target:
            return None
        target = target[part]
    return target if isinstance(target, Mapping) else None


def _check_outputs(pipeline: Pipeline, step_types: Mapping[str, StepTypeLike]) -> Iterator[Problem]:
    """References to outputs that a step type surely doesn't have."""
    schemas = {step.name: getattr(step_types.get(step.uses), "outputs_schema", None) for step in pipeline.steps}
    texts: list[tuple[str, Any]] = []
    for index, step in enumerate(pipeline.steps):
        texts += ((f"steps[{index}].with", step.with_), (f"steps[{index}].if", _wrapped(step.if_)))
    for index, writeback in enumerate(pipeline.writeback):
        texts += ((f"writeback[{index}].value", writeback.value), (f"writeback[{index}].if", _wrapped(writeback.if_)))
    for path, value in texts:
        for inner, text in _leaves(value, path):
            for reference in sorted(reference_paths(text)):
                if reference[0] == "steps" and len(reference) > 3 and reference[2] == "outputs":
                    schema = schemas.get(reference[1])
                    if schema:
                        yield from _check_output(schema, reference, inner)


def _wrapped(condition: str | None) -> str | None:
    return condition if condition is None or "${{" in condition else f"${{{{ {condition} }}}}"


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")


def _check_output(root: JSONSchema, reference: Sequence[str], path: str) -> Iterator[Problem]:
    schema: Any = root
    for position, name in enumerate(reference[3:], 3):
        while isinstance(schema, Mapping) and "$ref" in schema:
            schema = resolve_ref(root, schema)
        if not isinstance(schema, Mapping) or "anyOf" in schema or "oneOf" in schema or "allOf" in schema:
            return
        properties = schema.get("properties")
        if not isinstance(properties, Mapping) or name not in properties:
            if schema.get("type") == "object" and schema.get("additionalProperties") is False:
                known = properties or {}
                hint = did_you_mean(name, known, otherwise=f"there are {listing(known)}" if known else "it has none")
                yield Problem(f"{'.'.join(reference[:position])} has no {name}", path, hint=hint)
            return
        schema = properties[name]


def installed_step_types() -> tuple[dict[str, StepTypeSpec], list[Problem]]:
    """The step types of the plugins installed here, and what is wrong with plugins that can't be used.

    They are loaded in a process of their own: whatever a plugin does on import, its pipeline's author gets an answer.
    """
    from outrider.plugin_probe import probe

    found = probe()
    specs = [StepTypeSpec(**{**each, "envs": tuple(each["envs"])}) for each in found.step_types]
    problems = [
        Problem(each.error.removesuffix(f"; {each.fix}"), hint=each.fix)
        for each in found.plugins
        if each.state == "error"
    ]
    return {each.name: each for each in specs}, problems


def pipeline_schema(
    step_types: Mapping[str, StepTypeSpec | Sequence[StepTypeSpec]],
    *,
    env_sets: Sequence[str] = (),
    complete: bool = False,
) -> dict[str, Any]:
    """A JSON Schema (draft-07) for pipelines, with the parameters of ``step_types``; for editors.

    Where a step type comes in several versions (of several nodes), what fits one of them fits. ``env_sets`` are
    offered where an env set is named. ``complete``: there are no other step types than these.
    """
    from outrider._editor_schema import build

    each = {name: (spec,) if isinstance(spec, StepTypeSpec) else tuple(spec) for name, spec in step_types.items()}
    return build(each, env_sets, complete=complete)


def schema_text(schema: Mapping[str, Any]) -> str:
    """A schema as text, the same each time."""
    return json.dumps(schema, indent=2, ensure_ascii=False)
