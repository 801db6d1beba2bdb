"""The hooks of `outrider.steps.StepHooks`, called one plugin at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pluggy

from outrider._plugin_bounds import LIMIT_S, article, guarded
from outrider._plugin_discovery import PluginError
from outrider.errors import ErrorClass
from outrider.steps import PROJECT, StepContext, StepHooks, StepOutcome, StepPlan

HOOK_PREFIX = "outrider_"

MAX_FACTS_BYTES = 64 * 1024
"""Of one plugin: the facts of all travel in one message when the node registers."""


def new_manager() -> pluggy.PluginManager:
    """A plugin manager that knows the hooks."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(StepHooks)
    return manager


def hook_names() -> tuple[str, ...]:
    """The names of all hooks."""
    return tuple(name for name in vars(StepHooks) if name.startswith(HOOK_PREFIX))


@dataclass(slots=True)
class HookFailure:
    """How often a hook of a plugin has failed since the agent started, and how it did so last."""

    plugin: str
    hook: str
    count: int = 0
    error: str = ""


@dataclass
class PluginHooks:
    """The hooks around steps, of the plugins that are bound. One that fails is counted, and stops no other.

    ``failures``: those that did not work, by plugin and hook. ``limit_s``: for each call, in seconds.
    """

    limit_s: float = LIMIT_S
    failures: dict[tuple[str, str], HookFailure] = field(default_factory=dict)
    _manager: pluggy.PluginManager = field(default_factory=new_manager)

    def before_step(self, step_type: str, context: StepContext, plan: StepPlan) -> None:
        """Tell every plugin; what one raises is counted."""
        self._call_each("outrider_before_step", step_type=step_type, context=context, plan=plan)

    def after_step(self, step_type: str, context: StepContext, outcome: StepOutcome) -> None:
        """Tell every plugin; what one raises is counted."""
        self._call_each("outrider_after_step", step_type=step_type, context=context, outcome=outcome)

    def classify(self, step_type: str, exit_code: int, message: str) -> ErrorClass | None:
        """The first plugin's answer to whether the failure may be retried; ``None``: none has one."""
        answers = self._call_each(
            "outrider_classify_failure", step_type=step_type, exit_code=exit_code, message=message
        )
        for plugin, answer in answers:
            if isinstance(answer, ErrorClass):
                return answer
            self._failed(plugin, "outrider_classify_failure", f"it gives {article(answer)}, not an ErrorClass")
        return None

    def listens(self, hook: str) -> bool:
        """Whether any plugin implements ``hook``: most have none of those around a step, which need no thread then."""
        return bool(getattr(self._manager.hook, hook).get_hookimpls())

    def node_facts(self) -> dict[str, Any]:
        """Facts of all plugins, joined. The first to state a fact is believed; what is not JSON is left out."""
        facts: dict[str, Any] = {}
        for plugin, answer in self._call_each("outrider_node_facts"):
            try:
                if not isinstance(answer, Mapping) or not all(isinstance(name, str) for name in answer):
                    raise TypeError(f"{type(answer).__name__} is no mapping of names to values")
                text = json.dumps(dict(answer), ensure_ascii=False, allow_nan=False)
                if len(text.encode()) > MAX_FACTS_BYTES:
                    raise ValueError(f"they are longer than {MAX_FACTS_BYTES} bytes")
            except (TypeError, ValueError, RecursionError) as error:
                self._failed(plugin, "outrider_node_facts", f"its facts are no JSON object: {error}")
                continue
            taken = sorted(facts.keys() & answer.keys())
            if taken:
                self._failed(plugin, "outrider_node_facts", f"another plugin says {', '.join(taken)} already")
            facts = json.loads(text) | facts
        return facts

    def _call_each(self, hook: str, **given: Any) -> list[tuple[str, Any]]:
        """Call the implementations one by one: in a pluggy call one that raises would stop the others."""
        answers = []
        for impl in reversed(getattr(self._manager.hook, hook).get_hookimpls()):
            arguments = [given[name] for name in impl.argnames]
            what = f"{hook} of plugin {impl.plugin_name!r} failed"
            try:
                answer = guarded(partial(impl.function, *arguments), what, self.limit_s)
            except PluginError as error:
                self._failed(impl.plugin_name, hook, str(error))
                continue
            if answer is not None:
                answers.append((impl.plugin_name, answer))
        return answers

    def _failed(self, plugin: str, hook: str, error: str) -> None:
        failure = self.failures.setdefault((plugin, hook), HookFailure(plugin, hook))
        failure.count += 1
        failure.error = error
