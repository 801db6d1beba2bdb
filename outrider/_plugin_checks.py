"""What a plugin's module and its step types must be like. Everything here runs a stranger's code: call it guarded."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import BaseModel

from outrider._plugin_bounds import article, said
from outrider._plugin_discovery import CONTRACT_ATTRIBUTE, UNDECLARED, PluginError
from outrider._plugin_hooks import HOOK_PREFIX, hook_names, new_manager
from outrider._suggest import did_you_mean
from outrider.steps import NoOutputs, StepHooks, StepType, _WrongName

MAX_SCHEMA_BYTES = 256 * 1024
"""Of one step type, parameters and outputs together: all of a node travel in one message when it registers."""

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class RegisteredStepType:
    """A step type and where it comes from; has what `outrider.schema.check_steps` asks for."""

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
        if self.step_type.outputs is NoOutputs:
            return {}
        return self.step_type.outputs.model_json_schema(mode="serialization")


def check_binding(plugin: object, name: str) -> None:
    """Raises PluginError unless ``plugin`` is a module (or an instance) whose hooks can all be called."""
    if inspect.isclass(plugin) or inspect.isroutine(plugin):
        kind = "class" if inspect.isclass(plugin) else "function"
        raise PluginError(
            f"the entry point of plugin {name!r} names the {kind} {getattr(plugin, '__name__', '?')}, not a module",
            "let it name the module alone: `package.module`, without `:…`",
        )
    manager, hooks = new_manager(), 0
    for attribute in dir(plugin):
        value = getattr(plugin, attribute, None)
        options = manager.parse_hookimpl_opts(plugin, attribute) if inspect.isroutine(value) else None
        if options is None:
            if attribute.startswith(HOOK_PREFIX) and inspect.isroutine(value):
                raise PluginError(f"{attribute} of plugin {name!r} is never called", "mark it with @hookimpl")
            continue
        known = _check_hook(options.get("specname") or attribute, value, options, name)
        hooks += known
    if not hooks:
        what = "module" if inspect.ismodule(plugin) else type(plugin).__name__
        raise PluginError(
            f"the {what} of plugin {name!r} implements no hook",
            "let the entry point name a module that has outrider_step_types, marked with @hookimpl",
        )
    # pluggy has the last word: what it would refuse must not be refused later, when others are bound already.
    manager.register(plugin, name=name)
    manager.check_pending()


def _check_hook(hook: str, function: Any, options: Any, name: str) -> bool:
    if hook not in hook_names():
        if options.get("optionalhook"):
            return False
        raise PluginError(
            f"plugin {name!r} implements {hook}, and there is no such hook",
            did_you_mean(
                hook, hook_names(), otherwise=f"there are {', '.join(sorted(hook_names()))}", prefix=HOOK_PREFIX
            ),
        )
    if options.get("wrapper") or options.get("hookwrapper"):
        raise PluginError(
            f"{hook} of plugin {name!r} is a wrapper, and plugins can't wrap one another's hooks",
            "mark it with @hookimpl alone",
        )
    if (
        inspect.iscoroutinefunction(function)
        or inspect.isgeneratorfunction(function)
        or inspect.isasyncgenfunction(function)
    ):
        raise PluginError(
            f"{hook} of plugin {name!r} is no plain function, and its result would never be awaited",
            "write it with `def` and `return`",
        )
    takes = list(inspect.signature(getattr(StepHooks, hook)).parameters)[1:]
    wrong = [
        each.name
        for each in inspect.signature(function).parameters.values()
        if each.name not in takes and (each.default is each.empty or each.kind is each.KEYWORD_ONLY)
    ]
    if wrong:
        raise PluginError(
            f"{hook} of plugin {name!r} takes {', '.join(wrong)}, which the hook does not give",
            f"it may take {', '.join(takes)}" if takes else "it takes no argument",
        )
    return True


def collect(plugin: object, name: str, distribution: str, version: str) -> list[RegisteredStepType]:
    """The step types of a plugin that `check_binding` has passed, checked. Raises PluginError, and what it raises."""
    manager = new_manager()
    manager.register(plugin, name=name)
    collected: dict[str, RegisteredStepType] = {}
    for impl in manager.hook.outrider_step_types.get_hookimpls():
        try:
            answer = impl.function()
        except (GeneratorExit, PluginError):
            raise
        except BaseException as error:
            raise PluginError(
                f"outrider_step_types of plugin {name!r} failed: {said(error)}",
                fix_of(error, f"install another version of {distribution}"),
            ) from error
        if not isinstance(answer, list | tuple):
            raise PluginError(
                f"outrider_step_types of plugin {name!r} gives {article(answer)}", "let it return a list of StepType"
            )
        for step_type in answer:
            registered = _checked(step_type, name, distribution, version)
            if registered.name in collected:
                raise PluginError(
                    f"outrider_step_types of plugin {name!r} gives {registered.name} twice", "let it give each once"
                )
            collected[registered.name] = registered
    return list(collected.values())


def fix_of(error: BaseException, otherwise: str) -> str:
    """What would be right where a plugin raises ``error``: another version of it has its step types' names, too."""
    return "its author has to rename that step type" if isinstance(error, _WrongName) else otherwise


