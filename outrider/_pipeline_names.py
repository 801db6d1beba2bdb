"""Names within a pipeline against one another: steps, volumes, envs, and the graph that they make."""

from __future__ import annotations

import re
from typing import Any

from outrider._node_reader import NodeReader
from outrider._pipeline_refs import check_references
from outrider._suggest import did_you_mean, listing
from outrider._yaml import short
from outrider.pipeline import ENV_NAME_PATTERN, all_before


def check_names(reader: NodeReader, values: dict[str, Any], *, references: bool) -> None:
    """Names of steps, volumes and envs against one another; whatever could be read takes part."""
    _unique(reader, values)
    volumes = values.get("volumes", {})
    for index, step in enumerate(values.get("steps", ())):
        path = f"steps[{index}]"
        for name in step.get("volumes", {}):
            if name not in volumes:
                known = f"it has {listing(volumes)}" if volumes else f"add `volumes: {{{name}: {{}}}}` to the pipeline"
                reader.at(
                    f"{path}.volumes.{name}",
                    f"the pipeline has no volume {name}",
                    did_you_mean(name, volumes, otherwise=known),
                )
    _envs(reader, values)
    before = _graph(reader, values)
    if references:
        check_references(values, before, reader.at)


def _unique(reader: NodeReader, values: dict[str, Any]) -> None:
    seen: dict[str, int] = {}
    for index, step in enumerate(values.get("steps", ())):
        name = step.get("name")
        if name in seen:
            reader.at(f"steps[{index}].name", f"steps[{seen[name]}] is called {name} too", "each step has its own name")
        elif name:
            seen[name] = index
    envs: set[str] = set()
    for index, env in enumerate(values.get("envs", ())):
        name = f"set {env['set']}" if "set" in env else env.get("name", "")
        if name in envs:
            reader.at(f"envs[{index}]", f"{name} stands here twice")
        envs.add(name)


def _envs(reader: NodeReader, values: dict[str, Any]) -> None:
    """Give each env of a step its full name: "set.NAME", or "NAME" of a value in the pipeline."""
    sets = [env["set"] for env in values.get("envs", ()) if "set" in env]
    plain_names = [env["name"] for env in values.get("envs", ()) if "name" in env]
    for index, step in enumerate(values.get("steps", ())):
        for name, reference in step.get("envs", {}).items():
            path = f"steps[{index}].envs.{name}"
            set_name, dot, env_name = reference.rpartition(".")
            if not re.fullmatch(ENV_NAME_PATTERN, env_name):
                reader.at(path, f"{short(reference)} names no env", "it reads like NAME or set.NAME")
            elif dot and set_name not in sets:
                hint = f"add `- set: {set_name}` to the pipeline's envs" if not sets else f"it has {listing(sets)}"
                reader.at(
                    path,
                    f"the pipeline has no env set {short(set_name)}",
                    did_you_mean(set_name, sets, otherwise=hint),
                )
            elif not dot and env_name not in plain_names:
                if len(sets) == 1:
                    step["envs"][name] = f"{sets[0]}.{env_name}"
                elif sets:
                    reader.at(
                        path, f"{env_name} can be in any of the sets {listing(sets)}", f"write {sets[0]}.{env_name}"
                    )
                else:
                    hint = did_you_mean(env_name, plain_names, otherwise="add it, or its `set`, to the pipeline's envs")
                    reader.at(path, f"the pipeline has no env {env_name}", hint)


def _graph(reader: NodeReader, values: dict[str, Any]) -> dict[str, frozenset[str]]:
    steps = values.get("steps", ())
    names = [step["name"] for step in steps if "name" in step]
    needs: dict[str, tuple[str, ...]] = {}
    before: tuple[str, ...] = ()
    for index, step in enumerate(steps):
        for position, need in enumerate(step.get("needs", ())):
            path = f"steps[{index}].needs[{position}]"
            if need == step.get("name"):
                reader.at(path, "a step can't need itself")
            elif need not in names:
                reader.at(
                    path,
                    f"there is no step {need}",
                    did_you_mean(need, names, otherwise=f"there are {listing(names)}"),
                )
            elif need in step["needs"][:position]:
                reader.at(path, f"{need} stands here twice")
        if "name" in step:
            needs.setdefault(step["name"], tuple(step["needs"]) if "needs" in step else before)
            before = (step["name"],)
    closed = all_before(needs)
    for index, step in enumerate(steps):
        name = step.get("name")
        if name in closed and name in closed[name] and name not in needs[name]:
            cycle = sorted(other for other in closed[name] if name in closed.get(other, ()))
            reader.at(f"steps[{index}].needs", f"the steps {listing(cycle)} wait for one another in a circle")
            break
    return closed
