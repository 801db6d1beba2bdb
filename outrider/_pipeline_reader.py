"""From YAML nodes to a ``Pipeline``, noting every problem on the way instead of stopping at the first."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

from outrider import pipeline as model
from outrider._node_reader import EnoughError, NodeReader
from outrider._pipeline_names import check_names
from outrider._suggest import listing
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
    except EnoughError:
        result = None
        reader.problems.append(Problem(f"there are more than {MAX_PROBLEMS} problems; these are some of them"))
    if reader.problems or result is None:
        found = sorted(reader.problems, key=lambda problem: (problem.line or sys.maxsize, problem.column))
        said = f"is not valid: {found[0]}" if len(found) == 1 else f"has {len(found)} problems, the first: {found[0]}"
        raise InvalidInput(f"the pipeline {said}", found, code="invalid_pipeline")
    return result


class _Reader(NodeReader):
    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(problems)
        self.expression_text = 0

    def pipeline(self, root: Node | None) -> model.Pipeline | None:
        if root is None or (isinstance(root, Scalar) and root.value is None):
            self.note(Problem("the document is empty", line=1, column=1, hint="a pipeline has a name and steps"))
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
        check_names(self, values, references=self.expression_text <= MAX_EXPRESSION_TEXT)
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
                self.note(
                    Problem(
                        f"{mount['path']} is where {paths[mount['path']]} is mounted",
                        f"{path}.volumes.{name}",
                        line,
                        column,
                    )
                )
            paths.setdefault(mount["path"], name)
        for name, mount in values.get("volumes", {}).items():
            outer = next((path for path in paths if mount["path"].startswith(f"{path}/")), None)
            if outer is not None:
                # A link in the outer volume would decide where in the container the inner one really is: over the
                # program of a step that has secrets, say.
                line, column = self.places[f"{path}.volumes.{name}"]
                self.note(
                    Problem(
                        f"{mount['path']} is inside of {outer}, where {paths[outer]} is mounted",
                        f"{path}.volumes.{name}",
                        line,
                        column,
                        "mount them side by side",
                    )
                )
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
        return f"is the core's, as is everything below {listing(_RESERVED)}"
    return ""
