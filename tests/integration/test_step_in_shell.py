"""examples/outrider-step-snapshot: a step whose program is a shell script keeps what the kit asks of every step."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "outrider-step-snapshot"

pytestmark = pytest.mark.skipif(
    subprocess.run(["docker", "image", "inspect", "outrider/base:1"], capture_output=True).returncode != 0,
    reason="the image outrider/base:1 is not built (make images)",
)

sys.path.append(str(FOLDER))  # as if it were installed
_SPEC = importlib.util.spec_from_file_location("snapshot_conformance", FOLDER / "tests" / "test_conformance.py")
assert _SPEC is not None
assert _SPEC.loader is not None
_SUITE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_SUITE)
step_environment = _SUITE.step_environment


class TestSnapshotTake(_SUITE.TestTake):  # type: ignore[misc, name-defined]  # a class of a module found by its path
    folder = FOLDER
