"""`${{ … }}`: one CEL expression over a run's data, compiled once, evaluated once.

Expressions are written by the author of the pipeline; everything they read is data and is never evaluated again.
CEL has no loops but its macros, and those are refused, so an expression takes time in proportion to its length.
The library is Rust: what reaches it is checked first (length, depth, size of numbers), and whatever it raises,
a panic included, becomes a sentence. See docs/decisions/0001-cel-library.md.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from outrider._cel_lexer import MAX_DEPTH, MAX_LENGTH, MAX_TOKENS, Reference, Scan, Segment, quote, scan, split
from outrider._cel_values import FUNCTIONS, MAX_RESULT, json_value, narrow
from outrider._placeholders import protect_data, protected, walk
from outrider._suggest import did_you_mean, listing
from outrider.errors import InvalidInput, PermanentError, Problem

__all__ = [
    "MAX_DEPTH",
    "MAX_LENGTH",
    "MAX_RESULT",
    "MAX_TOKENS",
    "Expression",
    "Reference",
    "compile_condition",
    "compile_expression",
    "evaluate_condition",
    "has_expression",
    "problems_in",
    "reference_paths",
    "references",
    "render",
    "render_params",
]

ROOTS = ("args", "node", "object", "run", "steps", "volumes")
STATUS_FUNCTIONS = ("always", "failure", "success")
_MACROS = frozenset({"all", "exists", "exists_one", "existsOne", "filter", "map", "bind", "transformList",
                     "transformMap", "transformMapEntry", "sortBy", "greatest", "least"})  # fmt: skip
_BUILT_IN = frozenset(
    {"contains", "double", "duration", "endsWith", "has", "int", "matches", "size", "startsWith",
     "string", "timestamp", "uint"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Expression:
    """A compiled expression: its text, what it refers to, and the functions that it calls."""

    text: str
    scan: Scan
    program: Any  # of the CEL extension, which has no usable types

    def evaluate(self, context: Mapping[str, Any], outcomes: Iterable[str] | None = None) -> Any:
        """The value over ``context``, as JSON-like Python values.

        ``outcomes`` are those of the steps that come before, for `success()` and `failure()`; ``None`` takes them
        from ``context["steps"]``. Raises PermanentError naming the expression.
        """
        functions = dict(FUNCTIONS)
        if not self.scan.functions.isdisjoint(STATUS_FUNCTIONS):
            known = list(_outcomes(context) if outcomes is None else outcomes)
            functions.update(
                always=lambda: True,
                success=lambda: succeeded(known),
                failure=lambda: "failed" in known,
            )
        data = narrow(context, self.scan.references, self.text)
        try:
            value = self.program.execute(_cel().Context(data, functions))
        except BaseException as error:
            raise _failed(self, error, context) from error
        return json_value(value, self.text)


def succeeded(outcomes: Iterable[str]) -> bool:
    """What `success()` says: each step before succeeded, or was skipped by its own condition."""
    return all(outcome in ("succeeded", "skipped") for outcome in outcomes)


def has_expression(value: object) -> bool:
    """Whether a text holds a `${{`."""
    return isinstance(value, str) and "${{" in value


@functools.lru_cache(maxsize=4096)
def compile_expression(text: str) -> Expression:
    """Compile one expression, without its `${{ }}`. Raises InvalidInput that says what is wrong with it."""
    found = scan(text)
    try:
        program = _cel().compile(text)
    except BaseException as error:
        _let_pass(error)
        raise _invalid(text, _parse_message(str(error)), "expressions are CEL, for example args.slots > 8") from error
    for call in sorted(found.functions):
        if call in _MACROS:
            raise _invalid(text, f"{call}() is not allowed", "expressions don't loop; let a step do that work")
        if call not in _BUILT_IN and call not in FUNCTIONS and call not in STATUS_FUNCTIONS:
            known = {*_BUILT_IN, *FUNCTIONS, *STATUS_FUNCTIONS}
            raise _invalid(
                text, f"there is no function {call}()", did_you_mean(call, known, otherwise=listing(known, 40))
            )
    for reference in sorted(found.references):
        if reference.root not in ROOTS:
            raise _invalid(text, f"there is no {reference.root!r} here", _root_hint(reference.root, text))
    return Expression(text, found, program)


def compile_condition(text: str) -> Expression:
    """Compile the text of an `if:`, with or without `${{ }}` around the whole of it. Raises InvalidInput."""
    segments = split(text)
    if any(segment.is_expression for segment in segments):
        code = [segment for segment in segments if segment.is_expression or segment.text.strip()]
        if len(code) != 1:
            raise _invalid(text, "a condition is one expression", "put the whole of it inside one ${{ }}")
        return compile_expression(code[0].text.strip())
    return compile_expression(text.strip())


def evaluate_condition(
    text: str | None,
    context: Mapping[str, Any],
    outcomes: Iterable[str] | None = None,
    *,
    implied_success: bool = True,
) -> bool:
    """Whether the condition ``text`` of an `if:` holds; ``None`` is the default one, `success()`.

    ``outcomes`` are those of all steps that come before this one in the graph ("succeeded", "failed", "skipped",
    "cancelled", "unknown"); ``None`` takes them from ``context["steps"]``. A condition that calls none of
    `always()`, `failure()`, `success()` holds only if `success()` does too; for write-back pass
    ``implied_success=False``. Raises InvalidInput if the text is no expression, PermanentError if it fails or
    comes to something else than true or false.
    """
    known = list(_outcomes(context) if outcomes is None else outcomes)
    if text is None:
        return succeeded(known) if implied_success else True
    expression = compile_condition(text)
    if implied_success and expression.scan.functions.isdisjoint(STATUS_FUNCTIONS) and not succeeded(known):
        return False
    value = expression.evaluate(context, known)
    if not isinstance(value, bool):
        raise PermanentError(
            f"the condition {quote(text)} comes to {_short_json(value)}", code="bad_condition",
            hint="a condition comes to true or false",
        )  # fmt: skip
    return value


def render(value: Any, context: Mapping[str, Any]) -> Any:
    """``value`` (JSON-like) with each `${{ }}` in its texts replaced by what it comes to over ``context``.

    A text that is one expression and nothing else takes the type of its value; within other text the value is
    written out (lists and mappings as JSON; null is an error). Keys are never evaluated, nor is what came out.
    Raises InvalidInput for a text that is no expression, PermanentError for one that fails.
    """
    if isinstance(value, str):
        return _render_text(value, context) if "${{" in value else value
    if isinstance(value, Mapping):
        return {key: render(item, context) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [render(item, context) for item in value]
    return value


def render_params(params: Any, schema: Mapping[str, Any], context: Mapping[str, Any]) -> Any:
    """`render` for a step's parameters: where their schema says that the program replaces `$(…)`, what comes out of
    an expression is written so that it is not replaced."""

    def text(value: str, held: bool, schemas: list[Mapping[str, Any]]) -> Any:
        if "${{" not in value:
            return value
        segments = split(value)
        if len(segments) == 1:
            return protect_data(_render_text(value, context), schemas, schema)
        return protected(_parts(segments, context)) if held else _render_text(value, context)

    return walk(params, schema, text)


def references(value: Any) -> set[str]:
    """What the expressions in ``value`` (JSON-like) refer to: "args.version", "steps.fetch", "object.attributes".

    Two members deep; one deep ("steps") where the second can't be told from the text. Texts that are no
    expressions are passed over: the loader has said so already.
    """
    return {".".join(path[:2]) for path in reference_paths(value)}


def reference_paths(value: Any) -> set[Reference]:
    """Like ``references``, each whole: ``Reference(("steps", "fetch", "outputs", "path"))``."""
    found: set[Reference] = set()
    for text in _texts(value):
        try:
            for segment in split(text):
                if segment.is_expression:
                    found |= scan(segment.text).references
        except InvalidInput:
            continue
    return found


def expression_length(text: str) -> int:
    """How many characters of a text are expressions; all of them, for a condition without `${{ }}`."""
    if "${{" not in text:
        return len(text)
    try:
        return sum(len(segment.text) for segment in split(text) if segment.is_expression)
    except InvalidInput:
        return 0  # it is refused before anything is compiled


def problems_in(text: str, *, condition: bool = False) -> list[Problem]:
    """What is wrong with the expressions of one text; empty if it is fit to be evaluated."""
    try:
        if condition:
            compile_condition(text)
        else:
            for segment in split(text):
                if segment.is_expression:
                    expression = compile_expression(segment.text.strip())
                    used = sorted(expression.scan.functions.intersection(STATUS_FUNCTIONS))
                    if used:
                        raise _invalid(segment.text, f"{used[0]}() has a meaning in `if:` alone", "")
    except InvalidInput as error:
        return list(error.problems)
    return []


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if "${{" in value:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _render_text(text: str, context: Mapping[str, Any]) -> Any:
    segments: list[Segment] = split(text)
    if len(segments) == 1:
        return compile_expression(segments[0].text.strip()).evaluate(context)
    return "".join(part for part, _ in _parts(segments, context))


def _parts(segments: list[Segment], context: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    for segment in segments:
        if not segment.is_expression:
            yield segment.text, False
            continue
        value = compile_expression(segment.text.strip()).evaluate(context)
        if value is None:
            raise PermanentError(
                f"the expression {quote(segment.text)} comes to null within a text", code="expression_failed",
                hint="test it first, as in has(x) ? x : 'none'",
            )  # fmt: skip
        yield value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), True


def _outcomes(context: Mapping[str, Any]) -> Iterator[str]:
    for step in (context.get("steps") or {}).values():
        if isinstance(step, Mapping) and "outcome" in step:
            yield step["outcome"]


# --- errors -----------------------------------------------------------------------------------------------------


def _let_pass(error: BaseException) -> None:
    """A panic of the Rust side is a BaseException; only these two of that family are not the library's."""
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        raise error


