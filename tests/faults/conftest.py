"""Fault tests share one launcher; each has a rig of its own, checked by its test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults.launcher import Launcher
from tests.faults.rig import Rig

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