def notes_on(plugin: object, types: Sequence[RegisteredStepType]) -> list[str]:
    """What its author should know of a plugin that works."""
    notes = []
    if getattr(plugin, CONTRACT_ATTRIBUTE, None) is None:
        notes.append(
            f'it declares no contract range, {UNDECLARED} is taken; write {CONTRACT_ATTRIBUTE} = "{UNDECLARED}" '
            f"in its module"
        )
    notes += [
        f"a misspelt parameter of {each.name} is not noticed; let {each.step_type.params.__name__} forbid extra fields"
        for each in types
        if each.params_schema.get("additionalProperties") is not False
    ]
    return notes


def _checked(step_type: object, plugin: str, distribution: str, version: str) -> RegisteredStepType:
    if not isinstance(step_type, StepType):
        raise PluginError(
            f"outrider_step_types of plugin {plugin!r} gives {article(step_type)} among its step types",
            "let it return StepType objects, of outrider.steps",
        )
    name = step_type.name
    for label, model in (("params", step_type.params), ("outputs", step_type.outputs)):
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            raise PluginError(f"{label} of step type {name} is {article(model)}", "let it be a pydantic model's class")
    _check_resolve(step_type)
    envs = step_type.envs
    if isinstance(envs, str) or not all(isinstance(each, str) and _ENV_NAME.fullmatch(each) for each in envs):
        raise PluginError(
            f"envs of step type {name} must be a list of names of environment variables", 'write envs=["NAME"]'
        )
    public = step_type.public_envs
    if isinstance(public, str) or not all(isinstance(each, str) and each in envs for each in public):
        raise PluginError(f"public_envs of step type {name} must be a list of names among its envs", "list them there")
    if not isinstance(step_type.description, str) or not isinstance(step_type.idempotent, bool):
        raise PluginError(f"step type {name} has a wrong description or idempotent", "give a string, and a bool")
    registered = RegisteredStepType(step_type, plugin, distribution, version)
    _check_schemas(registered)
    return registered


def _check_resolve(step_type: StepType) -> None:
    what = f"resolve of step type {step_type.name}"
    if not callable(step_type.resolve):
        raise PluginError(f"{what} is {article(step_type.resolve)}", "let it be a function of (params, context)")
    if inspect.iscoroutinefunction(step_type.resolve):
        raise PluginError(f"{what} is async, and it may not wait for anything", "write it with `def`: it is pure")
    try:
        inspect.signature(step_type.resolve).bind(None, None)
    except TypeError as error:
        raise PluginError(f"{what} can't be called: {error}", "let it take two arguments, (params, context)") from error
    except ValueError:  # a callable of C that has no signature; the first call tells
        return


def _check_schemas(registered: RegisteredStepType) -> None:
    name = registered.name
    try:
        params, outputs = registered.params_schema, registered.outputs_schema
    except Exception as error:
        raise PluginError(
            f"the models of step type {name} have no JSON Schema: {said(error)}",
            "use types that pydantic can describe, or WithJsonSchema",
        ) from error
    for label, schema in (("params", params), ("outputs", outputs)):
        if schema and schema.get("type") != "object":
            raise PluginError(f"{label} of step type {name} are no object", "let the model have fields, not be a root")
    try:
        parts = (params, outputs, registered.description)
        length = sum(
            len(json.dumps(each, ensure_ascii=False, allow_nan=False).encode()) for each in parts
        )  # as it travels
    except (TypeError, ValueError, RecursionError) as error:
        raise PluginError(
            f"what step type {name} says of itself can't be sent: {said(error)}", "use plain JSON values and Unicode"
        ) from error
    if length > MAX_SCHEMA_BYTES:
        raise PluginError(
            f"the schemas of step type {name} have {length} bytes, and at most {MAX_SCHEMA_BYTES} are sent",
            "leave long descriptions and lists of values to its documentation",
        )