def _failed(expression: Expression, error: BaseException, context: Mapping[str, Any]) -> PermanentError:
    _let_pass(error)
    if isinstance(error, PermanentError):
        return error
    hint = ""
    if isinstance(error, KeyError):
        missing = str(error.args[0]).strip("'\"") if error.args else ""
        message = f"there is no {missing!r}"
        hint = "test it first with has(), as the outputs of a skipped or failed step are absent"
        for reference in expression.scan.references:
            if reference.root == "object" and missing in reference[1:] and not context.get("object"):
                message, hint = "this run has no object", "run it with one, or test for it with has(object.name)"
                break
            if missing in reference[1:]:
                parent = _member(context, reference[: reference.index(missing)])
                if isinstance(parent, Mapping):
                    message = f"{'.'.join(reference[: reference.index(missing)])} has no {missing!r}"
                    hint = did_you_mean(missing, map(str, parent), otherwise=hint)
                break
    else:
        said = str(error).rpartition("Python function call failed: ")[2]
        message = said.removeprefix("TypeError: ").removeprefix("ValueError: ")
        message = re.split(r" Check |\. CEL does|\. Convert |\n", message)[0].rstrip(".") or type(error).__name__
    return PermanentError(
        f"the expression {quote(expression.text)} fails: {message}", code="expression_failed", hint=hint
    )


