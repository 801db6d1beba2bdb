"""What operators decide holds with real processes and a real engine, whoever is away or killed meanwhile."""

from __future__ import annotations

import signal

from outrider.v1 import control_service_pb2 as cs
from outrider.v1 import types_pb2 as types
from tests.faults.rig import Rig, pipeline, step_of

DEAF = "trap '' TERM; while :; do sleep 0.1; done"
"""A step that doesn't hear the stop signal."""


def state_of(run: types.Run) -> str:
    return types.RunState.Name(run.state).removeprefix("RUN_STATE_").lower()


def test_a_cancelled_step_that_ignores_the_stop_signal_is_killed_though_its_agent_was_away(rig: Rig) -> None:
    run_id = rig.execute(pipeline(step_of("deaf", lines=2, then=DEAF), step_of("next")), expected={})
    rig.until_running(run_id, "deaf")
    rig.agent.kill()
    rig.until(lambda: not rig.node().online, what="the node offline")
    rig.cancel(run_id)
    rig.kill_server()  # the wish outlives the server, too
    assert rig.run(run_id).cancel_requested
    assert state_of(rig.run(run_id)) == "running"
    # The first agent that hears of it dies with the cancellation on its disk and nothing done about it.
    rig.start_agent(failpoints="journal.run_cancelled.after=kill")
    assert rig.agent.wait() == -signal.SIGKILL
    rig.start_agent()
    run = rig.ended(run_id)
    assert state_of(run) == "cancelled"
    assert [step.state for step in run.steps] == [types.STEP_STATE_CANCELLED] * 2
    rig.check()


def test_a_retry_goes_on_from_the_failed_step_and_runs_no_finished_one_again(rig: Rig) -> None:
    fails_once = "[ -e /marks/second ] || { touch /marks/second; exit 3; }"
    text = pipeline(step_of("first"), step_of("shaky", then=fails_once), step_of("last"))
    old = rig.execute(text)
    assert state_of(rig.ended(old)) == "failed"
    made = rig.operator.call("RetryRun", cs.RetryRunRequest(run_id=old, reason="a test"))
    run = rig.ended(made.run_id)
    assert state_of(run) == "succeeded", run.failure
    assert [step.from_run for step in run.steps] == [old, "", ""]
    assert not (rig.marks / f"ran-{run.run_id}-first").exists()
    assert (rig.marks / f"ran-{run.run_id}-shaky").read_text() == "1\n"
    entries = rig.operator.call("ListAudit", cs.ListAuditRequest(subject=old)).entries
    assert [(entry.verb, entry.reason) for entry in entries] == [("retry", "a test")]


def test_a_node_is_drained_only_when_its_last_run_is_over_whoever_is_killed_meanwhile(rig: Rig) -> None:
    run_id = rig.execute(pipeline(step_of("slow", held=True)))
    rig.until_running(run_id, "slow")
    node = rig.operator.call("DrainNode", cs.DrainNodeRequest(node_id=rig.node_id, reason="new disk"))
    assert (node.drain.drained, list(node.drain.runs)) == (False, [run_id])
    rig.kill_server()
    rig.agent.kill()
    rig.until(lambda: not rig.node().online, what="the node offline")
    assert not rig.node().drain.drained
    rig.start_agent()
    rig.until_online()
    assert not rig.node().drain.drained
    rig.release("slow")
    assert state_of(rig.ended(run_id)) == "succeeded"
    rig.until(lambda: rig.node().drain.drained, what="the node drained")
    rig.check()


def test_two_runs_of_an_object_never_run_side_by_side_though_the_server_is_killed_between_them(rig: Rig) -> None:
    rig.set_object("game/arena")
    first = rig.execute(pipeline(step_of("a", held=True)), object_="game/arena")
    second = rig.execute(pipeline(step_of("b")), object_="game/arena")
    rig.until_running(first, "a")
    rig.kill_server()
    rig.until(lambda: rig.run(second).reason == f"waits for run {first} of game/arena", what="the second run waiting")
    assert not (rig.marks / f"ran-{second}-b").exists()
    rig.release("a")
    ends = [rig.ended(run_id) for run_id in (first, second)]
    assert [state_of(run) for run in ends] == ["succeeded"] * 2
    assert ends[0].finished_at.ToNanoseconds() <= ends[1].started_at.ToNanoseconds()
    rig.check()
