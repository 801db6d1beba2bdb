"""The contract between Outrider and the program inside a step image, in Python. Standard library only.

from outrider_stepkit import Step, main

def greet(step: Step) -> None:
    step.output(greeting=f"hello {step.params['name']}")

main(greet)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from outrider_stepkit.masking import Masker
from outrider_stepkit.meter import Meter
from outrider_stepkit.moves import uninterrupted
from outrider_stepkit.patterns import Selection
from outrider_stepkit.program import main
from outrider_stepkit.publish import free_bytes, staged_directory, staged_file, write_error
from outrider_stepkit.step import Cancelled, Step, StepFailure

if TYPE_CHECKING:
    from outrider_stepkit.checksums import HashingReader, sha256_of
    from outrider_stepkit.control import ControlClient, ControlError
    from outrider_stepkit.network import AddressGuard

__all__ = [
    "AddressGuard",
    "Cancelled",
    "ControlClient",
    "ControlError",
    "HashingReader",
    "Masker",
    "Meter",
    "Selection",
    "Step",
    "StepFailure",
    "free_bytes",
    "main",
    "sha256_of",
    "staged_directory",
    "staged_file",
    "uninterrupted",
    "write_error",
]

# Imported when they are asked for: what they stand on (http, ssl, email, OpenSSL) is a third of the time to start a
# program.
_LATER = {
    "AddressGuard": "outrider_stepkit.network",
    "ControlClient": "outrider_stepkit.control",
    "ControlError": "outrider_stepkit.control",
    "HashingReader": "outrider_stepkit.checksums",
    "sha256_of": "outrider_stepkit.checksums",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
