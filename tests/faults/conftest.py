"""Fault tests share one launcher; each has a rig of its own, checked by its test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.launcher import Launcher
from tests.faults.rig import Rig


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
