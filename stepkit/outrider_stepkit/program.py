"""The frame of a step's program: from start to exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import NoReturn, TextIO, cast

from outrider_stepkit.masking import MaskedStream, Masker, secret_values
from outrider_stepkit.publish import write_error
from outrider_stepkit.step import Cancelled, Step, StepFailure

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_TEMPORARY = 75
EXIT_CANCELLED = 128 + signal.SIGTERM

StepFunction = Callable[[Step], None]


def main(function: StepFunction | Mapping[str, StepFunction]) -> NoReturn:
    """Load the step, run ``function`` with it, and exit as the contract says. Never returns.

    A mapping chooses by the plan's first argument: ``main({"extract": extract, "create": create})``.

    StepFailure ends the step with its sentence. An OSError about a path is put in a sentence as well. Any other
    exception is a defect of the program: its kind and text are the cause, and the traceback goes to the log.
    SIGTERM raises Cancelled in the main thread, so that ``with`` and ``finally`` clean up.
    """
    step: Step | None = None
    masker = Masker(secret_values(os.environ))
    secrets: set[str] = set()
    out, err = sys.stdout, sys.stderr
    streams = [MaskedStream(out, masker, secrets), MaskedStream(err, masker, secrets)]
    sys.stdout, sys.stderr = cast("TextIO", streams[0]), cast("TextIO", streams[1])
    signal.signal(signal.SIGTERM, _cancel)
    unraisable, sys.unraisablehook = sys.unraisablehook, _not_raised
    try:
        step = Step.load()
        step.secrets = secrets
        _choose(function, step)(step)
        code = EXIT_DONE
    except Cancelled:
        code = _end(step, masker, StepFailure("cancelled", code="cancelled"), EXIT_CANCELLED)
    except KeyboardInterrupt:
        code = _end(step, masker, StepFailure("interrupted", code="cancelled"), EXIT_CANCELLED)
    except StepFailure as failure:
        code = _end(step, masker, failure, EXIT_TEMPORARY if failure.temporary else EXIT_FAILED)
    except OSError as error:
        code = _end(step, masker, write_error(error), EXIT_FAILED)
    except MemoryError:
        message = "the step's memory limit is too small for it: raise resources.memory"
        code = _end(step, masker, StepFailure(message, code="memory"), EXIT_FAILED)
    except Exception as error:
        import traceback  # a program that works needs none

        traceback.print_exc()
        code = _end(step, masker, StepFailure(f"{type(error).__name__}: {error}", code="defect"), EXIT_FAILED)
    for stream in streams:
        stream.finish()
    sys.stdout, sys.stderr, sys.unraisablehook = out, err, unraisable
    sys.exit(code)


def _choose(function: StepFunction | Mapping[str, StepFunction], step: Step) -> StepFunction:
    if callable(function):
        return function
    name = step.args[0] if step.args else ""
    if name not in function:
        raise StepFailure(f"the program has no {name!r}; it has {', '.join(function)}", code="bad_arguments")
    return function[name]


def _cancel(_signal: int, _frame: FrameType | None) -> None:
    # Only once: the clean-up that it starts must not be interrupted by a second signal. SIGKILL follows anyway.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Cancelled


def _not_raised(lost: sys.UnraisableHookArgs) -> None:
    # A hook of fork or a finalizer ran when the signal came: Python drops what is raised there, and the step would go
    # on to its end. So it comes once more, a moment later.
    if lost.exc_type is Cancelled:
        signal.signal(signal.SIGALRM, _cancel)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
    else:
        sys.__unraisablehook__(lost)


def _end(step: Step | None, masker: Masker, failure: StepFailure, code: int) -> int:
    if step is not None:
        masker.add(step.secrets)
    masked = StepFailure(masker.mask(str(failure)), code=failure.code)
    print(f"error: {masked}", file=sys.stderr)
    if step is not None:
        try:
            step.report_failure(masked)
        except OSError as error:
            print(f"error: the cause could not be written to {step.directory}: {error}", file=sys.stderr)
    return code
