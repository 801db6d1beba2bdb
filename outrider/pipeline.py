"""The pipeline: its model, and what can be said of it from the text alone.

``load_pipeline`` reads the YAML strictly (see `docs/pipeline.md` for the language); the functions below it answer
questions about a loaded pipeline. Checks against step types are in ``outrider.schema`` and are offered here too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, StringConstraints

from outrider._suggest import did_you_mean, listing
from outrider.errors import InvalidInput, Problem

__all__ = [
    "MAX_ARGS_BYTES",
    "MAX_TEXT_ARG",
    "Arg",
    "EnvSetRef",
    "EnvValue",
    "Pipeline",
    "Step",
    "StepResources",
    "StepRetry",
    "StepVolume",
    "Volume",
    "Writeback",
    "ancestors",
    "args_from_text",
    "env_references",
    "graph",
    "load_pipeline",
    "plain_envs",
    "resolve_args",
    "writeback_needs",
]

NAME_PATTERN = r"^[a-z][a-z0-9_-]{0,62}$"
ENV_NAME_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]{0,127}$"
ATTRIBUTE_PATTERN = r"^[A-Za-z_][A-Za-z0-9_.-]{0,127}$"
ARG_NAME_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]{0,62}$"

MAX_TEXT_ARG = 64 * 1024
"""Characters of one text argument."""
MAX_ARGS_BYTES = 256 * 1024
"""Bytes of all arguments of a run, as JSON."""

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
EnvName = Annotated[str, StringConstraints(pattern=ENV_NAME_PATTERN)]
ArgType = Literal["string", "integer", "number", "boolean", "list", "object"]


class Model(BaseModel):
    """What all parts have in common: no unknown fields, and no change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Arg(Model):
    """A typed argument. Without a default it is required. ``from_`` names the object's attribute."""

    type: ArgType = "string"
    default: Any = None
    required: bool = True  # false as soon as a default stands in the YAML
    from_: str | None = Field(default=None, alias="from")
    description: str = ""


class EnvSetRef(Model):
    """All envs of a set kept on the server."""

    set: Name


class EnvValue(Model):
    """A plain value; never a secret."""

    name: EnvName
    value: str


class Volume(Model):
    """A directory that Outrider allots. ``run`` scope lives as long as the run."""

    scope: Literal["run", "object", "node"] = "run"
    keep: bool = False
    size_bytes: int | None = None  # `size: 5GiB` in the YAML


class StepRetry(Model):
    """How often a step is tried again after a temporary failure."""

    max: int = 5
    first_wait_s: float = 0.1


class StepResources(Model):
    """Limits of a step's container. ``None`` takes what the step type or the node says."""

    memory_bytes: int | None = None
    cpus: float | None = None
    pids: int | None = None


class StepVolume(Model):
    """A mount inside the step: `/build:rw` in the YAML."""

    path: str
    writable: bool = False


class Step(Model):
    """One step. ``with_`` still holds its expressions."""

    name: Name
    uses: str
    with_: dict[str, Any] = Field(default_factory=dict, alias="with")
    volumes: dict[Name, StepVolume] = Field(default_factory=dict)
    envs: dict[EnvName, str] = Field(default_factory=dict)  # name in the step -> "set.NAME", or "NAME" of an EnvValue
    needs: tuple[Name, ...] | None = None  # None: the step before it
    if_: str | None = Field(default=None, alias="if")
    timeout_s: float | None = None
    retry: StepRetry = StepRetry()
    resources: StepResources = StepResources()
    idempotent: bool | None = None  # None: as the step type says


class Writeback(Model):
    """An attribute of the object's status, the value that goes there, and when."""

    attribute: str
    value: Any
    if_: str | None = Field(default=None, alias="if")


