"""The step plugins of an environment: chosen by name with stevedore, bound with pluggy, never trusted to behave.

The agent, the command line and the conformance kit all load plugins here, so that what one of them says of a plugin
is true for the others. A plugin that does not import, is made for another contract, has a bad signature, a misspelt
hook, or a step type that another one has, is reported by name with the reason and the fix; everything else works.
What is disabled is not even imported.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from outrider._plugin_bounds import LIMIT_S, Raised, bounded, guarded, said
from outrider._plugin_checks import RegisteredStepType, check_binding, collect, fix_of, notes_on
from outrider._plugin_discovery import (
    CONTRACT_ATTRIBUTE,
    Candidate,
    PluginError,
    check_contract,
    check_reference,
    declared_contract,
    installed,
)
from outrider._plugin_hooks import HookFailure, PluginHooks
from outrider._suggest import did_you_mean
from outrider.steps import PROJECT

__all__ = ["LIMIT_S", "HookFailure", "PluginError", "PluginReport", "RegisteredStepType", "StepPlugins", "guarded"]


@dataclass(frozen=True, slots=True)
class PluginReport:
    """What became of one plugin.

    ``state``: "ok", "error" (``error`` has the reason with the fix, ``fix`` the latter alone) or "disabled" (it was
    not imported). ``notes``: what should be known of it all the same. ``contract``: the range of contract versions
    that it declares, empty if none. ``import_s``: seconds until it was ready.
    """

    name: str
    distribution: str
    version: str
    ok: bool = True
    error: str = ""
    step_types: tuple[str, ...] = ()
    state: Literal["ok", "error", "disabled"] = "ok"
    fix: str = ""
    notes: tuple[str, ...] = ()
    contract: str = ""
    module: str = ""
    import_s: float = 0.0


@dataclass
class _Examined:
    """A plugin that can be bound; nothing of it has been bound yet."""

    plugin: object
    step_types: list[RegisteredStepType]
    contract: str
    notes: list[str]


@dataclass
class StepPlugins(PluginHooks):
    """The step plugins of this environment. Build it with `load`, or with `register` one by one.

    ``plugins``: a report for each, by name. ``step_types``: what can be used, by name of the step type.
    """

    plugins: list[PluginReport] = field(default_factory=list)
    step_types: dict[str, RegisteredStepType] = field(default_factory=dict)
    slow_s: float = 2.0  # an import that takes longer is noted, or a fifteenth of what it may take

    @classmethod
    def load(
        cls,
        enabled: Sequence[str] | None = None,
        disabled: Sequence[str] = (),
        *,
        limit_s: float = LIMIT_S,
        tell: Callable[[str], object] = lambda _name: None,
    ) -> Self:
        """Find, import and bind the plugins. ``enabled``: their names, ``None`` for all; ``disabled`` wins.

        ``tell`` is called with the name of each before it is imported.
        Never raises for what a plugin does: see `plugins` for what became of each.
        """
        importlib.import_module("stevedore.named")  # that it is not installed is no plugin's failure
        host = cls(limit_s=limit_s)
        candidates, damaged = installed()
        found: dict[str, list[Candidate]] = {}
        for candidate in candidates:
            found.setdefault(candidate.name, []).append(candidate)
        for name in sorted(found):
            first, *others = sorted(found[name], key=lambda each: each.distribution)
            left_out = _left_out(name, enabled, disabled)
            for candidate in (first, *others) if left_out else ():
                host._note(candidate, state="disabled", notes=(left_out,))
            if left_out:
                continue
            tell(name)
            host._load(first)
            for other in others:
                host._note(other, error=_same_name(other, first))
        for unreadable in damaged:
            host.plugins.append(_failed("", unreadable.distribution, "", unreadable.error))
        for name in [*(enabled or ()), *disabled]:
            if name not in found:
                host.plugins.append(_missing(name, found, wanted=name in (enabled or ()) and name not in disabled))
        return host

    def register(self, plugin: object, *, name: str, distribution: str, version: str) -> PluginReport:
        """Check and bind a plugin that is imported already: a module. Its report is kept, too."""
        report = self._bind(name, distribution, version, lambda: plugin)
        self.plugins.append(report)
        return report

    def _load(self, candidate: Candidate) -> None:
        declared = ""

        def import_() -> object:
            nonlocal declared
            check_reference(candidate)
            declared = declared_contract(candidate) or ""
            if declared:
                check_contract(declared, candidate.name, candidate.distribution)
            return _import(candidate)

        report = self._bind(candidate.name, candidate.distribution, candidate.version, import_, module=candidate.module)
        if not report.contract and declared:
            report = dataclasses.replace(report, contract=declared)
        self.plugins.append(report)

    def _bind(
        self, name: str, distribution: str, version: str, get: Callable[[], object], *, module: str = ""
    ) -> PluginReport:
        """Everything that a plugin may do wrong is done in a thread of its own first, and bound only afterwards."""
        began = time.monotonic()
        doing = ["its import"]

        def examine() -> _Examined:
            plugin = get()
            doing[0] = "the check of its hooks"
            contract = getattr(plugin, CONTRACT_ATTRIBUTE, None)
            check_contract(contract, name, distribution)
            check_binding(plugin, name)
            doing[0] = "outrider_step_types"
            types = collect(plugin, name, distribution, version)
            return _Examined(plugin, types, contract or "", notes_on(plugin, types))

        try:
            try:
                examined = bounded(examine, self.limit_s)
            except TimeoutError as error:
                raise PluginError(
                    f"plugin {name!r} is too slow: {doing[0]} had not ended after {self.limit_s:g} s",
                    f"let it do its work in the step's program, or disable it: disabled_plugins: [{name}]",
                ) from error
            except Raised as raised:
                if isinstance(raised.error, PluginError):
                    raise raised.error from raised.error.__cause__
                raise PluginError(
                    f"plugin {name!r} can't be used: {said(raised.error)}",
                    f"install another version of {distribution}",
                ) from raised.error
            self._adopt(name, examined)
        except PluginError as error:
            return _failed(name, distribution, version, error, module=module)
        took = time.monotonic() - began
        if took > min(self.slow_s, self.limit_s / 15):
            examined.notes.append(f"it took {took:.1f} s to import; let it import what is heavy where it is used")
        return PluginReport(
            name,
            distribution,
            version,
            step_types=tuple(each.name for each in examined.step_types),
            notes=tuple(examined.notes),
            contract=examined.contract,
            module=module,
            import_s=round(took, 3),
        )

    def _adopt(self, name: str, examined: _Examined) -> None:
        for each in examined.step_types:
            other = self.step_types.get(each.name)
            if other is not None:
                raise PluginError(
                    f"step type {each.name!r} of {each.distribution} is also that of {other.distribution}, which "
                    f"was loaded first",
                    f"disable one of the two plugins by name: disabled_plugins: [{name}], or [{other.plugin}]",
                )
        guarded(lambda: self._manager.register(examined.plugin, name=name), f"plugin {name!r} can't be bound")
        self.step_types.update((each.name, each) for each in examined.step_types)

    def _note(self, candidate: Candidate, *, error: PluginError | None = None, **given: Any) -> None:
        about = (candidate.name, candidate.distribution, candidate.version)
        if error is not None:
            self.plugins.append(_failed(*about, error, module=candidate.module))
        else:
            self.plugins.append(PluginReport(*about, ok=False, module=candidate.module, **given))


def _import(candidate: Candidate) -> object:
    from stevedore.named import NamedExtensionManager

    class Chosen(NamedExtensionManager[object]):
        """Of the entry points that were found; stevedore's own list is remembered on disk, and may be an old one."""

        def list_entry_points(self) -> list[importlib.metadata.EntryPoint]:
            return [candidate.entry_point]

    def failed(_manager: object, _entry_point: object, error: BaseException) -> None:
        raise error

    what = f"plugin {candidate.name!r} ({candidate.value}) can't be imported"
    fix = f"reinstall or upgrade {candidate.distribution}, or disable it: disabled_plugins: [{candidate.name}]"
    try:
        (extension,) = Chosen(PROJECT, names=[candidate.name], on_load_failure_callback=failed).extensions
    except BaseException as error:
        raise PluginError(f"{what}: {said(error)}", fix_of(error, fix)) from error
    plugin: object = extension.plugin
    return plugin


def _left_out(name: str, enabled: Sequence[str] | None, disabled: Sequence[str]) -> str:
    if name in disabled:
        return "it is named in `disabled_plugins`"
    return "" if enabled is None or name in enabled else "`plugins` does not name it"


def _same_name(other: Candidate, first: Candidate) -> PluginError:
    return PluginError(
        f"the entry point name {other.name!r} is also that of {first.distribution}, which is used",
        "uninstall one of the two distributions",
    )


def _missing(name: str, found: Iterable[str], *, wanted: bool) -> PluginReport:
    near = did_you_mean(name, found)
    if not wanted:
        note = f"`disabled_plugins` names it, and it is not installed{'; ' + near if near else ''}"
        return PluginReport(name, "", "", ok=False, state="disabled", notes=(note,))
    reason = f"no installed distribution has a step plugin named {name!r}"
    return _failed(name, "", "", PluginError(reason, near or "install it, or drop the name from `plugins`"))


def _failed(name: str, distribution: str, version: str, error: PluginError, *, module: str = "") -> PluginReport:
    return PluginReport(
        name, distribution, version, ok=False, state="error", error=str(error), fix=error.fix, module=module
    )
