"""Pipelines for the tests: steps that run a few lines of Python inside a container, looking at what is there."""

from __future__ import annotations

import json
import textwrap
from typing import Any

BASE = "outrider/base:1"

PRELUDE = """
import json, os, sys, time
def out(**values):
    with open("/outrider/outputs", "a") as file:
        file.write(json.dumps(values) + "\\n")
def wait_for(path):
    end = time.monotonic() + 60
    while not os.path.exists(path):
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)
"""


def python(name: str, code: str, *arguments: str, with_: dict[str, Any] | None = None, **step: Any) -> dict[str, Any]:
    """A step that runs ``code`` in the base image; ``arguments`` are its sys.argv[1:]. Other keys are the step's."""
    text = PRELUDE + textwrap.dedent(code)
    parameters = {"image": BASE, "args": ["python3", "-uc", text, *arguments]} | (with_ or {})
    return {"name": name, "uses": "container.run", "with": parameters} | step


def pipeline(*steps: dict[str, Any], name: str = "test", **top: Any) -> str:
    """The text of a pipeline; JSON is YAML."""
    return json.dumps({"name": name, "steps": steps} | top)


def steps_of(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The steps of a run by name."""
    return {step["name"]: step for step in run["steps"]}


def states_of(run: dict[str, Any]) -> dict[str, str]:
    return {step["name"]: step["state"] for step in run["steps"]}
