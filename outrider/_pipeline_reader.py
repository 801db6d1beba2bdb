"""From YAML nodes to a ``Pipeline``, noting every problem on the way instead of stopping at the first."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from collections.abc import Mapping as MappingType
from typing import Any

from outrider import pipeline as model
from outrider._pipeline_refs import check_references
from outrider._suggest import did_you_mean, listing
from outrider._units import DURATION_HINT, SIZE_HINT, parse_duration, parse_size
from outrider._yaml import MAX_PROBLEMS, Mapping, Node, Scalar, Sequence, compose, kind, plain, short
from outrider.errors import InvalidInput, Problem

MAX_STEPS = 200
MAX_RETRIES = 100
MAX_EXPRESSION_TEXT = 32 * 1024
"""Characters of all expressions: compiling a megabyte of them would take ten seconds."""
_RESERVED = ("/outrider", "/proc", "/sys", "/dev", "/tmp")  # noqa: S108 - named to keep volumes off them
Reader = Callable[[str, Node], Any]

NAME_HINT = "a name has lower-case letters, digits, - and _, begins with a letter, and is 63 characters long at most"


def read_pipeline(text: str | bytes) -> model.Pipeline:
    """See ``outrider.pipeline.load_pipeline``."""
    root, problems = compose(text)
    reader = _Reader(problems)
    try:
        result = reader.pipeline(root)
    except _EnoughError:
        result = None
        reader.problems.append(Problem(f"there are more than {MAX_PROBLEMS} problems; these are some of them"))
    if reader.problems or result is None:
        found = sorted(reader.problems, key=lambda problem: (problem.line or sys.maxsize, problem.column))
        said = f"is not valid: {found[0]}" if len(found) == 1 else f"has {len(found)} problems, the first: {found[0]}"
        raise InvalidInput(f"the pipeline {said}", found, code="invalid_pipeline")
    return result


class _EnoughError(Exception):
    """MAX_PROBLEMS have been found."""


class _Reader:
    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        self.places: dict[str, tuple[int, int]] = {}
        self.expression_text = 0

    # --- parts that many have --------------------------------------------------------------------------------

    def problem(self, node: Node, path: str, message: str, hint: str = "") -> None:
        self._note(Problem(message, path, node.line, node.column, hint))

    def _note(self, problem: Problem) -> None:
        if len(self.problems) >= MAX_PROBLEMS:
            raise _EnoughError
        self.problems.append(problem)

    def fields(
        self, path: str, node: Node, known: MappingType[str, Reader], required: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """Read a mapping whose keys are known. What could not be read is left out (and noted)."""
        self.places[path] = (node.line, node.column)
        if not isinstance(node, Mapping):
            self.problem(node, path, f"must be a mapping, not {kind(node)}", f"it has {listing(known, 20)}")
            return {}
        values: dict[str, Any] = {}
        for key, (at, value) in node.items.items():
            inner = f"{path}.{key}" if path else key
            if key not in known:
                where = f"; {path or 'a pipeline'} has {listing(known, 20)}"
                self.problem(at, inner, "unknown key", did_you_mean(key, known, otherwise=where[2:]))
                continue
            self.places[inner] = (value.line, value.column)
            result = known[key](inner, value)
            if result is not None:
                values[key] = result
        for key in required:
            if key not in node.items:
                self.problem(node, f"{path}.{key}" if path else key, "is missing", "it is required")
        return values

    def mapping(self, path: str, node: Node, pattern: str, hint: str, read: Reader) -> dict[str, Any]:
        """Read a mapping whose keys are names."""
        if not isinstance(node, Mapping):
            if not (isinstance(node, Scalar) and node.value is None):
                self.problem(node, path, f"must be a mapping, not {kind(node)}", hint)
            return {}
        values: dict[str, Any] = {}
        for key, (at, value) in node.items.items():
            inner = f"{path}.{key}"
            self.places[inner] = (value.line, value.column)
            if not re.fullmatch(pattern, key):
                self.problem(at, inner, f"{short(key)} is not a name", hint)
            result = read(inner, value)
            if result is not None:
                values[key] = result
        return values

    def sequence(self, path: str, node: Node, read: Reader, hint: str = "") -> list[Any]:
        """Read a list; items that could not be read are left out (and noted)."""
        if not isinstance(node, Sequence):
            self.problem(node, path, f"must be a list, not {kind(node)}", hint)
            return []
        values = []
        for index, item in enumerate(node.items):
            inner = f"{path}[{index}]"
            self.places[inner] = (item.line, item.column)
            result = read(inner, item)
            if result is not None:
                values.append(result)
        return values

    def text(self, path: str, node: Node) -> str | None:
        """A text without expressions."""
        if not isinstance(node, Scalar) or not isinstance(node.value, str):
            quote = "quote it to make it text" if isinstance(node, Scalar) and node.value is not None else ""
            self.problem(node, path, f"must be a text, not {kind(node)}", quote)
            return None
        if "${{" in node.value:
            self.problem(
                node, path, "an expression can't stand here", "expressions stand in `with`, `if` and `writeback`"
            )
            return None
        return node.value

    def named(self, pattern: str, hint: str) -> Reader:
        def read(path: str, node: Node) -> str | None:
            text = self.text(path, node)
            if text is not None and not re.fullmatch(pattern, text):
                self.problem(node, path, f"{short(text)} is not a name", hint)
                return None
            return text

        return read

    def chosen(self, *words: str) -> Reader:
        def read(path: str, node: Node) -> str | None:
            text = self.text(path, node)
            if text is not None and text not in words:
                known = "it is one of " + ", ".join(words)
                self.problem(node, path, f"{short(text)} is not known here", did_you_mean(text, words, otherwise=known))
                return None
            return text

        return read

    def boolean(self, path: str, node: Node) -> bool | None:
        if isinstance(node, Scalar) and isinstance(node.value, bool):
            return node.value
        self.problem(node, path, f"must be true or false, not {kind(node)}")
        return None

    def number(self, least: float, most: float, *, whole: bool = True) -> Reader:
        def read(path: str, node: Node) -> float | None:
            value = node.value if isinstance(node, Scalar) else None
            what = "a whole number" if whole else "a number"
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                self.problem(node, path, f"must be {what}, not {kind(node)}")
                return None
            if not least <= value <= most:
                self.problem(node, path, f"must be {what} from {least:g} to {most:g}, not {value}")
                return None
            return value

        return read

    def size(self, path: str, node: Node) -> int | None:
        if isinstance(node, Scalar) and isinstance(node.value, str | int) and not isinstance(node.value, bool):
            try:
                size = parse_size(node.text)
            except ValueError as error:
                self.problem(node, path, *str(error).split("; ", 1))
                return None
            if size > 0:
                return size
        self.problem(node, path, f"must be a size, not {kind(node)}", SIZE_HINT)
        return None

    def duration(self, path: str, node: Node) -> float | None:
        if not isinstance(node, Scalar) or not isinstance(node.value, str):
            self.problem(node, path, f"must be a duration with its unit, not {kind(node)}", DURATION_HINT)
            return None
        try:
            seconds = parse_duration(node.value)
        except ValueError as error:
            self.problem(node, path, *str(error).split("; ", 1))
            return None
        if seconds <= 0 or seconds > 366 * 86400:
            self.problem(node, path, "must be longer than nothing and no longer than a year", DURATION_HINT)
            return None
        return seconds

    # --- the pipeline ----------------------------------------------------------------------------------------

    def pipeline(self, root: Node | None) -> model.Pipeline | None:
        if root is None or (isinstance(root, Scalar) and root.value is None):
            self._note(Problem("the document is empty", line=1, column=1, hint="a pipeline has a name and steps"))
            return None
        values = self.fields(
            "",
            root,
            {
                "name": self.named(model.NAME_PATTERN, NAME_HINT),
                "args": lambda path, node: self.mapping(
                    path, node, model.ARG_NAME_PATTERN, "an argument's name has letters, digits and _", self.arg
                ),
                "envs": lambda path, node: self.sequence(
                    path, node, self.env, "envs is a list of `set: NAME` and `name: …, value: …`"
                ),
                "volumes": lambda path, node: self.mapping(path, node, model.NAME_PATTERN, NAME_HINT, self.volume),
                "steps": self.steps,
                "writeback": lambda path, node: self.sequence(path, node, self.writeback),
            },
            required=("name", "steps"),
        )
        self._names(values)
        if self.problems:
            return None
        result = model.Pipeline.model_validate(values)
        result._places.update(self.places)
        return result

    def arg(self, path: str, node: Node) -> dict[str, Any]:
        if isinstance(node, Scalar) and node.value is None:
            return {}
        kinds = ("string", "integer", "number", "boolean", "list", "object")
        values = self.fields(
            path,
            node,
            {
                "type": self.chosen(*kinds),
                "default": self.data,
                "required": self.boolean,
                "from": self.named(model.ATTRIBUTE_PATTERN, "`from` names an attribute of the run's object"),
                "description": self.text,
            },
        )
        if isinstance(node, Mapping) and "default" in node.items:
            default = node.items["default"][1]
            wrong = model.value_problem(values.get("type", "string"), plain(default))
            if (wrong and "type" in values) or (wrong and "type" not in node.items):
                quoted = isinstance(default, Scalar) and values.get("type", "string") == "string"
                self.problem(default, f"{path}.default", wrong, "quote it to make it text" if quoted else "")
            if values.get("required") is True:
                self.problem(
                    default, f"{path}.default", "a required argument has no default", "leave out one of the two"
                )
            values["required"] = False
        return values

    def data(self, path: str, node: Node) -> Any:
        """A value that is taken as it is."""
        return plain(node)

    def env(self, path: str, node: Node) -> dict[str, Any]:
        keys = set(node.items) if isinstance(node, Mapping) else set()
        if "set" in keys and not keys & {"name", "value"}:
            return self.fields(path, node, {"set": self.named(model.NAME_PATTERN, NAME_HINT)})
        if keys & {"name", "value"} and "set" not in keys:
            name = self.named(model.ENV_NAME_PATTERN, "an env's name has letters, digits and _")
            return self.fields(path, node, {"name": name, "value": self.text}, ("name", "value"))
        self.problem(node, path, "must be `set: NAME` or `{name: NAME, value: TEXT}`", "secrets are kept in env sets")
        return {}

    def volume(self, path: str, node: Node) -> dict[str, Any]:
        if isinstance(node, Scalar) and node.value is None:
            return {}
        values = self.fields(
            path, node, {"scope": self.chosen("run", "object", "node"), "keep": self.boolean, "size": self.size}
        )
        if values.get("keep") and values.get("scope", "run") == "run":
            self.problem(
                node,
                f"{path}.keep",
                "a volume of the run can't be kept: it lives as long as the run",
                "add `scope: object` or `scope: node`",
            )
        if "size" in values:
            values["size_bytes"] = values.pop("size")
        return values

    def steps(self, path: str, node: Node) -> list[Any]:
        if isinstance(node, Sequence) and not node.items:
            self.problem(node, path, "has no step", "a pipeline has one step at least")
        if isinstance(node, Sequence) and len(node.items) > MAX_STEPS:
            self.problem(node, path, f"has {len(node.items)} steps", f"{MAX_STEPS} are the most")
            return []
        return self.sequence(path, node, self.step, "steps is a list of steps, each with `name` and `uses`")

    def step(self, path: str, node: Node) -> dict[str, Any]:
        values = self.fields(
            path,
            node,
            {
                "name": self.named(model.NAME_PATTERN, NAME_HINT),
                "uses": self.uses,
                "with": self.parameters,
                "volumes": lambda path, node: self.mapping(path, node, model.NAME_PATTERN, NAME_HINT, self.mount),
                "envs": self.step_envs,
                "needs": lambda path, node: self.sequence(
                    path, node, self.named(model.NAME_PATTERN, NAME_HINT), "write `needs: [step]`"
                ),
                "if": self.condition,
                "timeout": self.duration,
                "retry": self.retry,
                "resources": self.resources,
                "idempotent": self.boolean,
            },
            required=("name", "uses"),
        )
        if "timeout" in values:
            values["timeout_s"] = values.pop("timeout")
        paths: dict[str, str] = {}
        for name, mount in values.get("volumes", {}).items():
            if mount["path"] in paths:
                line, column = self.places[f"{path}.volumes.{name}"]
                self._note(
                    Problem(
                        f"{mount['path']} is where {paths[mount['path']]} is mounted",
                        f"{path}.volumes.{name}",
                        line,
                        column,
                    )
                )
            paths.setdefault(mount["path"], name)
        return values

    def uses(self, path: str, node: Node) -> str | None:
        from outrider.steps import STEP_TYPE_NAME

        text = self.text(path, node)
        if text is not None and (len(text) > 128 or not STEP_TYPE_NAME.fullmatch(text)):
            self.problem(node, path, f"{short(text)} is not the name of a step type", "it reads like s3.download")
            return None
        return text

    def parameters(self, path: str, node: Node) -> dict[str, Any] | None:
        if isinstance(node, Scalar) and node.value is None:
            return {}
        if not isinstance(node, Mapping):
            self.problem(node, path, f"must be a mapping, not {kind(node)}", "with holds the step type's parameters")
            return None
        self.expressions(path, node)
        result: dict[str, Any] = plain(node)
        return result

    def expressions(self, path: str, node: Node) -> None:
        """Note where everything inside stands, and what is wrong with its expressions."""
        from outrider.expressions import has_expression, problems_in

        self.places[path] = (node.line, node.column)
        if isinstance(node, Mapping):
            for key, (at, value) in node.items.items():
                if "${{" in key:
                    self.problem(at, f"{path}.{short(key)[1:-1]}", "an expression can't be a key")
                self.expressions(f"{path}.{key}", value)
        elif isinstance(node, Sequence):
            for index, item in enumerate(node.items):
                self.expressions(f"{path}[{index}]", item)
        elif isinstance(node, Scalar) and has_expression(node.value) and self.fits(node, path):
            for found in problems_in(node.text):
                self.problem(node, path, found.message, found.hint)

    def fits(self, node: Scalar, path: str) -> bool:
        """Count the expressions of the pipeline; false, and a problem, once they are too many."""
        from outrider.expressions import expression_length

        if self.expression_text > MAX_EXPRESSION_TEXT:
            return False
        self.expression_text += expression_length(node.text)
        if self.expression_text > MAX_EXPRESSION_TEXT:
            hint = f"all together have {MAX_EXPRESSION_TEXT // 1024} KiB at most"
            self.problem(node, path, "the expressions are too long", hint)
        return self.expression_text <= MAX_EXPRESSION_TEXT

    def condition(self, path: str, node: Node) -> str | None:
        from outrider.expressions import problems_in

        if isinstance(node, Scalar) and isinstance(node.value, bool):
            return "true" if node.value else "false"
        if not isinstance(node, Scalar) or not isinstance(node.value, str):
            self.problem(node, path, f"must be a condition, not {kind(node)}", "for example args.slots > 8")
            return None
        if self.fits(node, path):
            for found in problems_in(node.value, condition=True):
                self.problem(node, path, found.message, found.hint)
        return node.value

    def mount(self, path: str, node: Node) -> dict[str, Any] | None:
        text = self.text(path, node)
        if text is None:
            return None
        target, _, mode = text.partition(":")
        if mode not in ("", "ro", "rw"):
            self.problem(node, path, f"the mode {short(mode)} is not known", "a mount reads like /data or /data:rw")
            return None
        wrong = mount_problem(target)
        if wrong:
            self.problem(node, path, f"{short(target)} {wrong}", "a mount reads like /data or /data:rw")
            return None
        return {"path": target, "writable": mode == "rw"}

    def step_envs(self, path: str, node: Node) -> dict[str, str]:
        """`{NAME: set.NAME}`, or a list whose names stay as they are."""
        pairs: list[tuple[str, str, Node]] = []
        if isinstance(node, Mapping):
            for name, (_, value) in node.items.items():
                text = self.text(f"{path}.{name}", value)
                self.places[f"{path}.{name}"] = (value.line, value.column)
                if text is not None:
                    pairs.append((name, text, value))
        elif isinstance(node, Sequence):
            for index, item in enumerate(node.items):
                text = self.text(f"{path}[{index}]", item)
                if text is not None:
                    name = text.rpartition(".")[2]
                    self.places[f"{path}.{name}"] = (item.line, item.column)
                    pairs.append((name, text, item))
        else:
            self.problem(node, path, f"must be a list or a mapping, not {kind(node)}", "for example [S3_ENDPOINT]")
        envs: dict[str, str] = {}
        for name, reference, at in pairs:
            if not re.fullmatch(model.ENV_NAME_PATTERN, name):
                self.problem(
                    at, f"{path}.{name}", f"{short(name)} is not the name of an env", "it has letters, digits and _"
                )
            elif name.startswith("OUTRIDER_"):
                self.problem(at, f"{path}.{name}", "names that begin with OUTRIDER_ are the core's")
            elif name in envs:
                self.problem(at, f"{path}.{name}", "the step gets this env twice")
            else:
                envs[name] = reference
        return envs

    def retry(self, path: str, node: Node) -> dict[str, Any]:
        values = self.fields(path, node, {"max": self.number(0, MAX_RETRIES), "first_wait": self.duration})
        if "first_wait" in values:
            values["first_wait_s"] = values.pop("first_wait")
        return values

    def resources(self, path: str, node: Node) -> dict[str, Any]:
        values = self.fields(
            path,
            node,
            {"memory": self.size, "cpus": self.number(0.01, 1024, whole=False), "pids": self.number(1, 4194304)},
        )
        if "memory" in values:
            values["memory_bytes"] = values.pop("memory")
            if values["memory_bytes"] < 6 * 1024**2:
                at = node.items["memory"][1] if isinstance(node, Mapping) else node
                self.problem(at, f"{path}.memory", "must be 6MiB at least", "no container engine starts one with less")
        return values

    def writeback(self, path: str, node: Node) -> dict[str, Any]:
        def value(path: str, node: Node) -> Any:
            self.expressions(path, node)
            return plain(node)

        attribute = self.named(model.ATTRIBUTE_PATTERN, "an attribute's name has letters, digits, _, - and .")
        values = self.fields(
            path, node, {"attribute": attribute, "value": value, "if": self.condition}, ("attribute", "value")
        )
        values.setdefault("value", None)
        return values

    # --- names that must fit together ----------------------------------------------------------------------

    def _names(self, values: dict[str, Any]) -> None:
        """Names of steps, volumes and envs against one another; whatever could be read takes part."""
        self._unique(values)
        volumes = values.get("volumes", {})
        for index, step in enumerate(values.get("steps", ())):
            path = f"steps[{index}]"
            for name in step.get("volumes", {}):
                if name not in volumes:
                    known = (
                        f"it has {listing(volumes)}" if volumes else f"add `volumes: {{{name}: {{}}}}` to the pipeline"
                    )
                    self._at(
                        f"{path}.volumes.{name}",
                        f"the pipeline has no volume {name}",
                        did_you_mean(name, volumes, otherwise=known),
                    )
        self._envs(values)
        self._graph(values)

    def _at(self, path: str, message: str, hint: str = "") -> None:
        place, nearest = self.places.get(path), path
        while place is None and nearest:
            nearest = nearest[: max(nearest.rfind("."), nearest.rfind("["), 0)]
            place = self.places.get(nearest)
        line, column = place or (0, 0)
        self._note(Problem(message, path, line, column, hint))

    def _unique(self, values: dict[str, Any]) -> None:
        seen: dict[str, int] = {}
        for index, step in enumerate(values.get("steps", ())):
            name = step.get("name")
            if name in seen:
                self._at(
                    f"steps[{index}].name", f"steps[{seen[name]}] is called {name} too", "each step has its own name"
                )
            elif name:
                seen[name] = index
        envs: set[str] = set()
        for index, env in enumerate(values.get("envs", ())):
            name = f"set {env['set']}" if "set" in env else env.get("name", "")
            if name in envs:
                self._at(f"envs[{index}]", f"{name} stands here twice")
            envs.add(name)

    def _envs(self, values: dict[str, Any]) -> None:
        """Give each env of a step its full name: "set.NAME", or "NAME" of a value in the pipeline."""
        sets = [env["set"] for env in values.get("envs", ()) if "set" in env]
        plain_names = [env["name"] for env in values.get("envs", ()) if "name" in env]
        for index, step in enumerate(values.get("steps", ())):
            for name, reference in step.get("envs", {}).items():
                path = f"steps[{index}].envs.{name}"
                set_name, dot, env_name = reference.rpartition(".")
                if not re.fullmatch(model.ENV_NAME_PATTERN, env_name):
                    self._at(path, f"{short(reference)} names no env", "it reads like NAME or set.NAME")
                elif dot and set_name not in sets:
                    hint = f"add `- set: {set_name}` to the pipeline's envs" if not sets else f"it has {listing(sets)}"
                    self._at(
                        path,
                        f"the pipeline has no env set {short(set_name)}",
                        did_you_mean(set_name, sets, otherwise=hint),
                    )
                elif not dot and env_name not in plain_names:
                    if len(sets) == 1:
                        step["envs"][name] = f"{sets[0]}.{env_name}"
                    elif sets:
                        self._at(
                            path, f"{env_name} can be in any of the sets {listing(sets)}", f"write {sets[0]}.{env_name}"
                        )
                    else:
                        hint = did_you_mean(
                            env_name, plain_names, otherwise="add it, or its `set`, to the pipeline's envs"
                        )
                        self._at(path, f"the pipeline has no env {env_name}", hint)

    def _graph(self, values: dict[str, Any]) -> None:
        steps = values.get("steps", ())
        names = [step["name"] for step in steps if "name" in step]
        needs: dict[str, tuple[str, ...]] = {}
        before: tuple[str, ...] = ()
        for index, step in enumerate(steps):
            for position, need in enumerate(step.get("needs", ())):
                path = f"steps[{index}].needs[{position}]"
                if need == step.get("name"):
                    self._at(path, "a step can't need itself")
                elif need not in names:
                    self._at(
                        path,
                        f"there is no step {need}",
                        did_you_mean(need, names, otherwise=f"there are {listing(names)}"),
                    )
                elif need in step["needs"][:position]:
                    self._at(path, f"{need} stands here twice")
            if "name" in step:
                needs.setdefault(step["name"], tuple(step["needs"]) if "needs" in step else before)
                before = (step["name"],)
        closed = model.all_before(needs)
        for index, step in enumerate(steps):
            name = step.get("name")
            if name in closed and name in closed[name] and name not in needs[name]:
                cycle = sorted(other for other in closed[name] if name in closed.get(other, ()))
                self._at(f"steps[{index}].needs", f"the steps {listing(cycle)} wait for one another in a circle")
                break
        if self.expression_text <= MAX_EXPRESSION_TEXT:
            check_references(values, closed, self._at)


def mount_problem(path: str) -> str:
    """What is wrong with a path as the place of a volume inside a container; empty if nothing."""
    if not path.startswith("/"):
        return "is not an absolute path"
    if "${{" in path or len(path) > 255 or any(ord(letter) < 32 for letter in path):
        return "is not a path"
    parts = path.split("/")[1:]
    if path == "/" or any(part in ("", ".", "..") for part in parts):
        return "is not a plain path below /"
    if any(path == reserved or path.startswith(f"{reserved}/") for reserved in _RESERVED):
        return f"is below {listing(_RESERVED)}, which are the core's"
    return ""
