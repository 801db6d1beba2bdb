"""Reading YAML nodes as the values they must be, noting every problem on the way."""

from __future__ import annotations

import re
from collections.abc import Callable
from collections.abc import Mapping as MappingType
from typing import Any

from outrider._suggest import did_you_mean, listing
from outrider._units import DURATION_HINT, SIZE_HINT, parse_duration, parse_size
from outrider._yaml import MAX_PROBLEMS, Mapping, Node, Scalar, Sequence, kind, short
from outrider.errors import Problem

Reader = Callable[[str, Node], Any]


class EnoughError(Exception):
    """MAX_PROBLEMS have been found."""


class NodeReader:
    """Reads nodes, and notes in ``problems`` what is wrong and in ``places`` where each part stands."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        self.places: dict[str, tuple[int, int]] = {}

    # --- parts that many have --------------------------------------------------------------------------------

    def problem(self, node: Node, path: str, message: str, hint: str = "") -> None:
        self.note(Problem(message, path, node.line, node.column, hint))

    def note(self, problem: Problem) -> None:
        if len(self.problems) >= MAX_PROBLEMS:
            raise EnoughError
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

    def at(self, path: str, message: str, hint: str = "") -> None:
        """Note a problem at a path, or at the nearest part around it whose place is known."""
        place, nearest = self.places.get(path), path
        while place is None and nearest:
            nearest = nearest[: max(nearest.rfind("."), nearest.rfind("["), 0)]
            place = self.places.get(nearest)
        line, column = place or (0, 0)
        self.note(Problem(message, path, line, column, hint))
