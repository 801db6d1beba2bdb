"""SIGKILL to the agent at every transition of its journal, before and after: nothing lost, nothing twice."""

from __future__ import annotations

import pytest

from agent_core.transitions import Transition
from tests.faults.journeys import JOURNEYS, Traveller
from tests.faults.launcher import Launcher
from tests.faults.rig import Rig

SHORT = ("plain", "fenced", "rebuilt")
"""Journeys of the default suite; the others run with the long forms."""


def points_of(name: str) -> list[str]:
    # In one order everywhere: several workers have to collect the same tests.
    found = sorted(JOURNEYS[name].comes_by, key=lambda each: each.name)
    return [point for each in found for point in (each.before, each.after)]


def test_every_transition_has_a_journey() -> None:
    covered = set[Transition]().union(*(journey.comes_by for journey in JOURNEYS.values()))
    missing = sorted(each.name for each in set(Transition) - covered)
    assert not missing, f"no fault test kills an agent at {missing}: add them to a journey in tests/faults/journeys.py"


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in JOURNEYS]
)
def test_an_agent_killed_at_every_transition_loses_nothing_and_does_nothing_twice(
    name: str, launcher: Launcher
) -> None:
    journey = JOURNEYS[name]
    with Rig.start(launcher=launcher) as rig:
        traveller = Traveller(rig, points_of(name))
        traveller.again()
        traveller.everything(lambda: journey.goes(traveller))
        assert sorted(set(traveller.deaths) & set(points_of(name))) == sorted(points_of(name))
        journey.check(rig)


@pytest.mark.long
@pytest.mark.parametrize(("name", "point"), [(name, point) for name in JOURNEYS for point in points_of(name)])
def test_an_agent_killed_at_one_transition_loses_nothing_and_does_nothing_twice(
    name: str, point: str, launcher: Launcher
) -> None:
    journey = JOURNEYS[name]
    with Rig.start(launcher=launcher) as rig:
        traveller = Traveller(rig, [point])
        traveller.again()
        traveller.everything(lambda: journey.goes(traveller))
        assert point in traveller.deaths
        journey.check(rig)
