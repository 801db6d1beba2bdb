"""The step SDK: everything that a step plugin imports.

A plugin is a distribution with an entry point in the group ``outrider.steps`` that names a module. The
module implements hooks::

    from pydantic import BaseModel
    from outrider.steps import ReadPath, StepContext, StepPlan, StepType, WritePath, hookimpl

    class CopyParams(BaseModel, extra="forbid"):
        source: ReadPath
        target: WritePath

    def resolve_copy(params: CopyParams, context: StepContext) -> StepPlan:
        return StepPlan(image="example/copy:1", args=("cp", params.source, params.target))

    outrider_contract = ">=1,<2"

    @hookimpl
    def outrider_step_types() -> list[StepType]:
        return [StepType(name="example.copy", params=CopyParams, resolve=resolve_copy, idempotent=True)]

``resolve`` is pure: no I/O, no clock, no randomness. It is called once per step; what it returns is
journalled, and retries and adoption use the journalled plan.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pluggy
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, WithJsonSchema, field_validator

from outrider.errors import ErrorClass

__all__ = [
    "CONTRACT",
    "CONTRACT_VERSION",
    "EXIT_DONE",
    "EXIT_TEMPORARY",
    "PROJECT",
    "STEP_TYPE_NAME",
    "ErrorClass",
    "NoOutputs",
    "ObjectContext",
    "ReadPath",
    "Resources",
    "StepContext",
    "StepHooks",
    "StepOutcome",
    "StepPlan",
    "StepType",
    "VolumeMount",
    "VolumeMounts",
    "WritePath",
    "hookimpl",
    "hookspec",
]

PROJECT = "outrider.steps"
"""The pluggy project name and the entry-point group."""

CONTRACT_VERSION = 1
"""The version of the step-image contract, given to the program as OUTRIDER_CONTRACT."""

CONTRACT = "1.0"
"""The version of the whole contract: hooks, plans, parameters, image. Its first number is `CONTRACT_VERSION` and grows
when something that worked no longer does; the second grows with what is added. A plugin's module says which versions
it works with: ``outrider_contract = ">=1,<2"``."""

STEP_TYPE_NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+")

EXIT_DONE = 0
EXIT_TEMPORARY = 75
"""sysexits.h's EX_TEMPFAIL: the step may work when tried again. Any other code but 0 is permanent."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

# What a parameter means to the core is said in its JSON Schema, so that the server can check it
# without having the plugin: "x-outrider-path": "read" | "write", "x-outrider-volumes": true. And
# "x-outrider-message" is a sentence for a person, said instead of a pattern, `not`, `oneOf` or `anyOf` of the
# same schema that does not fit; "{value}" in it is replaced by what was given.
# "x-outrider-placeholders": true says that the program replaces `$(…)` in this text, and `$$(` by `$(`: a `$(` that an
# expression brings in is doubled, so that data is never replaced.
_PATH = r"^/"

ReadPath = Annotated[
    str,
    StringConstraints(pattern=_PATH),
    WithJsonSchema({"type": "string", "pattern": _PATH, "x-outrider-path": "read"}),
]
"""An absolute path inside the step, below one of its volumes, that the step reads."""

WritePath = Annotated[
    str,
    StringConstraints(pattern=_PATH),
    WithJsonSchema({"type": "string", "pattern": _PATH, "x-outrider-path": "write"}),
]
"""An absolute path inside the step, below one of its volumes that is allotted ``rw``, that the step writes."""

VolumeMounts = Annotated[
    dict[str, str],
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "string"}, "x-outrider-volumes": True}),
]
"""Volumes handed on to a managed container: volume name to ``"/path"`` or ``"/path:rw"``; never more than
the step itself was allotted."""


