"""The step plugins of this environment, loaded in a process of its own: one that ends it takes nobody along.

A plugin can do on import what nothing in Python guards against: end the process, crash it, hold its interpreter. So
whoever only wants to know how the plugins are (`outrider plugin list`, `doctor`) asks a child, and so does an agent
that did not survive loading them the last time.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from outrider._plugin_discovery import installed
from outrider.plugin_host import LIMIT_S, PluginReport, RegisteredStepType, StepPlugins

_START_S = 60.0
"""What a child may need to start and end, on a machine that has much else to do."""


@dataclass(frozen=True, slots=True)
class Probe:
    """How the plugins are. ``facts``: what their outrider_node_facts gave; ``failures``: hooks that did not work;
    ``fatal``: the names of plugins that no process survives."""

    plugins: list[PluginReport]
    facts: dict[str, Any]
    failures: list[dict[str, Any]]
    step_types: list[dict[str, Any]]  # as outrider.schema.StepTypeSpec has them
    fatal: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Order:
    enabled: tuple[str, ...] | None
    disabled: tuple[str, ...]
    limit_s: float
    facts: bool


def probe(
    enabled: Sequence[str] | None = None,
    disabled: Sequence[str] = (),
    *,
    limit_s: float = LIMIT_S,
    facts: bool = False,
) -> Probe:
    """Load the plugins in a child process, as `StepPlugins.load` does, and ask them for ``facts`` if wanted.

    Where the child does not survive it, each plugin gets one of its own, so that the one to blame can be named.
    """
    order = _Order(None if enabled is None else tuple(enabled), tuple(disabled), limit_s, facts)
    known = sorted({each.name for each in installed()[0]})
    chosen = [name for name in known if name not in disabled and (enabled is None or name in enabled)]
    found = _ask(order, plugins=len(chosen))
    if isinstance(found, Probe):
        return found
    fatal = {}
    for name in chosen:
        alone = _ask(dataclasses.replace(order, enabled=(name,)), plugins=1)
        if isinstance(alone, str):
            fatal[name] = alone
    found = _ask(dataclasses.replace(order, disabled=(*disabled, *fatal)), plugins=len(chosen))
    if isinstance(found, str):
        # Each alone is fine, and all together are not: nobody can be named.
        reports = [PluginReport("", "", "", ok=False, state="error", error=f"the step plugins together {found}")]
        return Probe(reports, {}, [], [])
    reports = [_blamed(each, fatal[each.name]) if each.name in fatal else each for each in found.plugins]
    return dataclasses.replace(found, plugins=reports, fatal=tuple(fatal))


def _blamed(report: PluginReport, how: str) -> PluginReport:
    fix = f"reinstall or upgrade {report.distribution}, or disable it: disabled_plugins: [{report.name}]"
    error = f"plugin {report.name!r} {how} when it is loaded; {fix}"
    return dataclasses.replace(report, state="error", error=error, fix=fix, notes=())


def _ask(order: _Order, *, plugins: int) -> Probe | str:
    """What the child found; or how it ended, in words."""
    limit_s = _START_S + order.limit_s * (2 * plugins + 1)
    child = subprocess.Popen(
        [sys.executable, "-m", __name__],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # it finds what is found here
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, _ = child.communicate(json.dumps(dataclasses.asdict(order)).encode(), limit_s)
    except subprocess.TimeoutExpired:
        return "hangs"
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    if child.returncode < 0:
        return f"ends the process with {signal.Signals(-child.returncode).name}"
    try:
        answer = json.loads(out)
        reports = [
            PluginReport(**{**each, "step_types": tuple(each["step_types"]), "notes": tuple(each["notes"])})
            for each in answer["plugins"]
        ]
    except (ValueError, KeyError, TypeError):
        return f"ends the process with exit code {child.returncode}"
    return Probe(reports, answer["facts"], answer["failures"], answer["step_types"])


def main() -> None:
    """The child: an order on stdin, the answer on stdout. What a plugin prints goes to stderr."""
    answer_to = os.dup(1)
    os.dup2(2, 1)
    order = _Order(**json.load(sys.stdin))
    host = StepPlugins.load(order.enabled, order.disabled, limit_s=order.limit_s)
    facts = host.node_facts() if order.facts else {}
    failures = [dataclasses.asdict(each) for each in host.failures.values()]
    reports = [dataclasses.asdict(each) for each in host.plugins]
    step_types = [_described(each) for each in host.step_types.values()]
    with os.fdopen(answer_to, "w", encoding="utf-8") as file:
        json.dump({"plugins": reports, "facts": facts, "failures": failures, "step_types": step_types}, file)
    os._exit(0)  # threads that a plugin has left behind are not waited for


def _described(registered: RegisteredStepType) -> dict[str, Any]:
    return {
        "name": registered.name,
        "params_schema": registered.params_schema,
        "envs": registered.envs,
        "distribution": registered.distribution,
        "idempotent": registered.idempotent,
        "outputs_schema": registered.outputs_schema,
        "plugin": registered.plugin,
        "version": registered.version,
        "description": registered.description,
    }


if __name__ == "__main__":
    main()
