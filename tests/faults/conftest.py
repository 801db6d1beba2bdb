"""Fault tests share one launcher; each has a rig of its own, checked by its test."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.launcher import Launcher
from tests.faults.rig import TALLY, Rig

SPREAD = ("test_agent_kills.py", "test_server_commits.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """`make faults` spreads single tests over workers; those of a file that share something costly stay together."""
    if config.getoption("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if file.endswith(SPREAD) else file

    return Scheduling(config, log)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # workers inherit it
        os.environ[TALLY] = tempfile.mkstemp(prefix="outrider-faults-")[1]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What was done to all servers and agents; lost or done twice would have failed the test that found it."""
    if hasattr(config, "workerinput"):
        return
    tally = Path(os.environ[TALLY])
    total: Counter[str] = Counter()
    for line in tally.read_text().splitlines():
        total.update(json.loads(line))
    tally.unlink()
    if total:
        terminalreporter.write_line(f"{total['kills']} kills of servers and agents, {total['runs']} runs accepted")


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """What starts agents and servers without importing everything anew."""
    made = Launcher()
    yield made
    made.close()


@pytest.fixture
def rig(launcher: Launcher) -> Iterator[Rig]:
    """A server and an agent of this test's own, online."""
    with Rig.start(launcher=launcher) as made:
        yield made
