"""Finds expressions in texts, and in expressions what they refer to, without evaluating anything.

The lexer knows as much of CEL (https://github.com/google/cel-spec/blob/master/doc/langdef.md) as is needed to tell
strings from code: where a `}}` ends the expression, how deep it nests, which names it reads and which it calls.
Whether it is good CEL is for the library to say, which only ever sees what has passed here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from outrider.errors import InvalidInput, Problem

MAX_LENGTH = 2048
MAX_DEPTH = 32
MAX_EXPRESSIONS = 64
"""In one text."""
MAX_TOKENS = 400
"""Bounds what `x + x + …` can make of one long text."""

_STRING = r"""
    "{3}(?:\\.|[^\\])*?"{3} | '{3}(?:\\.|[^\\])*?'{3} | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*'
"""
_TOKEN = re.compile(
    rf"""(?P<space>[ \t\r\n\f]+|//[^\n]*)
    | (?P<string>[rRbB]{{0,2}}(?:{_STRING}))
    | (?P<number>0[xX][0-9a-fA-F]+[uU]?|(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?[uU]?)
    | (?P<name>[A-Za-z_][A-Za-z0-9_]*)
    | (?P<op>&&|\|\||[<>=!]=|[-+*/%<>!?:,.(){{}}\[\]])""",
    re.VERBOSE | re.DOTALL,
)
# A raw string ends at the first quote of its kind, backslash or not.
_RAW = re.compile(r"(?:[bB]?[rR][bB]?)(?:\"\"\".*?\"\"\"|'''.*?'''|\"[^\"\n]*\"|'[^'\n]*')", re.DOTALL)
_LITERALS = frozenset({"true", "false", "null", "in"})
_OPEN, _CLOSE = frozenset("([{"), frozenset(")]}")
# Operators that nest without brackets: each is a level of the parser's recursion.
_PREFIX = frozenset("-!?")


class Reference(tuple[str, ...]):
    """A dotted path that an expression reads, as far as the text tells: `steps.fetch.outputs.path`."""

    __slots__ = ()

    @property
    def root(self) -> str:
        return self[0]

    def __str__(self) -> str:
        return ".".join(self)


@dataclass(frozen=True, slots=True)
class Scan:
    """What an expression reads and what it calls."""

    references: frozenset[Reference]
    functions: frozenset[str]


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a text: literal, or the inside of one `${{ }}`."""

    text: str
    is_expression: bool


def quote(text: str) -> str:
    """An expression as messages name it."""
    text = " ".join(text.split())
    return f"'{text if len(text) <= 120 else text[:120] + '…'}'"


def _bad(text: str, message: str, hint: str = "") -> InvalidInput:
    problem = Problem(f"the expression {quote(text)}: {message}", hint=hint)
    return InvalidInput(str(problem), [problem], code="bad_expression")


def _next(text: str, at: int, end: int) -> re.Match[str] | None:
    """The token at ``at``. Nothing from ``end`` on is looked at: an unclosed quote would search a megabyte."""
    raw = _RAW.match(text, at, end) if text[at] in "rRbB" else None
    return raw or _TOKEN.match(text, at, end)


def split(text: str) -> list[Segment]:
    """Cut a text into literals and expressions. Raises InvalidInput for a `${{` without its `}}`."""
    segments: list[Segment] = []
    at = 0
    while True:
        start = text.find("${{", at)
        if start < 0:
            if at < len(text) or not segments:
                segments.append(Segment(text[at:], False))
            return segments
        if start > at:
            segments.append(Segment(text[at:start], False))
        end = _end(text, start + 3)
        if end is None:
            raise _bad(text[start:], "the `${{` has no `}}`", "an expression reads like ${{ args.version }}")
        segments.append(Segment(text[start + 3 : end], True))
        if len(segments) > 2 * MAX_EXPRESSIONS:
            raise _bad(text, f"the text has over {MAX_EXPRESSIONS} expressions", "let a step put it together")
        at = end + 2


def _end(text: str, at: int) -> int | None:
    """Where the `}}` stands that ends the expression: outside strings, and not two closed CEL maps."""
    depth, limit = 0, at + MAX_LENGTH + 1
    while at < len(text) and at <= limit:
        if depth == 0 and text.startswith("}}", at):
            return at
        token = _next(text, at, limit)
        if token is None:
            at += 1  # nonsense: the library, or scan(), will say so
            continue
        if token.group() == "{":
            depth += 1
        elif token.group() == "}":
            depth = max(0, depth - 1)
        at = token.end()
    if at > limit:
        raise _bad(text, f"it is over {MAX_LENGTH} characters long", "let a step do that work")
    return None


def scan(text: str) -> Scan:
    """Look an expression through. Raises InvalidInput where it is over-long, too deep, or no CEL at all."""
    if not text.strip():
        raise _bad("${{ }}", "it is empty", "an expression reads like ${{ args.version }}")
    if len(text) > MAX_LENGTH:
        raise _bad(text, f"it is over {MAX_LENGTH} characters long", "let a step do that work")
    tokens = _tokens(text)
    if len(tokens) > MAX_TOKENS:
        raise _bad(text, f"it has over {MAX_TOKENS} parts", "let a step do that work")
    _check_depth(text, tokens)
    references: set[Reference] = set()
    functions: set[str] = set()
    index = 0
    while index < len(tokens):
        kind, word = tokens[index]
        before = tokens[index - 1][1] if index else ""
        after = tokens[index + 1][1] if index + 1 < len(tokens) else ""
        if kind == "name" and after == "(":
            functions.add(word)
        elif kind == "name" and before != "." and word not in _LITERALS:
            references.add(_path(tokens, index))
        index += 1
    return Scan(frozenset(references), frozenset(functions))


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens: list[tuple[str, str]] = []
    at = 0
    while at < len(text):
        match = _next(text, at, len(text))
        if match is None:
            if text[at] in "\"'":
                raise _bad(text, "a text in it has no closing quote")
            raise _bad(text, f"{text[at]!r} can't stand there", "expressions are CEL, for example args.slots > 8")
        kind = match.lastgroup or "string"
        if kind != "space":
            tokens.append((kind, match.group()))
        at = match.end()
    return tokens


def _check_depth(text: str, tokens: list[tuple[str, str]]) -> None:
    depth = deepest = prefixes = 0
    for kind, word in tokens:
        if kind == "op" and word in _OPEN:
            depth += 1
        elif kind == "op" and word in _CLOSE:
            depth -= 1
        elif kind == "op" and word in _PREFIX:
            prefixes += 1
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH or prefixes > MAX_DEPTH:
        raise _bad(text, f"it nests deeper than {MAX_DEPTH} levels", "let a step do that work")


def _path(tokens: list[tuple[str, str]], index: int) -> Reference:
    """`a.b["c"].d` from the name at ``index`` on, up to what the text alone can't tell."""
    path = [tokens[index][1]]
    index += 1
    while index + 1 < len(tokens):
        word, (kind, following) = tokens[index][1], tokens[index + 1]
        called = index + 2 < len(tokens) and tokens[index + 2][1] == "("
        if word == "." and kind == "name" and not called:
            path.append(following)
            index += 2
        elif word == "[" and kind == "string" and index + 2 < len(tokens) and tokens[index + 2][1] == "]":
            if "\\" in following or following[0] not in "\"'" or following[:3] in ('"""', "'''"):
                break
            path.append(following[1:-1])
            index += 3
        else:
            break
    return Reference(path)