class Pipeline(Model):
    """A whole pipeline, as ``load_pipeline`` gives it: all its names resolved, its graph free of cycles."""

    name: Name
    args: dict[str, Arg] = Field(default_factory=dict)
    envs: tuple[EnvSetRef | EnvValue, ...] = ()
    volumes: dict[Name, Volume] = Field(default_factory=dict)
    steps: tuple[Step, ...] = Field(min_length=1)
    writeback: tuple[Writeback, ...] = ()

    _places: dict[str, tuple[int, int]] = PrivateAttr(default_factory=dict)

    def step(self, name: str) -> Step:
        """The step called ``name``. Raises KeyError."""
        for step in self.steps:
            if step.name == name:
                return step
        raise KeyError(name)

    def place(self, path: str) -> tuple[int, int]:
        """Line and column, from 1, of what ``path`` ("steps[2].with.bucket") names, or of the nearest part around
        it; (0, 0) if the pipeline was not loaded from text."""
        while path:
            if path in self._places:
                return self._places[path]
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self._places.get("", (0, 0))


def load_pipeline(text: str | bytes) -> Pipeline:
    """Read a pipeline. Raises InvalidInput whose ``problems`` are all that is wrong, in the order of the text.

    Nothing in the text is trusted: a megabyte of anything is read or refused in well under a second.
    """
    from outrider._pipeline_reader import read_pipeline

    return read_pipeline(text)


def graph(pipeline: Pipeline) -> dict[str, tuple[str, ...]]:
    """For each step, in order, the steps that it waits for: its `needs:`, or else the step before it."""
    needs: dict[str, tuple[str, ...]] = {}
    before: tuple[str, ...] = ()
    for step in pipeline.steps:
        needs[step.name] = before if step.needs is None else step.needs
        before = (step.name,)
    return needs


def ancestors(pipeline: Pipeline) -> dict[str, frozenset[str]]:
    """For each step all the steps that are over before it starts; these it may refer to, and on their outcomes
    `success()` and `failure()` look."""
    return all_before(graph(pipeline))


def all_before(needs: Mapping[str, Sequence[str]]) -> dict[str, frozenset[str]]:
    """The transitive closure of ``needs``; steps in a cycle come before themselves."""
    found: dict[str, frozenset[str]] = {}
    for start in needs:
        seen: set[str] = set()
        waiting = list(needs[start])
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            waiting.extend(found[name] - seen if name in found else needs.get(name, ()))
        found[start] = frozenset(seen)
    return found


def writeback_needs(pipeline: Pipeline) -> tuple[frozenset[str], ...]:
    """For each write-back, in order, the steps that have to be over before it is evaluated.

    Those it refers to; all of them if it looks at the run as a whole (`success()`, or `steps` by a computed name).
    """
    from outrider.expressions import STATUS_FUNCTIONS, compile_condition, reference_paths

    everything = frozenset(step.name for step in pipeline.steps)
    needs = []
    for writeback in pipeline.writeback:
        paths = reference_paths(writeback.value)
        whole = False
        if writeback.if_ is not None:
            condition = compile_condition(writeback.if_)
            paths |= condition.scan.references
            whole = not condition.scan.functions.isdisjoint(STATUS_FUNCTIONS)
        steps = [path for path in paths if path.root == "steps"]
        whole = whole or any(len(path) < 2 for path in steps)
        needs.append(everything if whole else frozenset(path[1] for path in steps))
    return tuple(needs)


def env_references(pipeline: Pipeline) -> list[str]:
    """What the steps are allotted, sorted: "set.NAME" for a value that the server keeps, "NAME" for one that stands
    in the pipeline (``plain_envs`` has those)."""
    return sorted({reference for step in pipeline.steps for reference in step.envs.values()})


def plain_envs(pipeline: Pipeline) -> dict[str, str]:
    """The envs whose values stand in the pipeline itself."""
    return {env.name: env.value for env in pipeline.envs if isinstance(env, EnvValue)}


