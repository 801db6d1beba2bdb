"""What a pipeline's expressions refer to must exist, and be over by the time they are evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

from outrider._suggest import did_you_mean, listing
from outrider.errors import InvalidInput
from outrider.expressions import Reference, compile_condition, reference_paths

_STEP_MEMBERS = ("outcome", "outputs")
OBJECT_MEMBERS = ("attributes", "kind", "name", "version")
RUN_MEMBERS = ("id", "pipeline", "sequence")


def check_references(
    values: Mapping[str, Any], before: Mapping[str, frozenset[str]], add: Callable[[str, str, str], None]
) -> None:
    """Call ``add(path, message, hint)`` for each reference to an argument, volume or step that isn't there, or not yet.

    ``values`` is the pipeline as plain values, whatever of it could be read; ``before`` has the steps that are over
    before each step starts.
    """
    for index, step in enumerate(values.get("steps", ())):
        path, name = f"steps[{index}]", step.get("name", "")
        found = list(_expressions(f"{path}.with", step.get("with")))
        found += _condition(f"{path}.if", step.get("if"))
        for inner, paths in found:
            _check(values, inner, paths, add, name, before.get(name, frozenset()))
    for index, writeback in enumerate(values.get("writeback", ())):
        path = f"writeback[{index}]"
        found = list(_expressions(f"{path}.value", writeback.get("value")))
        found += _condition(f"{path}.if", writeback.get("if"))
        for inner, paths in found:
            _check(values, inner, paths, add)


def _condition(path: str, text: str | None) -> list[tuple[str, Set[Reference]]]:
    if text is None:
        return []
    try:
        return [(path, compile_condition(text).scan.references)]
    except InvalidInput:
        return []  # noted where it stands


def _expressions(path: str, value: Any) -> Iterable[tuple[str, Set[Reference]]]:
    if isinstance(value, str):
        if "${{" in value:
            yield path, reference_paths(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _expressions(f"{path}.{key}", item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _expressions(f"{path}[{index}]", item)


def _check(
    values: Mapping[str, Any],
    path: str,
    references: Iterable[Reference],
    add: Callable[[str, str, str], None],
    step: str = "",
    before: frozenset[str] = frozenset(),
) -> None:
    for reference in sorted(references):
        message, hint = _problem(values, reference, step, before)
        if message:
            add(path, message, hint)


def _problem(values: Mapping[str, Any], reference: Reference, step: str, before: frozenset[str]) -> tuple[str, str]:
    if len(reference) < 2:
        return "", ""
    if reference.root == "steps":
        return _step_problem(values, reference, step, before)
    root, second, third = reference.root, reference[1], reference[2] if len(reference) > 2 else None
    args, volumes = values.get("args", {}), values.get("volumes", {})
    if root == "args" and second not in args:
        known = f"it has {listing(args)}" if args else f"add `args: {{{second}: {{type: string}}}}`"
        return f"the pipeline has no argument {second}", did_you_mean(second, args, otherwise=known)
    if root == "volumes" and second not in volumes:
        return f"the pipeline has no volume {second}", _dashed("volumes", second, volumes)
    if root == "volumes" and third not in (None, "host_path"):
        return f"a volume has no {third}", "it has host_path"
    if root == "object" and second not in OBJECT_MEMBERS:
        return f"an object has no {second}", f"its attributes are read as object.attributes.{second}"
    if root == "run" and second not in RUN_MEMBERS:
        return f"a run has no {second}", did_you_mean(second, RUN_MEMBERS, otherwise=f"it has {listing(RUN_MEMBERS)}")
    return "", ""


def _step_problem(
    values: Mapping[str, Any], reference: Reference, step: str, before: frozenset[str]
) -> tuple[str, str]:
    second, third = reference[1], reference[2] if len(reference) > 2 else None
    names = [other["name"] for other in values.get("steps", ()) if "name" in other]
    if second not in names:
        return f"there is no step {second}", _dashed("steps", second, names)
    if third is not None and third not in _STEP_MEMBERS:
        return f"a step has no {third}", did_you_mean(third, _STEP_MEMBERS, otherwise="it has outputs and outcome")
    if step and second == step:
        return f"step {step} refers to itself", "its own outputs are known only after it"
    if step and second not in before:
        hint = f"add {second} to its `needs`, or put it before this step"
        return f"step {second} is not sure to be over when {step} starts", hint
    return "", ""


def _dashed(root: str, name: str, known: Iterable[str]) -> str:
    """`steps.a-b` is a subtraction in CEL; who writes it means a step whose name has a dash."""
    names = list(known)
    for other in names:
        if other.startswith(f"{name}-"):
            return f'a name with a dash is written {root}["{other}"]'
    return did_you_mean(name, names, otherwise=f"there are {listing(names)}" if names else "there are none")
