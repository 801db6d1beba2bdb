"""YAML into nodes that know where they stand, with everything refused that makes YAML dangerous.

The text is read event by event with libyaml, so that depth and number are checked before anything is built:
10,000 levels or a million items are refused within milliseconds. Values follow YAML 1.2's core schema: only
`true` and `false` are booleans, so that `on`, `no`, `1:30` and dates stay the strings they look like.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from outrider.errors import InvalidInput, Problem

MAX_BYTES = 1024 * 1024
MAX_DEPTH = 64
MAX_PROBLEMS = 100
"""Nobody reads more, and hostile text could make a hundred thousand."""
MAX_NODES = 20_000
"""Scalars, lists and mappings of a document, with each alias counted as what it stands for."""

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")

# The C loader is not everywhere where PyYAML is; the Python one is right too, only slower.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(slots=True)
class Node:
    """What stands at ``line`` and ``column`` (1-based). ``weight`` is the number of nodes in it, itself included,
    ``height`` the number of levels below it."""

    line: int
    column: int
    weight: int = 1
    height: int = 0


@dataclass(slots=True)
class Scalar(Node):
    """A single value: its text as it stands, and what it means."""

    text: str = ""
    value: str | int | float | bool | None = None


@dataclass(slots=True)
class Sequence(Node):
    items: list[Node] = field(default_factory=list)


@dataclass(slots=True)
class Mapping(Node):
    """Keys with their places, in order. Of a key that stands twice, the first counts (and a problem is noted)."""

    items: dict[str, tuple[Scalar, Node]] = field(default_factory=dict)


def kind(node: Node) -> str:
    """What a node is, in the words of the person who wrote it."""
    if isinstance(node, Mapping):
        return "a mapping"
    if isinstance(node, Sequence):
        return "a list"
    value = node.value if isinstance(node, Scalar) else None
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return f"the boolean {node_text(node)}"
    if isinstance(value, int | float):
        return f"the number {node_text(node)}"
    return f"the text {short(value)}"


def short(value: object, limit: int = 60) -> str:
    """``repr`` of a value for a message, cut if it is long."""
    text = repr(value[: limit + 1] if isinstance(value, str | bytes) else value)
    return text if len(text) <= limit + 2 else text[:limit] + "…'"


def node_text(node: Node) -> str:
    """The text of a scalar, cut if it is long; empty for others."""
    text = node.text if isinstance(node, Scalar) else ""
    return text if len(text) <= 60 else text[:60] + "…"


def plain(node: Node) -> Any:
    """The node as JSON-like Python values. Aliased parts are made anew each time, so that none is shared."""
    if isinstance(node, Mapping):
        return {key: plain(value) for key, (_, value) in node.items.items()}
    if isinstance(node, Sequence):
        return [plain(item) for item in node.items]
    return node.value if isinstance(node, Scalar) else None


def compose(text: str | bytes) -> tuple[Node | None, list[Problem]]:
    """The document's root (``None`` if it is empty) and the problems that still let it be read.

    Raises InvalidInput where reading on makes no sense: over-long, not UTF-8, not YAML, too deep, too many nodes.
    """
    size = len(text) if isinstance(text, bytes) else len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        raise _refuse(f"the document is {size:,} bytes long", 0, 0, "a pipeline has 1 MiB at most", "too_long")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise _refuse(f"byte {error.start} is not UTF-8", line, 0, "save the file as UTF-8", "not_utf8") from error
    return _Composer().compose(text)


def _place(event: Any) -> tuple[int, int]:
    """Line and column, from 1, where an event begins."""
    return event.start_mark.line + 1, event.start_mark.column + 1


def _refuse(message: str, line: int, column: int, hint: str = "", code: str = "invalid_yaml") -> InvalidInput:
    problem = Problem(message, line=line, column=column, hint=hint)
    return InvalidInput(str(problem), [problem], code=code)


class _Composer:
    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.anchors: dict[str, Node | None] = {}  # None: still open, so an alias to it would contain itself
        self.nodes = 0

    def compose(self, text: str) -> tuple[Node | None, list[Problem]]:
        try:
            root = self._document(yaml.parse(text, Loader=_Loader))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
            said = error.problem or error.context or "it can't be parsed"
            if "maximum nesting depth" in said:
                # The scanner looks far ahead, and newer ones have a limit of their own that it meets before ours.
                raise _refuse(f"nested deeper than {MAX_DEPTH} levels", line, column, code="too_deep") from error
            context = f" {error.context}" if error.context and error.problem else ""
            raise _refuse(f"not valid YAML: {said}{context}", line, column) from error
        except (yaml.YAMLError, UnicodeError) as error:
            said = str(error).splitlines()[0] if str(error) else "it can't be read"
            at = getattr(error, "position", None)  # of an unacceptable character
            line = text.count("\n", 0, at) + 1 if isinstance(at, int) else 0
            raise _refuse(f"not valid YAML: {said}", line, 0) from error
        return root, self.problems

    def _document(self, events: Any) -> Node | None:
        """Build the tree with a stack of our own: recursion would end at Python's limit, not at ours."""
        root: Node | None = None
        documents = 0
        stack: list[_Open] = []
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise _refuse("a second document begins here", *_place(event), "one pipeline to a file")
                continue
            done: Node
            anchor: str | None = None
            if isinstance(event, yaml.ScalarEvent):
                self._count(event)
                done = self._scalar(event)
                if event.anchor:
                    self.anchors[event.anchor] = done
            elif isinstance(event, yaml.AliasEvent):
                done = self._alias(event, len(stack))
            elif isinstance(event, yaml.SequenceStartEvent | yaml.MappingStartEvent):
                self._count(event)
                self._no_tag(event)
                line, column = _place(event)
                if len(stack) >= MAX_DEPTH:
                    raise _refuse(f"nested deeper than {MAX_DEPTH} levels", line, column, code="too_deep")
                node: Sequence | Mapping = (
                    Sequence(line, column) if isinstance(event, yaml.SequenceStartEvent) else Mapping(line, column)
                )
                if event.anchor:
                    self.anchors[event.anchor] = None
                stack.append(_Open(node, event.anchor))
                continue
            elif isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent):
                opened = stack.pop()
                done, anchor = opened.node, opened.anchor
                if anchor:
                    self.anchors[anchor] = done
            else:
                continue
            if stack:
                self._add(stack[-1], done)
            else:
                root = done
        return root

    def _note(self, problem: Problem) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)

    def _count(self, event: Any, nodes: int = 1) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            mark = event.start_mark
            hint = "its aliases multiply" if isinstance(event, yaml.AliasEvent) else ""
            raise _refuse(f"more than {MAX_NODES:,} values", mark.line + 1, mark.column + 1, hint, "too_many_values")

    def _no_tag(self, event: Any) -> None:
        if event.tag and event.tag != "!":
            mark = event.start_mark
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._note(
                Problem(
                    f"the tag {short(tag)} is not allowed",
                    line=mark.line + 1,
                    column=mark.column + 1,
                    hint="values are plain text, numbers, true, false, lists and mappings; quote what must stay text",
                )
            )

    def _alias(self, event: Any, depth: int) -> Node:
        mark = event.start_mark
        target = self.anchors.get(event.anchor)
        if target is None:
            why = "contains itself" if event.anchor in self.anchors else "names no anchor"
            raise _refuse(f"the alias *{short(event.anchor)[1:-1]} {why}", mark.line + 1, mark.column + 1)
        self._count(event, target.weight)
        if depth + target.height > MAX_DEPTH:
            raise _refuse(f"nested deeper than {MAX_DEPTH} levels", mark.line + 1, mark.column + 1, code="too_deep")
        return target

    def _scalar(self, event: Any) -> Scalar:
        self._no_tag(event)
        line, column = _place(event)
        text: str = event.value
        if not event.implicit[0]:  # quoted or a block: text, whatever it looks like
            return Scalar(line, column, text=text, value=text)
        return Scalar(line, column, text=text, value=self._resolve(text, line, column))

    def _resolve(self, text: str, line: int, column: int) -> str | int | float | bool | None:
        if text in ("", "~", "null", "Null", "NULL"):
            return None
        if text in ("true", "True", "TRUE"):
            return True
        if text in ("false", "False", "FALSE"):
            return False
        if text[0] not in "+-.0123456789" or len(text) > 400:
            return text
        if _INT.fullmatch(text) or _HEX.fullmatch(text):
            number = int(text, 16 if text.startswith("0x") else 10)
            if not -(2**63) <= number < 2**63:
                self._note(
                    Problem(
                        f"the number {text[:60]} does not fit 64 bits",
                        line=line,
                        column=column,
                        hint="quote it as text",
                    )
                )
                return 0
            return number
        if _FLOAT.fullmatch(text):
            value = float(text)
            return text if value in (float("inf"), float("-inf")) else value
        return text

    def _add(self, opened: _Open, done: Node) -> None:
        node = opened.node
        node.weight += done.weight
        node.height = max(node.height, done.height + 1)
        if isinstance(node, Sequence):
            node.items.append(done)
            return
        assert isinstance(node, Mapping)
        if not opened.has_key:
            opened.key, opened.has_key = done, True
            return
        key, opened.key, opened.has_key = opened.key, None, False
        if not isinstance(key, Scalar):
            line, column = (key.line, key.column) if key else (node.line, node.column)
            self._note(Problem("a key must be plain text", line=line, column=column))
        elif key.text == "<<":
            self._note(
                Problem(
                    "the merge key << is not allowed",
                    line=key.line,
                    column=key.column,
                    hint="write the keys out, or use an alias for a whole value",
                )
            )
        elif key.text in node.items:
            first = node.items[key.text][0]
            self._note(
                Problem(
                    f"the key {short(key.text)} stands twice in this mapping",
                    line=key.line,
                    column=key.column,
                    hint=f"the first is in line {first.line}",
                )
            )
        else:
            node.items[key.text] = (key, done)


@dataclass(slots=True)
class _Open:
    node: Sequence | Mapping
    anchor: str | None
    key: Node | None = None
    has_key: bool = False


def read_document(file: Path, what: str) -> Any:
    """The value of a YAML file, read as strictly as a pipeline: a key that stands twice is refused.

    Of two that say different things the last would win in silence, and the first is what somebody reads and relies on.
    ``what`` names the file in errors. Raises FileNotFoundError, and InvalidInput with every problem.
    """
    try:
        root, problems = compose(file.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, InvalidInput) as error:
        raise InvalidInput(f"{what} can't be read: {error}") from error
    if problems:
        raise InvalidInput(f"{what} can't be read: {'; '.join(map(str, problems))}", problems)
    return None if root is None else plain(root)
