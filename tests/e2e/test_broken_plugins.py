"""A node with every broken plugin at once: it runs its steps, and says of each what is wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Dev, start_dev, stop_dev
from tests.plugin_fixtures import NAMES, install

# One ends the process, and is found out at the next start: tests/unit/cli/test_plugin_doctor.py.
APART = {"ends-process"} | {"hanging-import", "hook-hangs"}  # one that is slow is enough here
INSTALLED = sorted(set(NAMES) - APART)


@pytest.fixture
def broken(tmp_path: Path) -> Iterator[Dev]:
    site = install(tmp_path / "site", *INSTALLED)
    dev = start_dev(tmp_path / "dev", PYTHONPATH=str(site), OUTRIDER_AGENT_PLUGIN_LIMIT_S="2")
    yield dev
    stop_dev(dev)


def test_a_node_with_every_broken_plugin_does_its_work_and_names_them(broken: Dev) -> None:
    run = broken.run(
        "name: p\nsteps:\n"
        "  - {name: one, uses: container.run, with: {image: 'outrider/base:1', args: [echo, hello]}}\n"
        "  - {name: two, uses: container.run, with: {image: 'outrider/base:1', args: [sh, -c, 'exit 9']}}\n"
    )
    assert [step["state"] for step in run["steps"]] == ["succeeded", "failed"]

    listed = broken.outrider("plugin", "list", "--node", "dev", "-o", "json")
    assert listed.returncode == 1
    plugins = {(each["name"], each["distribution"]): each for each in json.loads(listed.stdout)}
    for ours in ("s3", "http", "archive", "container"):
        assert plugins[ours, f"outrider-step-{ours}"]["state"] == "ok"
    assert plugins["contract-newer", "outrider-fixture-contract-newer"]["contract"] == ">=2,<3"
    assert plugins["", "outrider_fixture_torn-1.0"]["fix"] == "install it anew, or remove that directory"
    misspelt = plugins["misspelt-hook", "outrider-fixture-misspelt-hook"]
    assert (misspelt["state"], misspelt["fix"]) == ("error", "did you mean outrider_step_types?")
    errors = [each for each in plugins.values() if each["state"] == "error"]
    assert len(errors) >= 40
    assert all(each["distribution"] and each["error"] and each["fix"] for each in errors)

    # Its hooks fail around each step; that is told, and nothing more comes of it.
    deadline = time.monotonic() + 30
    told: set[str] = set()
    while len(told) < 4 and time.monotonic() < deadline:
        lines = broken.ok("events", "-o", "json").splitlines()
        events = [json.loads(line) for line in lines]
        told = {each["data"]["hook"] for each in events if each["type"] == "plugin.hook_failed"}
    assert told == {
        "outrider_before_step",
        "outrider_after_step",
        "outrider_classify_failure",
        "outrider_node_facts",
    }
    assert broken.process.poll() is None