def resolve_args(
    pipeline: Pipeline, given: Mapping[str, Any], attributes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The run's arguments: what the caller gave, else the object's attribute, else the default.

    An optional argument that nothing was given for is absent (`has(args.x)` tells). Raises InvalidInput with every
    problem: unknown names, wrong types, required ones missing.
    """
    problems = _unknown_args(pipeline, given)
    values: dict[str, Any] = {}
    for name, arg in pipeline.args.items():
        attribute = arg.from_ or name
        if name in given:
            value, source = given[name], ""
        elif attributes is not None and attribute in attributes:
            value, source = attributes[attribute], f"taken from the object's attribute {attribute}"
        elif not arg.required:
            if arg.default is not None:
                values[name] = arg.default
            continue
        else:
            problems.append(
                Problem(
                    "is required and was not given",
                    f"args.{name}",
                    hint=f"give it, or set the attribute {attribute} of the run's object",
                )
            )
            continue
        wrong = value_problem(arg.type, value)
        if wrong:
            problems.append(Problem(wrong, f"args.{name}", hint=source))
        else:
            values[name] = float(value) if arg.type == "number" else value
    if not problems:
        size = len(json.dumps(values, ensure_ascii=False).encode("utf-8", "replace"))
        if size > MAX_ARGS_BYTES:
            problems.append(
                Problem(f"the arguments have {size:,} bytes", "args", hint=f"{MAX_ARGS_BYTES:,} are the most")
            )
    if problems:
        raise InvalidInput("; ".join(map(str, problems)), problems, code="bad_arguments")
    frozen: dict[str, Any] = json.loads(json.dumps(values))  # the caller's own lists may change; these must not
    return frozen


def _unknown_args(pipeline: Pipeline, given: Iterable[str]) -> list[Problem]:
    known = f"it takes {listing(pipeline.args)}" if pipeline.args else "it takes none"
    return [
        Problem(
            f"pipeline {pipeline.name} has no such argument",
            f"args.{name}",
            hint=did_you_mean(str(name), pipeline.args, otherwise=known),
        )
        for name in given
        if name not in pipeline.args
    ]


def args_from_text(pipeline: Pipeline, pairs: Mapping[str, str]) -> dict[str, Any]:
    """Arguments as the command line gives them (`--arg slots=16`), each read as the type that the pipeline declares.

    Text stays text; the others are read as JSON. Raises InvalidInput with every problem, unknown names among them.
    """
    problems = _unknown_args(pipeline, pairs)
    values: dict[str, Any] = {}
    for name, text in pairs.items():
        arg = pipeline.args.get(name)
        if arg is None:
            continue
        if arg.type == "string":
            values[name] = text
            continue
        try:
            values[name] = json.loads(text)
        except (ValueError, RecursionError):
            problems.append(Problem(_wrong_type(arg.type, repr(text[:60])), f"args.{name}"))
            continue
        wrong = value_problem(arg.type, values[name])
        if wrong:
            problems.append(Problem(wrong, f"args.{name}"))
    if problems:
        raise InvalidInput("; ".join(map(str, problems)), problems, code="bad_arguments")
    return values


_TYPES: dict[str, tuple[str, str]] = {
    "string": ("a text", "for example 1.4.2"),
    "integer": ("a whole number", "for example 16"),
    "number": ("a number", "for example 0.5"),
    "boolean": ("true or false", ""),
    "list": ("a list", "for example [1, 2]"),
    "object": ("a mapping", 'for example {"a": 1}'),
}


def _wrong_type(kind: str, shown: str) -> str:
    what, example = _TYPES[kind]
    return f"must be {what}, not {shown}" + (f" ({example})" if example else "")


def value_problem(kind: str, value: Any) -> str:
    """What is wrong with ``value`` as an argument of type ``kind``; empty if nothing."""
    right = {
        "string": isinstance(value, str),
        "integer": isinstance(value, int) and not isinstance(value, bool),
        "number": isinstance(value, int | float) and not isinstance(value, bool),
        "boolean": isinstance(value, bool),
        "list": isinstance(value, list),
        "object": isinstance(value, dict),
    }[kind]
    if not right:
        shown = json.dumps(value, ensure_ascii=False, default=str)
        return _wrong_type(kind, shown if len(shown) <= 60 else shown[:60] + "…")
    if isinstance(value, str) and len(value) > MAX_TEXT_ARG:
        return f"has {len(value):,} characters, more than {MAX_TEXT_ARG:,}"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "does not fit 64 bits"
    if isinstance(value, float) and value - value != 0:  # inf and nan, which JSON has not
        return f"must be a finite number, not {value}"
    return ""
