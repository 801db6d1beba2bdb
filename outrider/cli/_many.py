"""Doing one thing to several: go on after a failure, and say which failed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from outrider.cli._main import DONE, SOME_FAILED, exit_code, print_error
from outrider.cli._output import emit_json, note, plain
from outrider.errors import OutriderError

A = TypeVar("A")


def each(
    names: Sequence[str], operation: Callable[[str], A], done: Callable[[str, A], str], as_json: bool = False
) -> int:
    """Call ``operation`` for each name. Gives the exit code: that of the error if all failed, 3 if only some did.

    ``done`` gives the sentence to say of one that worked; with ``as_json`` a list with all answers is printed.
    """
    results: list[dict[str, Any]] = []
    errors: list[OutriderError] = []
    for name in names:
        try:
            answer = operation(name)
        except OutriderError as error:
            errors.append(error)
            print_error(error)
            results.append({"name": name, "error": {"code": error.code, "message": error.message, "hint": error.hint}})
        else:
            results.append({"name": name, "error": None, "result": plain(answer)})
            if not as_json:
                note(done(name, answer))
    if as_json:
        emit_json(results)
    if not errors:
        return DONE
    return exit_code(errors[0]) if len(errors) == len(names) else SOME_FAILED
