"""The plugin host: step plugins chosen with stevedore, bound with pluggy, and never trusted to behave.

A plugin that does not import, has a bad signature, a misspelt hook, or a step type that another one has is
reported by name with the reason and the fix; everything else works. What is disabled is not even imported.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import pluggy
import structlog
from pydantic import BaseModel
from stevedore.named import NamedExtensionManager

from outrider.errors import ErrorClass
from outrider.steps import PROJECT, NoOutputs, StepContext, StepHooks, StepOutcome, StepPlan, StepType

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PluginReport:
    """What became of one plugin: ``ok``, or ``error`` with the reason and the fix."""

    name: str
    distribution: str
    version: str
    ok: bool = True
    error: str = ""
    step_types: tuple[str, ...] = ()


@dataclass(frozen=True)
class RegisteredStepType:
    """A step type and where it comes from; has what `outrider.pipeline.check_steps` asks for."""

    step_type: StepType
    plugin: str
    distribution: str
    version: str

    @property
    def name(self) -> str:
        return self.step_type.name

    @property
    def envs(self) -> tuple[str, ...]:
        return tuple(self.step_type.envs)

    @property
    def idempotent(self) -> bool:
        return self.step_type.idempotent

    @property
    def description(self) -> str:
        return self.step_type.description

    @cached_property
    def params_schema(self) -> dict[str, Any]:
        """JSON Schema of the parameters, with the x-outrider-* keywords."""
        return self.step_type.params.model_json_schema()

    @cached_property
    def outputs_schema(self) -> dict[str, Any]:
        """JSON Schema of the outputs; empty: it has none."""
        return {} if self.step_type.outputs is NoOutputs else self.step_type.outputs.model_json_schema()


class PluginError(Exception):
    """Why a plugin is not used, with the fix."""


@dataclass
class PluginHost:
    """The plugins of this machine. Build it with `PluginHost.load`."""

    plugins: list[PluginReport] = field(default_factory=list)
    step_types: dict[str, RegisteredStepType] = field(default_factory=dict)
    _manager: pluggy.PluginManager = field(default_factory=lambda: _manager())

    @classmethod
    def load(cls, enabled: Sequence[str] | None = None, disabled: Sequence[str] = ()) -> PluginHost:
        """Find, import and bind the plugins. ``enabled``: their names, ``None`` for all; ``disabled`` wins.

        Never raises for what a plugin does: see `plugins` for what became of each.
        """
        host = cls()
        found: dict[str, list[importlib.metadata.EntryPoint]] = {}
        for entry_point in importlib.metadata.entry_points(group=PROJECT):
            found.setdefault(entry_point.name, []).append(entry_point)
        for name in sorted(found):
            if name in disabled or (enabled is not None and name not in enabled):
                continue
            # Editable installs can be listed twice; one distribution is one plugin.
            candidates = {_distribution(each)[0]: each for each in found[name]}
            first, *others = sorted(candidates)
            host._bind(name, candidates[first])
            for other in others:
                distribution, version = _distribution(candidates[other])
                reason = (
                    f"the entry point name {name!r} is also that of {first}, which is used; "
                    f"uninstall one of the two distributions"
                )
                host.plugins.append(PluginReport(name, distribution, version, ok=False, error=reason))
        for name in enabled or ():
            if name not in found and name not in disabled:
                reason = f"no installed distribution has a step plugin named {name!r}; install it, or drop the name"
                host.plugins.append(PluginReport(name, "", "", ok=False, error=reason))
        return host

    def register(self, plugin: object, *, name: str, distribution: str, version: str) -> PluginReport:
        """Bind an imported plugin; the report says what became of it, and is kept."""
        try:
            types = self._register(plugin, name, distribution, version)
        except PluginError as error:
            report = PluginReport(name, distribution, version, ok=False, error=str(error))
        else:
            report = PluginReport(name, distribution, version, step_types=tuple(each.name for each in types))
            self.step_types.update((each.name, each) for each in types)
        self.plugins.append(report)
        return report

    def before_step(self, step_type: str, context: StepContext, plan: StepPlan) -> None:
        """Tell every plugin; what one raises is logged."""
        self._call_each("outrider_before_step", step_type=step_type, context=context, plan=plan)

    def after_step(self, step_type: str, context: StepContext, outcome: StepOutcome) -> None:
        """Tell every plugin; what one raises is logged."""
        self._call_each("outrider_after_step", step_type=step_type, context=context, outcome=outcome)

    def classify(self, step_type: str, exit_code: int, message: str) -> ErrorClass | None:
        """The first plugin's answer to whether the failure may be retried; ``None``: none has one."""
        answers = self._call_each(
            "outrider_classify_failure", step_type=step_type, exit_code=exit_code, message=message
        )
        return next((each for each in answers if isinstance(each, ErrorClass)), None)

    def listens(self, hook: str) -> bool:
        """Whether any plugin implements ``hook``: most have none of those around a step, which need no thread then."""
        return bool(getattr(self._manager.hook, hook).get_hookimpls())

    def node_facts(self) -> dict[str, Any]:
        """Facts of all plugins, joined; those that are not JSON are left out and logged."""
        facts: dict[str, Any] = {}
        for answer in self._call_each("outrider_node_facts"):
            try:
                json.dumps(answer)
                facts.update(answer)
            except (TypeError, ValueError) as error:
                log.warning("node facts of a plugin are not a JSON object", error=str(error))
        return facts

    def _bind(self, name: str, entry_point: importlib.metadata.EntryPoint) -> None:
        distribution, version = _distribution(entry_point)
        try:
            plugin = _import(name, entry_point)
        except PluginError as error:
            self.plugins.append(PluginReport(name, distribution, version, ok=False, error=str(error)))
            return
        self.register(plugin, name=name, distribution=distribution, version=version)

    def _register(self, plugin: object, name: str, distribution: str, version: str) -> list[RegisteredStepType]:
        try:
            guarded(lambda: self._manager.register(plugin, name=name), f"plugin {name!r} can't be bound")
            # One by one: a misspelt hook of this plugin must not be laid at another's door.
            guarded(self._manager.check_pending, f"plugin {name!r} implements a hook that does not exist")
            return self._collect(name, distribution, version)
        except PluginError:
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)
            raise

    def _collect(self, name: str, distribution: str, version: str) -> list[RegisteredStepType]:
        collected: dict[str, RegisteredStepType] = {}
        for impl in self._manager.hook.outrider_step_types.get_hookimpls():
            if impl.plugin_name != name:
                continue
            answer = guarded(impl.function, f"outrider_step_types of plugin {name!r} failed")
            if not isinstance(answer, list | tuple):
                raise PluginError(f"outrider_step_types of plugin {name!r} must return a list of StepType")
            for step_type in answer:
                registered = _checked(step_type, name, distribution, version)
                other = self.step_types.get(registered.name) or collected.get(registered.name)
                if other is not None:
                    raise PluginError(
                        f"step type {registered.name!r} of {distribution} is also that of {other.distribution}, which "
                        f"was loaded first; disable one of the two plugins ({name!r}, {other.plugin!r}) by name"
                    )
                collected[registered.name] = registered
        return list(collected.values())

    def _call_each(self, hook: str, **given: Any) -> list[Any]:
        """Call the implementations one by one: in a pluggy call one that raises would stop the others."""
        answers = []
        for impl in reversed(getattr(self._manager.hook, hook).get_hookimpls()):
            if impl.wrapper or impl.hookwrapper:
                continue
            try:
                arguments = [given[name] for name in impl.argnames]
                answer = guarded(partial(impl.function, *arguments), f"{hook} of plugin {impl.plugin_name!r} failed")
            except PluginError as error:
                log.warning("a plugin's hook failed", plugin=impl.plugin_name, hook=hook, error=str(error))
                continue
            if answer is not None:
                answers.append(answer)
        return answers


