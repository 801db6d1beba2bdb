"""Which step plugins are installed, and which contract each was made for: read without importing any of them."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from outrider.steps import CONTRACT, PROJECT

CONTRACT_ATTRIBUTE = "outrider_contract"
"""The name in a plugin's module that holds the contract versions that it works with, as in ``">=1,<2"``."""

UNDECLARED = ">=1,<2"
"""What is taken of a plugin that declares no range: the contract that there was when ranges came up."""

_REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*(\s*:\s*[^\W\d]\w*(\.[^\W\d]\w*)*)?(\s*\[.*\])?")
_MAX_SOURCE_BYTES = 1024**2


class PluginError(Exception):
    """Why a plugin is not used: ``reason``, and ``fix``, what would be right. Its text is both."""

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(f"{reason}; {fix}" if fix else reason)
        self.reason = reason
        self.fix = fix


@dataclass(frozen=True, slots=True)
class Candidate:
    """An entry point of the group `outrider.steps`."""

    name: str
    value: str  # "package.module", or "package.module:attribute"
    distribution: str
    version: str
    entry_point: importlib.metadata.EntryPoint

    @property
    def module(self) -> str:
        """The dotted name of what is imported."""
        return self.value.partition(":")[0].partition("[")[0].strip()


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A distribution that names the group, but whose metadata is damaged."""

    distribution: str  # as its directory is called: it can't say its name
    error: PluginError


def installed(group: str = PROJECT) -> tuple[list[Candidate], list[Unreadable]]:
    """All step plugins that are installed, and the distributions that seem to have some but can't be read.

    ``group``: of entry points; drivers are found the same way.

    The distributions are gone through one by one: `importlib.metadata.entry_points` raises for all of them when one
    is damaged, as an interrupted pip leaves it.
    """
    found: dict[str, list[Candidate]] = {}
    damaged: list[Unreadable] = []
    for distribution in importlib.metadata.distributions():
        try:
            text = distribution.read_text("entry_points.txt") or ""
        except UnicodeDecodeError as error:
            text = str(bytes(error.object), "utf-8", "replace")
        except OSError:
            continue
        if group not in text:
            continue
        try:
            canonical, candidates = _read(distribution, group)
        except Exception as error:
            damaged.append(_unreadable(distribution, error))
            continue
        # As in an import, the first on sys.path is the one that counts; editable installs are listed twice.
        if candidates and canonical not in found and _is_first(distribution, candidates[0].distribution):
            found[canonical] = candidates
    return [each for candidates in found.values() for each in candidates], damaged


def check_reference(candidate: Candidate) -> None:
    """Raises PluginError if the entry point names nothing that could be imported."""
    if not _REFERENCE.fullmatch(candidate.value):
        raise PluginError(
            f"the entry point {candidate.name!r} is {candidate.value!r}, which names no module",
            f"write it as `{candidate.name} = package.module` in {candidate.distribution}",
        )


def declared_contract(candidate: Candidate) -> str | None:
    """The range of contract versions in the source of the plugin's module; None where it says none in plain words.

    The source is parsed, not run: a module that was made for another contract may fail on import with an error that
    says nothing of the reason.
    """
    for origin in _origins(candidate.module):
        try:
            path = Path(origin)
            if path.suffix != ".py" or path.stat().st_size > _MAX_SOURCE_BYTES:
                return None
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            return None
        for statement in tree.body:
            match statement:
                case (
                    ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(declared)))
                    | ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant(value=str(declared)))
                ) if name == CONTRACT_ATTRIBUTE:
                    return declared
    return None


def check_contract(declared: object, name: str, distribution: str) -> None:
    """Raises PluginError unless this Outrider's contract lies in the range ``declared``; None: see `UNDECLARED`."""
    contract = Version(CONTRACT)
    said = declared if declared is not None else UNDECLARED
    try:
        if not isinstance(said, str) or not said.strip():
            raise InvalidSpecifier
        versions = SpecifierSet(said)
    except InvalidSpecifier as error:
        raise PluginError(
            f"plugin {name!r} declares {CONTRACT_ATTRIBUTE} = {said!r:.80}, which is no range of versions",
            f'write it like {CONTRACT_ATTRIBUTE} = ">={contract.major},<{contract.major + 1}" in its module',
        ) from error
    if versions.contains(contract, prereleases=True):
        return
    wants = f"works with contract versions {said}" if declared is not None else f"declares no contract range ({said})"
    newer = any(each.operator in (">=", ">", "==", "~=") and _number(each.version) > contract for each in versions)
    remedy = (
        f"upgrade Outrider, or install a version of {distribution} that works with {CONTRACT}"
        if newer
        else f"upgrade {distribution} to a version that works with {CONTRACT}"
    )
    raise PluginError(f"plugin {name!r} {wants}, and this Outrider has {CONTRACT}", remedy)


def _number(version: str) -> Version:
    return Version(version.removesuffix(".*"))


def _read(distribution: importlib.metadata.Distribution, group: str) -> tuple[str, list[Candidate]]:
    name, version = distribution.name, distribution.version
    if not name or not version:
        raise ValueError("its metadata has no name or no version")
    entry_points = [each for each in distribution.entry_points if each.group == group]
    return canonicalize_name(name), [Candidate(each.name, each.value, name, version, each) for each in entry_points]


def _unreadable(distribution: importlib.metadata.Distribution, error: Exception) -> Unreadable:
    path = str(getattr(distribution, "_path", "")) or str(distribution.locate_file(""))
    reason = f"the metadata of the distribution in {path} can't be read: {type(error).__name__}: {error}"
    return Unreadable(Path(path).stem, PluginError(reason, "install it anew, or remove that directory"))


def _is_first(distribution: importlib.metadata.Distribution, name: str) -> bool:
    try:
        first = importlib.metadata.distribution(name)
        return first.read_text("entry_points.txt") == distribution.read_text("entry_points.txt")
    except Exception:
        return True  # a damaged one before it counts for nothing


def _origins(module: str) -> Iterator[str]:
    """The file of a module, found as the import system does, but without importing its parents."""
    search: Sequence[str] | None = None
    spec: ModuleSpec | None = None
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        spec = _find(".".join(parts[:depth]), search)
        if spec is None:
            return
        search = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    if spec is not None and spec.origin is not None and spec.has_location:
        yield spec.origin


def _find(name: str, search: Sequence[str] | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, search)
        except Exception:  # noqa: S112 - a finder of a stranger; the import itself says what is wrong
            continue
        if spec is not None:
            return spec
    return None
