"""What an unknown outcome does to the rest of a run, and how a run goes on from another one."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent_core.runtimes.fake import FakeRuntime
from outrider.errors import ErrorClass, InvalidInput
from outrider.v1 import types_pb2 as types
from tests.agent_rig import BASE_IMAGE, Rig, rig
from tests.unit.test_agent_runs import hold, pipeline, program, running


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime({BASE_IMAGE: program, "outrider/pause:1": hold}, images=set())


@pytest.fixture
async def agent(tmp_path: Path, runtime: FakeRuntime) -> AsyncIterator[Rig]:
    async with rig(tmp_path / "state", runtime, node_id="n1") as started:
        yield started


async def lose(agent: Rig, runtime: FakeRuntime, run_id: str, step: str) -> None:
    """Stop the engine under the step's container: its exit says nothing then."""
    await agent.until(running(runtime, f"outrider-{run_id}-{step}-1"))
    runtime.stop_engine()
    runtime.start_engine()


def finished(
    name: str, state: types.StepState.ValueType = types.STEP_STATE_SUCCEEDED, **outputs: object
) -> types.StepStatus:
    text = json.dumps(outputs).encode()
    return types.StepStatus(name=name, uses="test.shell", state=state, attempt=3, outputs_json=text, from_run="rold")


async def test_after_an_unknown_step_only_what_always_runs_starts(agent: Rig, runtime: FakeRuntime) -> None:
    run_id = await agent.start(
        pipeline(
            {"name": "a", "do": {"outputs": [{"n": 1}]}},
            {"name": "b", "do": {"hang": True}},
            {"name": "next"},
            {"name": "own", "if": "steps.a.outputs.n == 1"},
            {"name": "on-failure", "if": "failure()"},
            {"name": "on-success", "if": "success()"},
            {"name": "tidy", "if": "always()"},
            {"name": "told", "if": "always() && steps.b.outcome == 'unknown'"},
            {"name": "beside", "needs": ["a"]},
        )
    )
    await agent.until(lambda: agent.told(run_id).states.get("beside") == "succeeded")
    await lose(agent, runtime, run_id, "b")
    run = await agent.end(run_id)
    assert run.state == "unknown"
    assert run.states == {
        "a": "succeeded",
        "b": "unknown",
        "next": "skipped",
        "own": "skipped",
        "on-failure": "skipped",
        "on-success": "skipped",
        "tidy": "succeeded",
        "told": "succeeded",
        "beside": "succeeded",
    }
    assert run.steps["next"].reason == "what became of step b is not known"
    assert run.failure.message == run.steps["b"].failure.message
    assert [name for kind, name in runtime.calls if kind == "create" and "-b-" in name] == [f"outrider-{run_id}-b-1"]


async def test_write_back_sees_that_it_is_unknown_and_leaves_out_what_nobody_knows(
    agent: Rig, runtime: FakeRuntime
) -> None:
    run_id = await agent.start(
        pipeline(
            {"name": "a", "do": {"outputs": [{"n": 1}]}},
            {"name": "b", "do": {"hang": True}},
            writeback=[
                {"attribute": "before", "value": "${{ steps.a.outputs.n }}"},
                {"attribute": "outcome", "value": "${{ steps.b.outcome }}"},
                {"attribute": "port", "value": "${{ steps.b.outputs.port }}"},
                {"attribute": "up", "value": True, "if": "steps.b.outcome == 'succeeded'"},
                {"attribute": "all_well", "value": True, "if": "success()"},
                {"attribute": "went_wrong", "value": True, "if": "failure()"},
                {"attribute": "over", "value": True, "if": "always()"},
            ],
        )
    )
    await lose(agent, runtime, run_id, "b")
    run = await agent.end(run_id)
    assert run.state == "unknown"
    assert run.written == {"before": 1, "outcome": "unknown", "over": True}


async def test_a_failed_step_beside_an_unknown_one_makes_the_run_failed_and_both_are_told(
    agent: Rig, runtime: FakeRuntime
) -> None:
    run_id = await agent.start(
        pipeline({"name": "a", "needs": [], "do": {"hang": True}}, {"name": "b", "needs": [], "do": {"exit": 3}})
    )
    await agent.until(lambda: agent.told(run_id).states.get("b") == "failed")
    await lose(agent, runtime, run_id, "a")
    run = await agent.end(run_id)
    assert (run.state, run.states) == ("failed", {"a": "unknown", "b": "failed"})


async def test_an_idempotent_step_is_tried_again_instead(agent: Rig, runtime: FakeRuntime) -> None:
    run_id = await agent.start(pipeline({"name": "a", "uses": "test.again", "do": {"sleep": 1}}))
    await lose(agent, runtime, run_id, "a")
    run = await agent.end(run_id)
    assert (run.state, run.steps["a"].attempt) == ("succeeded", 2)


