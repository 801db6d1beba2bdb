"""What waits in the outbox of one run travels as one report."""

from __future__ import annotations

from agent_core.differences import Differences
from agent_core.outbox import Item
from outrider.v1 import node_service_pb2 as pb
from outrider.v1 import types_pb2 as types

RUNNING, SUCCEEDED, FAILED = types.STEP_STATE_RUNNING, types.STEP_STATE_SUCCEEDED, types.STEP_STATE_FAILED


def item(sequence: int, run_id: str, steps: dict[str, int], *, lease: str = "l1", **more: object) -> Item:
    report = pb.RunReport(
        run_id=run_id,
        lease_id=lease,
        steps=[types.StepStatus(name=name, state=state) for name, state in steps.items()],
        **more,
    )
    return Item(sequence, "run_report", run_id, report.SerializeToString())


def states(report: pb.RunReport) -> dict[str, int]:
    return {step.name: step.state for step in report.steps}


def test_later_states_replace_earlier_ones_and_the_rest_is_kept() -> None:
    differences = Differences()
    failure = types.Failure(code="c", message="m")
    differences.add(item(4, "r1", {"a": RUNNING}, state=types.RUN_STATE_RUNNING))
    differences.add(item(5, "r1", {"a": FAILED, "b": RUNNING}, failure=failure))
    differences.add(item(7, "r1", {"b": SUCCEEDED}, state=types.RUN_STATE_FAILED))
    [(report, sequences)] = differences.take()
    assert (report.sequence, sequences) == (7, [4, 5, 7])
    assert states(report) == {"a": FAILED, "b": SUCCEEDED}
    assert (report.state, report.failure) == (types.RUN_STATE_FAILED, failure)
    assert differences.take() == []


def test_runs_and_leases_stay_apart_and_in_order() -> None:
    differences = Differences()
    differences.add(item(1, "r1", {"a": RUNNING}))
    differences.add(item(2, "r2", {"a": RUNNING}))
    differences.add(item(3, "r1", {"a": SUCCEEDED}))
    differences.add(item(4, "r1", {"a": RUNNING}, lease="l2"))
    assert [(r.run_id, r.lease_id, r.sequence, s) for r, s in differences.take()] == [
        ("r1", "l1", 3, [1, 3]),
        ("r2", "l1", 2, [2]),
        ("r1", "l2", 4, [4]),
    ]
