"""The step plugins of this environment, loaded in a process of its own: one that ends it takes nobody along.

A plugin can do on import what nothing in Python guards against: end the process, crash it, hold its interpreter. So
whoever only wants to know how the plugins are (`outrider plugin list`, `doctor`) asks a child, and so does an agent
that did not survive loading them the last time.
"""

from __future__ import annotations

import contextlib
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

    Where the child does not survive it, the plugin that it was loading is left out, and the others get another child.
    """
    order = _Order(None if enabled is None else tuple(enabled), tuple(disabled), limit_s, facts)
    fatal: dict[str, str] = {}
    together: list[PluginReport] = []
    while True:
        found = _ask(dataclasses.replace(order, disabled=(*disabled, *fatal)))
        if isinstance(found, Probe):
            break
        if found.loading and found.loading not in fatal:
            fatal[found.loading] = found.how
            continue
        # It was none of them that was being loaded: nobody can be named.
        what = "are asked for facts of this node" if order.facts else "are loaded"
        error = f"one of the step plugins {found.how} when they {what}"
        together.append(PluginReport("", "", "", ok=False, state="error", error=error))
        if not order.facts:
            return Probe(together, {}, [], [], tuple(fatal))
        order = dataclasses.replace(order, facts=False)
    reports = [_blamed(each, fatal[each.name]) if each.name in fatal else each for each in found.plugins]
    return dataclasses.replace(found, plugins=reports + together, fatal=tuple(fatal))


def _blamed(report: PluginReport, how: str) -> PluginReport:
    fix = f"reinstall or upgrade {report.distribution}, or disable it: disabled_plugins: [{report.name}]"
    error = f"plugin {report.name!r} {how} when it is loaded; {fix}"
    return dataclasses.replace(report, state="error", error=error, fix=fix, notes=())


@dataclass(frozen=True, slots=True)
class _Ended:
    """A child that gave no answer: how it ended, in words, and the plugin that it was loading then."""

    how: str
    loading: str


def _ask(order: _Order) -> Probe | _Ended:
    limit_s = _START_S + order.limit_s * (2 * len(installed()[0]) + 1)
    child = subprocess.Popen(
        [sys.executable, "-m", __name__],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # it finds what is found here
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    how, out = "", b""
    try:
        out, _ = child.communicate(json.dumps(dataclasses.asdict(order)).encode(), limit_s)
    except subprocess.TimeoutExpired as expired:
        how, out = "hangs", expired.output or b""
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    *loading, answer = [b"", *out.split(b"\n")]
    if not how and answer:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return _read(json.loads(answer))
    if child.returncode < 0:
        how = how or f"ends the process with {signal.Signals(-child.returncode).name}"
    return _Ended(how or f"ends the process with exit code {child.returncode}", loading[-1].decode())


def _read(answer: dict[str, Any]) -> Probe:
    reports = [
        PluginReport(**{**each, "step_types": tuple(each["step_types"]), "notes": tuple(each["notes"])})
        for each in answer["plugins"]
    ]
    return Probe(reports, answer["facts"], answer["failures"], answer["step_types"])


def main() -> None:
    """The child: an order on stdin; on stdout the name of each plugin before it is loaded, an empty line, the answer.

    What a plugin prints goes to stderr.
    """
    answer_to = os.dup(1)
    os.dup2(2, 1)

    def tell(name: str) -> None:
        os.write(answer_to, f"{name}\n".encode())

    order = _Order(**json.load(sys.stdin))
    host = StepPlugins.load(order.enabled, order.disabled, limit_s=order.limit_s, tell=tell)
    tell("")
    facts = host.node_facts() if order.facts else {}
    answer = {
        "plugins": [dataclasses.asdict(each) for each in host.plugins],
        "facts": facts,
        "failures": [dataclasses.asdict(each) for each in host.failures.values()],
        "step_types": [_described(each) for each in host.step_types.values()],
    }
    with os.fdopen(answer_to, "w", encoding="utf-8") as file:
        json.dump(answer, file)
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
