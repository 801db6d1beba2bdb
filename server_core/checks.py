"""What is checked of a pipeline before a run is accepted: everything that can be known without starting anything."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from outrider.errors import InvalidInput, Problem
from outrider.pipeline import EnvSetRef, Pipeline, env_references, graph, load_pipeline, resolve_args
from outrider.schema import StepTypeSpec, check_steps
from outrider.v1 import types_pb2
from server_core.store import envs
from server_core.store.nodes import listing


@dataclass(frozen=True, slots=True)
class Checked:
    """A pipeline that may run."""

    pipeline: Pipeline
    args: Mapping[str, Any]
    env_names: list[str]
    steps: list[types_pb2.StepStatus]


def load(text: bytes, sha256: bytes) -> Pipeline:
    """The pipeline of ``text``; an empty digest is not compared. Raises InvalidInput with every problem."""
    if sha256 and hashlib.sha256(text).digest() != sha256:
        raise InvalidInput("the pipeline's text does not fit its SHA-256", code="digest_mismatch", hint="send it again")
    return load_pipeline(text)


def problems_of(
    pipeline: Pipeline,
    node: types_pb2.Node | None,
    known_envs: Mapping[str, list[str] | None],
    env_sets_hint: str,
    given: Mapping[str, Any],
    attributes: Mapping[str, Any] | None,
    missing: Mapping[str, str],
) -> tuple[list[Problem], dict[str, Any]]:
    """All that is wrong, and the frozen arguments if nothing is wrong with them.

    ``known_envs`` has the variables of each set that the pipeline names, None for a set that does not exist.
    ``missing`` has what is known of step types that the node has not (`server_core.roles.why_missing`).
    """
    problems = []
    if node is not None:
        problems = check_steps(pipeline, step_types(node), where=f"node {node.node_id}", missing=missing)
    problems += _env_problems(pipeline, known_envs, env_sets_hint)
    args: dict[str, Any] = {}
    try:
        args = resolve_args(pipeline, given, attributes)
    except InvalidInput as error:
        problems += error.problems or (Problem(error.message, "args", hint=error.hint),)
    return problems, args


def without_object(pipeline: Pipeline) -> list[Problem]:
    """What is wrong with a run that is for no object."""
    hint = "run it for one (--object KIND/NAME), or give the volume another scope"
    return [
        Problem("the volume belongs to the run's object, and this run has none", path, *pipeline.place(path), hint)
        for path in (f"volumes.{name}.scope" for name, each in pipeline.volumes.items() if each.scope == "object")
    ]


def env_sets_of(pipeline: Pipeline) -> list[str]:
    """The env sets that a pipeline names."""
    listed = [env.set for env in pipeline.envs if isinstance(env, EnvSetRef)]
    used = [name.split(".", 1)[0] for name in env_references(pipeline) if "." in name]
    return list(dict.fromkeys([*listed, *used]))


def known_envs(connection: Connection, pipeline: Pipeline) -> tuple[dict[str, list[str] | None], str]:
    """The variables of each set that the pipeline names, and a hint that lists the sets that there are."""
    return {name: envs.names_of(connection, name) for name in env_sets_of(pipeline)}, envs.known_sets(connection)


def refuse(what: str, problems: list[Problem]) -> None:
    """Raise InvalidInput with all of ``problems``, if there are any. Its sentence tells the first."""
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise InvalidInput(f"{what}: {problems[0]}{more}", problems, code="invalid_pipeline")


def first_statuses(pipeline: Pipeline) -> list[types_pb2.StepStatus]:
    """The steps as they stand before anything has run."""
    needs = graph(pipeline)
    return [
        types_pb2.StepStatus(name=step.name, uses=step.uses, state=types_pb2.STEP_STATE_PENDING, needs=needs[step.name])
        for step in pipeline.steps
    ]


def step_types(node: types_pb2.Node) -> dict[str, StepTypeSpec]:
    """The step types that a node reported, by name."""
    return {
        info.name: StepTypeSpec(
            name=info.name,
            params_schema=_schema(info.params_schema_json),
            envs=tuple(info.envs),
            distribution=info.distribution,
            idempotent=info.idempotent,
            outputs_schema=_schema(info.outputs_schema_json),
            plugin=info.plugin,
            version=info.version,
            description=info.description,
        )
        for info in node.step_types
    }


def _schema(text: bytes) -> dict[str, Any]:
    schema = json.loads(text) if text else {}
    return schema if isinstance(schema, dict) else {}


def _env_problems(pipeline: Pipeline, known: Mapping[str, list[str] | None], sets_hint: str) -> list[Problem]:
    problems = []
    missing = {name for name, names in known.items() if names is None}
    told = set()
    for index, env in enumerate(pipeline.envs):
        if isinstance(env, EnvSetRef) and env.set in missing:
            told.add(env.set)
            problems.append(_missing_set(pipeline, f"envs[{index}].set", env.set, sets_hint))
    for index, step in enumerate(pipeline.steps):
        for variable, reference in step.envs.items():
            set_name, dot, name = reference.partition(".")
            path = f"steps[{index}].envs.{variable}"
            if not dot or set_name in told:
                continue
            if set_name in missing:
                problems.append(_missing_set(pipeline, path, set_name, sets_hint))
            elif name not in (names := known.get(set_name) or []):
                line, column = pipeline.place(path)
                hint = listing("it has", names) if names else "it is empty"
                problems.append(Problem(f"env set {set_name} has no {name}", path, line, column, hint))
    return problems


def _missing_set(pipeline: Pipeline, path: str, name: str, hint: str) -> Problem:
    line, column = pipeline.place(path)
    return Problem(f"there is no env set {name}", path, line, column, hint)