async def test_an_unknown_step_is_not_run_again_by_the_next_agent(tmp_path: Path, runtime: FakeRuntime) -> None:
    text = pipeline({"name": "a", "do": {"hang": True}}, {"name": "tidy", "if": "always()", "do": {"hang": True}})
    async with rig(tmp_path / "state", runtime, node_id="n1") as first:
        run_id = await first.start(text)
        await lose(first, runtime, run_id, "a")
        await first.until(running(runtime, f"outrider-{run_id}-tidy-1"))
    async with rig(tmp_path / "state", runtime, node_id="n1") as second:
        await runtime.kill(f"outrider-{run_id}-tidy-1", signal="SIGTERM")
        run = await second.end(run_id)
    assert run.states == {"a": "unknown", "tidy": "failed"}
    made = [name for kind, name in runtime.calls if kind == "create" and run_id in name]
    assert made == [f"outrider-{run_id}-a-1", f"outrider-{run_id}-tidy-1"]


async def test_finished_steps_are_taken_over_and_not_carried_out(agent: Rig, runtime: FakeRuntime) -> None:
    run = await agent.run(
        pipeline(
            {"name": "a", "do": {"exit": 1}},
            {"name": "b", "with": {"script": '{"outputs": [{"seen": ${{ steps.a.outputs.n }}}]}'}},
            writeback=[{"attribute": "n", "value": "${{ steps.a.outputs.n + steps.b.outputs.seen }}"}],
        ),
        finished=[finished("a", n=41)],
    )
    assert run.state == "succeeded", run.failure
    assert run.steps["a"].from_run == "rold"
    assert run.outputs["b"] == {"seen": 41}
    assert run.written == {"n": 82}
    made = [name for kind, name in runtime.calls if kind == "create" and run.run_id in name]
    assert made == [f"outrider-{run.run_id}-b-1"]


async def test_a_run_that_takes_everything_over_only_writes_back(agent: Rig, runtime: FakeRuntime) -> None:
    text = pipeline({"name": "a"}, writeback=[{"attribute": "up", "value": "${{ steps.a.outputs.port }}"}])
    run = await agent.run(text, finished=[finished("a", port=80)])
    assert (run.state, run.written) == ("succeeded", {"up": 80})
    assert not runtime.calls or not [1 for kind, _ in runtime.calls if kind == "create"]


async def test_what_was_taken_over_stays_so_after_a_restart_of_the_agent(tmp_path: Path, runtime: FakeRuntime) -> None:
    text = pipeline({"name": "a", "do": {"exit": 1}}, {"name": "b", "do": {"sleep": 0.3}}, {"name": "c"})
    async with rig(tmp_path / "state", runtime, node_id="n1") as first:
        run_id = await first.start(text, finished=[finished("a", n=1)])
        await first.until(running(runtime, f"outrider-{run_id}-b-1"))
    async with rig(tmp_path / "state", runtime, node_id="n1") as second:
        run = await second.end(run_id)
    assert run.states == {"a": "succeeded", "b": "succeeded", "c": "succeeded"}
    assert not [name for kind, name in runtime.calls if kind == "create" and "-a-" in name]


@pytest.mark.parametrize(
    "taken",
    [finished("nosuch"), finished("a", types.STEP_STATE_UNKNOWN), finished("a", types.STEP_STATE_FAILED)],
    ids=["no such step", "unknown", "failed"],
)
async def test_what_did_not_finish_is_not_taken_over(agent: Rig, taken: types.StepStatus) -> None:
    with pytest.raises(InvalidInput, match="can't take over step"):
        await agent.start(pipeline({"name": "a"}), finished=[taken])
    assert not agent.runs.active


async def test_every_failed_attempt_is_told_with_its_class_and_cause(agent: Rig) -> None:
    do = {"exit": [75, 75, 3], "progress": [{"error": "the bucket is away", "code": "s3_away"}]}
    run = await agent.run(pipeline({"name": "a", "do": do, "retry": {"max": 5, "first_wait": "1ms"}}))
    assert run.state == "failed"
    told = [
        (each.attempt, each.failure.error_class, each.failure.code, each.exit_code, each.tried_again)
        for each in run.steps["a"].errors
    ]
    temporary, permanent = types.ERROR_CLASS_TEMPORARY, types.ERROR_CLASS_PERMANENT
    assert told == [
        (1, temporary, "s3_away", 75, True),
        (2, temporary, "s3_away", 75, True),
        (3, permanent, "s3_away", 3, False),
    ]
    assert all("the bucket is away" in each.failure.message for each in run.steps["a"].errors)
    counts = {(each.operation, each.error_class): each for each in agent.services.operations.all()}
    assert counts["step", ErrorClass.TEMPORARY].retries == 2
    assert counts["step", ErrorClass.PERMANENT].failures == 1


async def test_only_the_last_errors_of_a_step_that_failed_often_are_kept(agent: Rig) -> None:
    exits = [75] * 11 + [0]
    run = await agent.run(pipeline({"name": "a", "do": {"exit": exits}, "retry": {"max": 20, "first_wait": "1ms"}}))
    assert run.state == "succeeded", run.failure
    assert [each.attempt for each in run.steps["a"].errors] == list(range(2, 12))
