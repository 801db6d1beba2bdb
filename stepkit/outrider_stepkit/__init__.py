"""The contract between Outrider and the program inside a step image, in Python. Standard library only.

from outrider_stepkit import Step, main

def greet(step: Step) -> None:
    step.output(greeting=f"hello {step.params['name']}")

main(greet)
"""

from outrider_stepkit.checksums import HashingReader, sha256_of
from outrider_stepkit.control import ControlClient, ControlError
from outrider_stepkit.masking import Masker
from outrider_stepkit.meter import Meter
from outrider_stepkit.network import AddressGuard
from outrider_stepkit.patterns import Selection
from outrider_stepkit.program import main
from outrider_stepkit.publish import free_bytes, staged_directory, staged_file, write_error
from outrider_stepkit.step import Cancelled, Step, StepFailure

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
    "write_error",
]
