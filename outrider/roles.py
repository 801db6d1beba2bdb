"""Roles of nodes: which plugins a role has, the lock that an environment is made from, and how a node stands to it.

A role is a YAML file and a lock beside it, both kept on the server once they were set::

    name: game
    description: Hosts game servers.
    agent: ">=0.1,<0.2"                    # versions of outrider itself (PEP 440)
    plugins:
      outrider-step-s3: ">=0.1,<0.2"       # a distribution, and which of its versions

The lock is a requirements file in which every package has one version and the hashes of its files, as
`outrider node role lock` writes it: the role says what is allowed, the lock says what it is exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from outrider._model_errors import problems_of
from outrider._yaml import compose, plain
from outrider.errors import InvalidInput, Problem

AGENT = "outrider"
"""The distribution that every role has: the agent itself."""
MAX_LOCK_BYTES = 2 * 1024 * 1024
_HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")

ROLE_NAME = r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$"
RoleName = Annotated[str, StringConstraints(pattern=ROLE_NAME)]


class Role(BaseModel):
    """What a role has, without its lock. ``plugins``: distribution (canonical name) to a range of versions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: RoleName
    description: Annotated[str, Field(max_length=500)] = ""
    agent: str = ""
    plugins: Annotated[dict[str, str], Field(max_length=200)] = Field(default_factory=dict)

    @field_validator("agent")
    @classmethod
    def _agent(cls, value: str) -> str:
        return _range(value)

    @field_validator("plugins")
    @classmethod
    def _plugins(cls, value: dict[str, str]) -> dict[str, str]:
        plugins: dict[str, str] = {}
        for distribution, versions in value.items():
            if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?", distribution):
                raise ValueError(f"{distribution!r} is not the name of a distribution")
            name = canonicalize_name(distribution)
            if name in plugins:
                raise ValueError(f"{name} is named twice")
            if name == AGENT:
                raise ValueError(f"{AGENT} itself is no plugin: its versions are said by `agent`")
            plugins[name] = _range(versions)
        return plugins

    def requirements(self) -> list[str]:
        """What is to be resolved into the lock."""
        return [f"{AGENT}[agent,cli]{self.agent}", *(f"{name}{versions}" for name, versions in self.plugins.items())]


@dataclass(frozen=True, slots=True)
class Installed:
    """A distribution as it is on a node, by one of its plugins.

    ``error``: why the plugin can't be used; ``disabled``: why it is not even imported; both empty: it is well.
    """

    distribution: str
    version: str
    error: str = ""
    disabled: str = ""

    @classmethod
    def reported(
        cls, distribution: str, version: str, *, ok: bool, state: str, error: str, notes: Sequence[str]
    ) -> Installed:
        """From what a node, or `outrider plugin doctor`, says of a plugin. ``state``: empty from older agents."""
        if state == "disabled":
            return cls(distribution, version, disabled=notes[0] if notes else "by the agent's settings")
        return cls(distribution, version, "" if ok else error or "it does not say why")


@dataclass(frozen=True, slots=True)
class Stand:
    """How one distribution on a node stands to the role; fields as in the message PluginState."""

    distribution: str
    wanted: str
    locked: str
    actual: str
    drift: str
    named: bool
    words: str = ""


def load_role(text: str | bytes) -> Role:
    """A role from YAML. Raises InvalidInput with every problem and its place."""
    root, problems = compose(text)
    if problems:
        raise InvalidInput(f"the role can't be read: {problems[0]}", problems)
    document = None if root is None else plain(root)
    if not isinstance(document, dict):
        raise InvalidInput("a role is a mapping with name and plugins", hint="see deploy/roles")
    return make_role(document)


def make_role(document: Mapping[str, object]) -> Role:
    """A role from its fields. Raises InvalidInput with every problem."""
    try:
        return Role.model_validate(document)
    except ValidationError as error:
        found = list(problems_of(error, Role))
        raise InvalidInput(f"the role is not valid: {'; '.join(map(str, found))}", found) from error


def read_lock(text: str) -> dict[str, tuple[str, ...]]:
    """The packages of a lock with their versions: more than one only where markers choose between them.

    Raises InvalidInput for anything but packages with one version and hashes: a lock says what is installed, and
    never where it comes from.
    """
    if len(text) > MAX_LOCK_BYTES:
        raise InvalidInput(f"the lock is longer than {MAX_LOCK_BYTES} bytes", code="bad_lock")
    found: dict[str, tuple[str, ...]] = {}
    for number, line in _logical_lines(text):
        words, *options = re.split(r"\s(?=--)", line)
        try:
            requirement = Requirement(words.strip())
            (pin,) = requirement.specifier
            Version(pin.version)
        except (InvalidRequirement, InvalidVersion, ValueError):
            pin = None
        if pin is None or pin.operator != "==" or requirement.url:
            raise _bad_lock(number, "is not a package with one version", "name==1.2.3 --hash=sha256:…")
        if not options or not all(_HASH.fullmatch(option.strip()) for option in options):
            raise _bad_lock(number, "has no hash, or something else than hashes", "--hash=sha256:… alone")
        name = canonicalize_name(requirement.name)
        found[name] = (*found.get(name, ()), pin.version)
    return found