def _manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(StepHooks)
    return manager


def guarded(call: Callable[[], Any], what: str) -> Any:
    """Call a stranger's code. Also SystemExit and AssertionError are only its own failure, not the host's."""
    try:
        return call()
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise PluginError(f"{what}: {type(error).__name__}: {text}") from error


def _import(name: str, entry_point: importlib.metadata.EntryPoint) -> object:
    problems: list[BaseException] = []

    def note(_manager: object, failed: importlib.metadata.EntryPoint, error: BaseException) -> None:
        if failed.value == entry_point.value:
            problems.append(error)

    what = f"plugin {name!r} ({entry_point.value}) can't be imported"
    fix = f"reinstall or upgrade its distribution, or disable it: disabled_plugins: [{name}]"
    try:
        manager = guarded(
            lambda: NamedExtensionManager(
                PROJECT,
                names=[name],
                on_load_failure_callback=note,
                on_missing_entrypoints_callback=lambda _names: None,
            ),
            what,
        )
    except PluginError as error:
        raise PluginError(f"{error}; {fix}") from error
    for extension in manager.extensions:
        if extension.entry_point.value == entry_point.value:
            plugin: object = extension.plugin
            return plugin
    try:
        if problems:
            raise PluginError(f"{what}: {type(problems[0]).__name__}: {problems[0]}")
        # stevedore remembers entry points, on disk too, and may not know of one that was installed just now.
        return guarded(entry_point.load, what)
    except PluginError as error:
        raise PluginError(f"{error}; {fix}") from error


def _distribution(entry_point: importlib.metadata.EntryPoint) -> tuple[str, str]:
    if entry_point.dist is None:
        return entry_point.value.partition(":")[0], ""
    return entry_point.dist.name, entry_point.dist.version


def _checked(step_type: object, plugin: str, distribution: str, version: str) -> RegisteredStepType:
    if not isinstance(step_type, StepType):
        raise PluginError(f"outrider_step_types of plugin {plugin!r} returned {step_type!r}, which is no StepType")
    for label, model in (("params", step_type.params), ("outputs", step_type.outputs)):
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            raise PluginError(f"{label} of step type {step_type.name!r} must be a pydantic model, not {model!r}")
    if not callable(step_type.resolve):
        raise PluginError(f"resolve of step type {step_type.name!r} must be a function of (params, context)")
    registered = RegisteredStepType(step_type, plugin, distribution, version)
    what = f"the models of step type {step_type.name!r} have no JSON Schema"
    guarded(lambda: (registered.params_schema, registered.outputs_schema), what)
    return registered
