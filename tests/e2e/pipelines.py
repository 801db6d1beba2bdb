"""Pipelines for the tests: steps that run a few lines of Python inside a container, looking at what is there."""

from __future__ import annotations

import json
import socket
import subprocess
import textwrap
from typing import Any

import psutil

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


def python(
    name: str, code: str, *arguments: str, when: str = "", with_: dict[str, Any] | None = None, **step: Any
) -> dict[str, Any]:
    """A step that runs ``code`` in the base image; ``arguments`` are its sys.argv[1:], ``when`` its condition.

    ``with_`` goes to the step's parameters, all else to the step itself.
    """
    text = PRELUDE + textwrap.dedent(code)
    parameters = {"image": BASE, "args": ["python3", "-uc", text, *arguments]} | (with_ or {})
    return {"name": name, "uses": "container.run", "with": parameters} | step | ({"if": when} if when else {})


def pipeline(*steps: dict[str, Any], name: str = "test", **top: Any) -> str:
    """The text of a pipeline; JSON is YAML."""
    return json.dumps({"name": name, "steps": steps} | top)


def steps_of(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The steps of a run by name."""
    return {step["name"]: step for step in run["steps"]}


def states_of(run: dict[str, Any]) -> dict[str, str]:
    return {step["name"]: step["state"] for step in run["steps"]}


def engine_address() -> str:
    """The address under which containers reach this machine: that of the engine's bridge."""
    template = '{{index .Options "com.docker.network.bridge.name"}}'
    command = ["docker", "network", "inspect", "bridge", "--format", template]
    bridge = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    for address in psutil.net_if_addrs().get(bridge, []):
        if address.family is socket.AF_INET:
            return str(address.address)
    raise AssertionError("the container engine has no bridge with an IPv4 address")
