"""The pipeline: its model, and the strict loader for its YAML."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]
EnvName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Arg(Model):
    """A typed argument. Without a default it is required. ``from_`` names the object's attribute."""

    type: Literal["string", "integer", "number", "boolean", "list", "object"] = "string"
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
    max: int = 0
    first_wait_s: float = 0.1


class StepResources(Model):
    memory_bytes: int | None = None
    cpus: float | None = None
    pids: int | None = None


class StepVolume(Model):
    """A mount inside the step: `/build:rw` in the YAML."""

    path: str
    writable: bool = False


class Step(Model):
    name: Name
    uses: str
    with_: dict[str, Any] = Field(default_factory=dict, alias="with")
    volumes: dict[Name, StepVolume] = Field(default_factory=dict)
    envs: dict[EnvName, str] = Field(default_factory=dict)  # name in the step -> "set.NAME" or "NAME"
    needs: tuple[Name, ...] | None = None  # None: the step before it
    if_: str | None = Field(default=None, alias="if")
    timeout_s: float | None = None
    retry: StepRetry = StepRetry()
    resources: StepResources = StepResources()
    idempotent: bool | None = None  # None: as the step type says


class Writeback(Model):
    attribute: str
    value: Any
    if_: str | None = Field(default=None, alias="if")


class Pipeline(Model):
    name: Name
    args: dict[str, Arg] = Field(default_factory=dict)
    envs: tuple[EnvSetRef | EnvValue, ...] = ()
    volumes: dict[Name, Volume] = Field(default_factory=dict)
    steps: tuple[Step, ...] = Field(min_length=1)
    writeback: tuple[Writeback, ...] = ()