class Resources(BaseModel):
    """Limits of a container. ``None`` takes the node's default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory_bytes: Annotated[int, Field(ge=6 * 1024**2)] | None = None
    cpus: Annotated[float, Field(gt=0)] | None = None
    pids: Annotated[int, Field(ge=1)] | None = None


def _for_the_kernel(text: str) -> str:
    """What ends up in a program's arguments or environment can't hold these, and would only fail there."""
    if "\0" in text:
        raise ValueError("it has a NUL character in it, which no argument or environment variable can hold")
    text.encode()  # a lone surrogate: UnicodeEncodeError is a ValueError
    return text


_Text = Annotated[str, AfterValidator(_for_the_kernel)]


class StepPlan(BaseModel):
    """What a step comes to: a container image, arguments, and what it asks of the node.

    ``env`` is for what the plugin itself wants to say to its program, never for secrets: a step's allotted
    envs are added by the core. ``network`` names a network class that the node's policy has ("none" is
    always there). ``control="containers"`` asks for the control socket. ``user`` is needed only by images
    that can't run as the uid:gid allotted to them. ``inputs`` is written to /outrider/inputs.json; ``None``
    means the validated parameters.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: Annotated[_Text, StringConstraints(min_length=1, max_length=512)]
    args: tuple[_Text, ...] = ()
    entrypoint: tuple[_Text, ...] | None = None
    env: Mapping[str, _Text] = Field(default_factory=dict)
    network: str = "none"
    resources: Resources = Resources()
    control: Literal["containers"] | None = None
    workdir: _Text | None = None
    user: _Text | None = None
    inputs: Mapping[str, Any] | None = None

    @field_validator("env")
    @classmethod
    def _names(cls, env: Mapping[str, str]) -> Mapping[str, str]:
        for name in env:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is not the name of an environment variable")
            if name.startswith("OUTRIDER_"):
                raise ValueError(f"{name!r}: names that begin with OUTRIDER_ are the core's")
        return env

    @field_validator("inputs")
    @classmethod
    def _json(cls, inputs: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        try:
            json.dumps(inputs, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"inputs are to be a JSON object: {error}") from error
        return inputs


@dataclass(frozen=True, slots=True)
class VolumeMount:
    """A volume as a step sees it."""

    name: str
    path: str
    writable: bool


@dataclass(frozen=True, slots=True)
class ObjectContext:
    """The run's object: attributes frozen when the run was accepted."""

    kind: str
    name: str
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepContext:
    """What ``resolve`` may know beside its parameters. Holds no value of any env."""

    run_id: str
    step: str
    volumes: tuple[VolumeMount, ...] = ()
    envs: tuple[str, ...] = ()  # names, as the step sees them
    object: ObjectContext | None = None
    node: Mapping[str, Any] = field(default_factory=dict)  # facts: os, arch, cpus, memory_bytes…


class NoOutputs(BaseModel):
    """The outputs model of a step type that has none."""

    model_config = ConfigDict(extra="forbid")


class _WrongName(ValueError):
    """A step type has a name that can't be one."""


@dataclass(frozen=True, slots=True)
class StepType:
    """A step type: what ``uses:`` names.

    ``envs`` are the environment variables that the program understands; the pipeline decides which of
    them it gets. ``public_envs`` are those of them whose values may stand in this step's outputs, also
    where they come from an env set; all other values from there are secrets. ``idempotent`` says that
    doing it twice does no harm: only then is a step whose outcome is uncertain tried again. ``network``
    of the plan and the rest of its wishes are checked against the node's policy.
    """

    name: str
    params: type[BaseModel]
    resolve: Callable[[Any, StepContext], StepPlan]
    outputs: type[BaseModel] = NoOutputs
    envs: Sequence[str] = ()
    idempotent: bool = False
    description: str = ""
    public_envs: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not STEP_TYPE_NAME.fullmatch(self.name):
            raise _WrongName(f"{self.name!r} is not the name of a step type; it reads like 's3.download'")


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """How an attempt ended, as ``outrider_after_step`` gets it."""

    exit_code: int | None
    succeeded: bool
    error_class: ErrorClass | None = None
    message: str = ""
    outputs: Mapping[str, Any] = field(default_factory=dict)


class StepHooks:
    """The hooks that a plugin's module may implement, each marked with ``@hookimpl``."""

    @hookspec
    def outrider_step_types(self) -> list[StepType]:
        """The step types of this plugin. Called once, when it is loaded.

        Example::

            @hookimpl
            def outrider_step_types():
                return [StepType(name="example.copy", params=CopyParams, resolve=resolve_copy)]
        """
        raise AssertionError("a specification is never called")

    @hookspec
    def outrider_before_step(self, step_type: str, context: StepContext, plan: StepPlan) -> None:
        """Called before each attempt's container is made, for the steps of all plugins. It can't change the plan.

        What it raises is logged and counted, and stops nothing.

        Example::

            @hookimpl
            def outrider_before_step(step_type, context, plan):
                log.info("%s of %s starts from %s", context.step, context.run_id, plan.image)
        """

    @hookspec
    def outrider_after_step(self, step_type: str, context: StepContext, outcome: StepOutcome) -> None:
        """Called after each attempt has ended, for the steps of all plugins.

        What it raises is logged and counted, and stops nothing.

        Example::

            @hookimpl
            def outrider_after_step(step_type, context, outcome):
                counter.labels(step_type, outcome.succeeded).inc()
        """

    @hookspec(firstresult=True)
    def outrider_classify_failure(self, step_type: str, exit_code: int, message: str) -> ErrorClass | None:
        """Says whether a failed attempt may work when tried again; ``None`` leaves it to the exit code.

        Example::

            @hookimpl
            def outrider_classify_failure(step_type, exit_code, message):
                if step_type == "example.copy" and exit_code == 28:
                    return ErrorClass.TEMPORARY
        """
        raise AssertionError("a specification is never called")

    @hookspec
    def outrider_node_facts(self) -> dict[str, Any]:
        """Facts about this node, joined to those that the agent finds itself; JSON values, at most 64 KiB.

        Called once, when the agent starts. What the agent finds itself wins.

        Example::

            @hookimpl
            def outrider_node_facts():
                return {"gpu": has_gpu()}
        """
        raise AssertionError("a specification is never called")