def _member(context: Any, path: Iterable[str]) -> Any:
    for part in path:
        if not isinstance(context, Mapping) or part not in context:
            return None
        context = context[part]
    return context


def _parse_message(said: str) -> str:
    """The first complaint of the parser, without its list of what it would have liked."""
    _, found, rest = said.partition("Syntax error: ")
    first = (rest if found else said.rpartition("ERROR: <input>:")[2]).split("\n")[0]
    return "it is not valid CEL: " + first.split(" expecting {")[0].replace("<EOF>", "end of the expression")[:160]


def _root_hint(root: str, text: str) -> str:
    dashed = re.search(rf"\b(steps|volumes)\.([a-z0-9_-]+-{re.escape(root)}[a-z0-9_-]*)", text)
    if dashed:
        return f'a name with a dash is written {dashed[1]}["{dashed[2]}"]'
    if root in ("env", "envs", "secrets"):
        return "expressions never see envs; allot them with the step's `envs:`"
    return did_you_mean(root, ROOTS, otherwise=f"expressions read {listing(ROOTS)}")


def _short_json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + "…"


def _invalid(text: str, message: str, hint: str) -> InvalidInput:
    problem = Problem(f"the expression {quote(text)}: {message}", hint=hint)
    return InvalidInput(str(problem), [problem], code="bad_expression")


@functools.cache
def _cel() -> Any:
    """The CEL extension, loaded without its package: that imports a command-line tool and takes 0.7 s and 30 MB."""
    import importlib.machinery
    import importlib.util

    package = importlib.util.find_spec("cel")
    if package is None or package.submodule_search_locations is None:
        raise PermanentError(
            "expressions need the library common-expression-language", code="missing_dependency",
            hint="install outrider[agent], outrider[server] or outrider[cli]",
        )  # fmt: skip
    spec = importlib.machinery.PathFinder.find_spec("cel.cel", list(package.submodule_search_locations))
    if spec is None or spec.loader is None:
        return importlib.import_module("cel")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # It logs, beside raising, what one of our functions raises.
    logging.getLogger("cel").setLevel(logging.CRITICAL + 1)
    return module
