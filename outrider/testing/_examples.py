"""What an author gives the conformance kit: uses of the step type, good ones and bad ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent_core.trial import StepResult

Values = Mapping[str, Any] | Callable[[Any], Mapping[str, Any]]
"""A mapping, or a function that makes it from the value of the class's fixture ``environment``."""

_NAME = re.compile(r"[a-z][a-z0-9_-]*")


@dataclass(frozen=True)
class Attempted:
    """A step that was carried out. ``volumes`` has the directory behind each volume, by its name."""

    result: StepResult
    volumes: Mapping[str, Path]
    took_s: float
    secret_arguments: bool = False  # whether a secret stood in the arguments of a process meanwhile

    @property
    def outputs(self) -> Mapping[str, Any]:
        """What it gave back."""
        return self.result.outputs

    @property
    def log(self) -> str:
        """What it printed on stdout and stderr."""
        return (self.result.stdout + self.result.stderr).decode(errors="replace")


@dataclass(frozen=True)
class Example:
    """A use of the step type that works.

    ``volumes``: name to ``"/path"`` or ``"/path:rw"``, each an empty directory unless ``files`` puts something into it:
    ``"volume/path"`` to its content (text, bytes, or a number of zero bytes); a path that ends in ``/`` is a directory.
    ``secrets`` are envs whose values must turn up nowhere. ``before``: steps to be carried out first, as pairs of step
    type and parameters, on the same volumes and object. ``outputs`` is what the step must at least give back; those
    named in ``varying``, and files as ``"volume/path"``, may differ when it is done again. ``check`` looks at what it
    has done, and raises AssertionError. ``object``: ``"kind/name"`` of the run's object.
    """

    name: str
    params: Values
    volumes: Mapping[str, str] = field(default_factory=dict)
    files: Values = field(default_factory=dict)
    envs: Values = field(default_factory=dict)
    secrets: Values = field(default_factory=dict)
    outputs: Values = field(default_factory=dict)
    varying: tuple[str, ...] = ()
    before: Sequence[tuple[str, Values]] = ()
    check: Callable[[Attempted], None] | None = None
    object: str = ""
    timeout_s: float = 120.0

    def mount(self, volume: str) -> tuple[str, bool]:
        """Where a volume is mounted, and whether for writing."""
        path, _, mode = self.volumes[volume].partition(":")
        return path, mode == "rw"


@dataclass(frozen=True)
class Failing(Example):
    """A use whose parameters are right and that can't be done: the program has to say why.

    ``code`` is the cause that it gives, ``says`` a part of its sentence; ``temporary``: it may work when tried again.
    """

    code: str = ""
    says: str = ""
    temporary: bool = False


@dataclass(frozen=True)
class Wrong:
    """Parameters that must be refused before anything runs; ``says``: a part of the sentence, such as ``with.url``."""

    name: str
    params: Values
    says: str = ""
    volumes: Mapping[str, str] = field(default_factory=dict)


def values(given: Values, environment: Any) -> dict[str, Any]:
    """The mapping, made from the ``environment`` where it is a function."""
    return dict(given(environment) if callable(given) else given)


def slug(name: str) -> str:
    """The name as it stands in a test's id."""
    return "-".join(name.split())
