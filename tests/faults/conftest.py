"""Fault tests share one launcher; each has a rig of its own, checked by its test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.launcher import Launcher
from tests.faults.rig import Rig

HERE = Path(__file__).parent
SPREAD = ("test_agent_kills.py", "test_server_commits.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make faults` spreads single tests over workers; those that share something costly stay together."""
    for item in items:
        if item.path.parent == HERE and item.path.name not in SPREAD:
            item.add_marker(pytest.mark.xdist_group(item.path.name))


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
