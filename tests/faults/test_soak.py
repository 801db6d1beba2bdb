"""A short soak, so that the long one works when somebody needs it."""

from __future__ import annotations

import os

import pytest

from tests.faults.soak import soak


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(os.geteuid() != 0, reason="a killed agent leaves what only root can look into")
def test_a_minute_of_kills_and_cuts_under_load_loses_and_repeats_nothing_and_leaves_everything_flat() -> None:
    said: list[str] = []
    found = soak(1.0, seed=3, say=said.append)
    assert not found["problems"], found
    assert (found["lost"], found["ran_twice"]) == (0, 0)
    assert found["runs"] > 5
    assert sum(found["kills"].values()) > 0