def check_lock(role: Role, lock: Mapping[str, Sequence[str]]) -> None:
    """Raise InvalidInput unless the lock has what the role wants, in versions that it allows."""
    problems = []
    for name, versions in {AGENT: role.agent, **role.plugins}.items():
        where = "agent" if name == AGENT else f"plugins.{name}"
        if name not in lock:
            problems.append(Problem(f"the lock has no {name}", where))
        problems += [
            Problem(f"the lock has {name} {version}, and the role wants {versions}", where)
            for version in lock.get(name, ())
            if not fits(version, versions)
        ]
    if problems:
        raise InvalidInput(
            f"the lock does not fit role {role.name}: {'; '.join(map(str, problems))}",
            problems,
            code="bad_lock",
            hint="make it anew: outrider node role lock FILE",
        )


def fits(version: str, versions: str) -> bool:
    """Whether ``version`` lies in the range; a version that can't be read lies in none."""
    try:
        return SpecifierSet(versions).contains(Version(version), prereleases=True)
    except (InvalidVersion, InvalidSpecifier):
        return False


def compare(role: Role, lock: Mapping[str, Sequence[str]], there: Iterable[Installed]) -> list[Stand]:
    """How each distribution stands: those of the role in its order, the agent first, then those it does not name.

    ``drift`` is "missing", "version" (outside the range), "lock" (inside it, but not the locked one), "broken",
    "disabled", "extra", or empty.
    """
    present = by_distribution(there)
    stands = []
    for name, versions in {AGENT: role.agent, **role.plugins}.items():
        stands.append(_stand(name, versions, lock.get(name, ()), present.pop(name, None)))
    for name, each in sorted(present.items()):
        drift, words = "extra", f"{name} {each.version} is there, and the role does not have it"
        if not each.version:  # a damaged distribution, or a name in the settings that nothing has
            drift, words = "broken", f"{name} can't be used: {each.error}"
        stands.append(Stand(name, "", "", each.version, drift, named=False, words=words))
    return stands


def by_distribution(there: Iterable[Installed]) -> dict[str, Installed]:
    """What is there, by canonical name. Of a distribution with several plugins, what is wrong with any counts."""
    found: dict[str, Installed] = {}
    for each in there:
        if not each.distribution or (each.disabled and not each.version):  # the latter is only named in the settings
            continue
        name = canonicalize_name(each.distribution)
        former = found.get(name)
        if former is not None:
            each = replace(each, error=former.error or each.error, disabled=former.disabled or each.disabled)
        found[name] = each
    return found


def _stand(name: str, versions: str, locked: Sequence[str], there: Installed | None) -> Stand:
    lock = " or ".join(locked)
    wanted = f" (wanted: {versions})" if versions else ""
    if there is None:
        return Stand(name, versions, lock, "", "missing", named=True, words=f"{name} is missing{wanted}")
    drift, words = "", ""
    if not fits(there.version, versions):
        drift, words = "version", f"{name} is {there.version}{wanted}"
    elif there.error:
        drift, words = "broken", f"{name} {there.version} can't be used: {there.error}"
    elif there.disabled:
        drift, words = "disabled", f"{name} {there.version} is there and disabled ({there.disabled})"
    elif locked and there.version not in locked:
        drift, words = "lock", f"{name} is {there.version}, and the lock has {lock}"
    return Stand(name, versions, lock, there.version, drift, named=True, words=words)


def _range(value: str) -> str:
    """A range of versions in its plain form. Raises ValueError."""
    try:
        SpecifierSet(value)
    except InvalidSpecifier:
        raise ValueError(f"{value!r} is no range of versions; it reads like '>=0.1,<0.2'") from None
    return value.replace(" ", "")


def _logical_lines(text: str) -> Iterable[tuple[int, str]]:
    """Lines joined where they end in a backslash, without comments, with the number of their first."""
    joined, first = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        bare = re.sub(r"(^|\s)#.*$", "", line).rstrip()
        first = first or number
        if bare.endswith("\\"):
            joined += bare[:-1] + " "
            continue
        joined += bare
        if joined.strip():
            yield first, joined.strip()
        joined, first = "", 0
    if joined.strip():
        yield first, joined.strip()


def _bad_lock(line: int, what: str, right: str) -> InvalidInput:
    return InvalidInput(
        f"line {line} of the lock {what}",
        [Problem(what, line=line, hint=right)],
        code="bad_lock",
        hint=f"it reads like: {right}; `outrider node role lock` writes it",
    )
