"""The JSON Schema of pipelines for editors: draft-07, which is what their YAML support reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from outrider import pipeline as model
from outrider.steps import STEP_TYPE_NAME

if TYPE_CHECKING:
    from outrider.schema import StepTypeSpec

Schema = dict[str, Any]

_EXPRESSION: Schema = {"type": "string", "pattern": r"\$\{\{"}
_MAX_NESTING = 64
_DROPPED = frozenset({"$schema", "$id", "$defs", "definitions", "discriminator", "unevaluatedProperties"})
_OF_SCHEMAS = ("anyOf", "oneOf", "allOf")
_SCHEMAS_BY_NAME = ("properties", "patternProperties")
_ONE_SCHEMA = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")


def build(
    step_types: Mapping[str, Sequence[StepTypeSpec]], env_sets: Sequence[str] = (), *, complete: bool = False
) -> Schema:
    """See ``outrider.schema.pipeline_schema``."""
    definitions: Schema = {}
    rules = []
    for name in sorted(step_types):
        specs = step_types[name]
        keys = [name if len(specs) == 1 else f"{name}@{number}" for number in range(1, len(specs) + 1)]
        for key, spec in zip(keys, specs, strict=True):
            described = {"title": name, "description": spec.description or f"Parameters of {name}"}
            definitions[key] = {**_parameters(spec, key, definitions), **described}
        if len(keys) > 1:
            definitions[name] = {"title": name, "anyOf": [{"$ref": f"#/definitions/{key}"} for key in keys]}
        then: Schema = {"properties": {"with": {"$ref": f"#/definitions/{name}"}, **_envs_of(specs)}}
        if all(spec.params_schema.get("required") for spec in specs):
            then["required"] = ["with"]
        rules.append({"if": {"properties": {"uses": {"const": name}}, "required": ["uses"]}, "then": then})
    schema = _pipeline(sorted(step_types), sorted(env_sets), complete=complete)
    if rules:
        schema["properties"]["steps"]["items"]["allOf"] = rules
    return {**schema, "definitions": definitions}


def _parameters(spec: StepTypeSpec, key: str, definitions: Schema) -> Schema:
    found: Schema = {}
    try:
        _check_nesting(spec.params_schema)
        made = _draft07(spec.params_schema, key, found, relax=False)
        json.dumps([made, found])
    except (RecursionError, AttributeError, TypeError, ValueError):
        # A stranger's schema that is none: its steps are the node's to judge, and the others are told as ever.
        return {"type": ["object", "null"]}
    definitions.update(found)
    return dict(made)


def _check_nesting(schema: object, left: int = _MAX_NESTING) -> None:
    # Well below what an interpreter can take: whoever checks against the schema goes several calls deep a level.
    if not left:
        raise ValueError(f"it nests deeper than {_MAX_NESTING} levels")
    children = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    for child in children:
        _check_nesting(child, left - 1)


def _envs_of(specs: Sequence[StepTypeSpec]) -> Schema:
    """The envs that a step type understands, for it to offer; nothing where it takes any."""
    names = sorted({name for spec in specs for name in spec.envs})
    if not all(spec.envs for spec in specs) or not all(re.match(model.ENV_NAME_PATTERN, name) for name in names):
        return {}
    one_of_them = f"^(.*\\.)?({'|'.join(names)})$"
    own: Schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
    listed: Schema = {"anyOf": [{"enum": names}, {"type": "string", "pattern": one_of_them}]}
    return {"envs": {"anyOf": [{**own, "additionalProperties": False}, {"type": "array", "items": listed}]}}


def _text(description: str, **more: Any) -> Schema:
    return {"type": "string", "description": description, **more}


def _mapping(description: str, names: str, values: Schema) -> Schema:
    return {
        "type": ["object", "null"],
        "description": description,
        "propertyNames": {"pattern": names},
        "additionalProperties": values,
    }


def _pipeline(step_types: list[str], env_sets: list[str], *, complete: bool) -> Schema:
    name = {"type": "string", "pattern": model.NAME_PATTERN}
    duration = {"type": "string", "pattern": r"^\s*([0-9]+(\.[0-9]+)?(ms|s|m|h|d))+\s*$", "examples": ["30s", "10m"]}
    size = {
        "type": ["string", "integer"],
        "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*([KMGTP]i?B|kB|B)?\s*$",
        "examples": ["5GiB"],
    }
    condition = {
        "type": ["string", "boolean"],
        "description": "Only if this holds: an expression, with or without ${{ }}.",
    }
    uses: Schema = {"type": "string", "pattern": f"^{STEP_TYPE_NAME.pattern}$"}
    if step_types:
        # Others than those that this machine knows are not wrong: the node may have plugins that it has not.
        uses = {"enum": step_types} if complete else {"anyOf": [{"enum": step_types}, uses]}
    arg = _object(
        {
            "type": {"enum": ["string", "integer", "number", "boolean", "list", "object"], "default": "string"},
            "default": {"description": "Taken where neither the caller nor the object gives a value."},
            "required": {"type": "boolean", "description": "false: may be absent, which has(args.x) tells."},
            "from": _text("The object's attribute that it is taken from; its own name if this is left out."),
            "description": _text("For people."),
        }
    )
    volume = _object(
        {
            "scope": {"enum": ["run", "object", "node"], "default": "run", "description": "Whom it belongs to."},
            "keep": {"type": "boolean", "description": "Outlives the run."},
            "size": {**size, "description": "The most that it may hold."},
        }
    )
    step = _object(
        {
            "name": {**name, "description": "Its name, which others refer to."},
            "uses": {**uses, "description": "The step type."},
            "with": {"type": ["object", "null"], "description": "The step type's parameters."},
            "volumes": _mapping(
                "What is mounted into it: `/path`, or `/path:rw`.",
                model.NAME_PATTERN,
                _text("`/path:rw`", pattern="^/[^:]+(:r[ow])?$"),
            ),
            "envs": {
                "description": "The envs that it gets: names, or its own name for each.",
                "anyOf": [
                    {"type": "array", "items": {"type": "string"}},
                    {
                        "type": "object",
                        "propertyNames": {"pattern": model.ENV_NAME_PATTERN},
                        "additionalProperties": {"type": "string"},
                    },
                ],
            },
            "needs": {"type": "array", "items": name, "description": "The steps before it; the one above if left out."},
            "if": condition,
            "timeout": {**duration, "description": "How long one attempt may take."},
            "retry": _object({"max": {"type": "integer", "minimum": 0, "maximum": 100}, "first_wait": duration}),
            "resources": _object(
                {"memory": size, "cpus": {"type": "number", "minimum": 0.01}, "pids": {"type": "integer", "minimum": 1}}
            ),
            "idempotent": {
                "type": "boolean",
                "description": "Doing it twice does no harm; the step type says so by default.",
            },
        },
        "name",
        "uses",
    )
    writeback = _object(
        {
            "attribute": _text("The attribute of the object's status.", pattern=model.ATTRIBUTE_PATTERN),
            "value": {"description": "What is written there."},
            "if": condition,
        },
        "attribute",
        "value",
    )
    envs = {
        "type": "array",
        "description": "Env sets of the server, and plain values; never a secret.",
        "items": {
            "anyOf": [
                _object({"set": {"anyOf": [{"enum": env_sets}, name]} if env_sets else name}, "set"),
                _object(
                    {"name": {"type": "string", "pattern": model.ENV_NAME_PATTERN}, "value": {"type": "string"}},
                    "name",
                    "value",
                ),
            ]
        },
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Outrider pipeline",
        **_object(
            {
                "name": {**name, "description": "The pipeline's name."},
                "args": _mapping("Typed arguments.", model.ARG_NAME_PATTERN, {**arg, "type": ["object", "null"]}),
                "envs": envs,
                "volumes": _mapping("Directories.", model.NAME_PATTERN, {**volume, "type": ["object", "null"]}),
                "steps": {"type": "array", "minItems": 1, "items": step, "description": "What is done."},
                "writeback": {
                    "type": "array",
                    "items": writeback,
                    "description": "What goes onto the object's status.",
                },
            },
            "name",
            "steps",
        ),
    }


def _object(properties: Schema, *required: str) -> Schema:
    schema: Schema = {"type": "object", "additionalProperties": False, "properties": properties}
    return {**schema, "required": list(required)} if required else schema


def _draft07(schema: Any, owner: str, definitions: Schema, *, relax: bool = True) -> Any:
    """A schema of pydantic's (2020-12) in draft-07, its ``$defs`` moved under names of their own, expressions let in.

    ``relax`` adds the alternative "a text that holds an expression"; the parameters as a whole can't be one.
    """
    if not isinstance(schema, Mapping):
        return schema
    for name, inner in schema.get("$defs", {}).items():
        key = f"{owner}.{name}"
        if key not in definitions:
            definitions[key] = {}  # first, for those that refer to themselves
            definitions[key] = _draft07(inner, owner, definitions)
    result: Schema = {}
    for keyword, value in schema.items():
        if keyword in _DROPPED or keyword.startswith("x-outrider-"):
            continue
        if keyword == "$ref":
            ref = str(value)
            result["$ref"] = (
                f"#/definitions/{owner}.{ref[8:]}" if ref.startswith("#/$defs/") else f"#/definitions/{owner}"
            )
        elif keyword in _OF_SCHEMAS:
            result[keyword] = [_draft07(inner, owner, definitions, relax=False) for inner in value]
        elif keyword in _SCHEMAS_BY_NAME:
            result[keyword] = {name: _draft07(inner, owner, definitions) for name, inner in value.items()}
        elif keyword == "prefixItems":
            result["items"] = [_draft07(inner, owner, definitions) for inner in value]
        elif keyword == "items" and "prefixItems" in schema:
            result["additionalItems"] = _draft07(value, owner, definitions)
        elif keyword in _ONE_SCHEMA:
            result[keyword] = _draft07(value, owner, definitions, relax=keyword in ("items", "additionalProperties"))
        elif keyword in ("dependentRequired", "dependentSchemas"):
            result.setdefault("dependencies", {}).update(value)
        else:
            result[keyword] = value
    if "$ref" in result and len(result) > 1:  # in draft-07 whatever stands beside a $ref is ignored
        result["allOf"] = [*result.get("allOf", ()), {"$ref": result.pop("$ref")}]
    if "oneOf" in result:  # an expression may fit several of them
        result["anyOf"] = result.pop("oneOf")
    return _let_expressions_in(result) if relax else result


def _let_expressions_in(schema: Schema) -> Schema:
    if not schema or ("$ref" in schema and len(schema) == 1):
        return schema  # where it points, they are let in already
    if schema.get("type") == "string" and not {"pattern", "enum", "const", "format", "maxLength", "minLength"} & set(
        schema
    ):
        return schema
    notes: Schema = {key: schema.pop(key) for key in ("title", "description", "default", "examples") if key in schema}
    return {**notes, "anyOf": [schema, _EXPRESSION]}
