"""Whom a step's container runs as, and what it may reach as that user."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from agent_core.orders import AttemptOrder
from agent_core.volumes import AllottedVolume
from outrider.steps import Resources, StepPlan


def order(user: str | None) -> AttemptOrder:
    return AttemptOrder(
        run_id="r1", lease_id="l1", step="a", number=1,
        plan=StepPlan(image="x", user=user), plan_sha256="", inputs=b"{}",
        env={}, secrets=(), volumes={}, uid=200001, gid=200002, resources=Resources(), object_ref=None, timeout_s=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("user", "runs_as", "groups"),
    [(None, (200001, 200002), ()), ("1234:5678", (1234, 5678), (200002,)), ("1234", (1234, 200002), ())],
)
def test_a_user_of_its_own_keeps_the_group_that_volumes_belong_to(
    user: str | None, runs_as: tuple[int, int], groups: tuple[int, ...]
) -> None:
    made = order(user)
    spec = made.spec(node_id="n1", directory=Path("/x"), network="none", log_max_bytes=1)
    assert made.runs_as == runs_as
    assert spec.user == f"{runs_as[0]}:{runs_as[1]}"
    assert spec.groups == groups


def test_volumes_that_another_user_writes_to_are_to_be_shared() -> None:
    saves, build = AllottedVolume("saves", "/v/saves", "none"), AllottedVolume("build", "/v/build", "none")
    volumes = {"saves": (saves, "/saves", True), "build": (build, "/build", False)}
    assert replace(order("1234"), volumes=volumes).shared == ["/v/saves"]
    assert replace(order(None), volumes=volumes).shared == []
