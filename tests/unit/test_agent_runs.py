"""What a run does, step by step, on the fake engine."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from agent_core.journal import Journal
from agent_core.policy import NodePolicy
from agent_core.runtimes.fake import FakeProcess, FakeRuntime
from agent_core.state import Cancellation, Clock, State, migrations
from agent_core.transitions import Transition
from outrider._pipeline_refs import OBJECT_MEMBERS, RUN_MEMBERS
from outrider.errors import Conflict, InvalidInput
from outrider.v1 import node_service_pb2 as pb
from outrider.v1 import types_pb2 as types
from tests.agent_rig import BASE_IMAGE, Rig, rig


def outrider_of(process: FakeProcess) -> Path:
    return next(Path(mount.source) for mount in process.spec.mounts if mount.target == "/outrider")


async def program(process: FakeProcess) -> int:
    """The "script" of a step is a little JSON: what to print, to output, to say, to wait for, how to exit."""
    order = json.loads(process.spec.args[0])
    attempt = int(process.spec.env["OUTRIDER_ATTEMPT"])
    for text in order.get("print", []):
        process.write(text.encode())
    if "env" in order:
        process.write(process.spec.env[order["env"]].encode())
    if "outputs_from" in order:
        order["outputs"] = json.loads(Path(order["outputs_from"]).read_text())
    directory = outrider_of(process)
    with (directory / "outputs").open("a") as file:
        for line in order.get("outputs", []):
            file.write((line if isinstance(line, str) else json.dumps(line)) + "\n")
    with (directory / "progress").open("a") as file:
        for line in order.get("progress", []):
            file.write(json.dumps(line) + "\n")
    if order.get("hang"):
        await process.signalled.wait()
        return 143
    await asyncio.sleep(order.get("sleep", 0))
    exits = order.get("exit", 0)
    return exits[min(attempt, len(exits)) - 1] if isinstance(exits, list) else exits


def pipeline(*steps: dict[str, object], **more: object) -> str:
    """A pipeline in JSON, which is YAML. ``do`` of a step is its program's order."""
    items = []
    for step in steps:
        do = step.pop("do", {})
        items.append({"uses": "test.shell", "with": {"script": json.dumps(do)}, **step})
    return json.dumps({"name": "p", **more, "steps": items})


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime({BASE_IMAGE: program, "outrider/pause:1": hold}, images=set())


async def hold(process: FakeProcess) -> int:
    await process.signalled.wait()
    return 0


@pytest.fixture
async def agent(tmp_path: Path, runtime: FakeRuntime) -> AsyncIterator[Rig]:
    async with rig(tmp_path / "state", runtime, node_id="n1") as started:
        yield started


async def test_steps_run_in_order_and_hand_on_outputs(agent: Rig) -> None:
    text = pipeline(
        {"name": "a", "do": {"outputs": [{"n": 41}, {"n": 42}]}},
        {"name": "b", "with": {"script": '{"outputs": [{"seen": ${{ steps.a.outputs.n }}}]}'}},
        writeback=[{"attribute": "n", "value": "${{ steps.b.outputs.seen }}"}],
    )
    run = await agent.run(text)
    assert run.state == "succeeded", run.failure
    assert run.outputs == {"a": {"n": 42}, "b": {"seen": 42}}
    assert run.written == {"n": 42}


@pytest.mark.parametrize(("root", "members"), [("run", RUN_MEMBERS), ("object", OBJECT_MEMBERS)])
async def test_whatever_the_loader_lets_through_has_a_value_on_the_node(
    agent: Rig, root: str, members: tuple[str, ...]
) -> None:
    entries = [{"attribute": member, "value": f"${{{{ {root}.{member} }}}}"} for member in members]
    thing = types.Object(ref=types.ObjectRef(kind="game", name="a"), attributes_json=b"{}", version=1)
    run = await agent.run(pipeline({"name": "a"}, writeback=entries), object=thing, sequence=7)
    assert run.state == "succeeded", run.failure
    assert sorted(run.written) == sorted(members)


async def test_what_was_written_back_is_told_before_the_end(agent: Rig) -> None:
    await agent.run(pipeline({"name": "a"}, writeback=[{"attribute": "x", "value": 1}]))
    kinds = [item.kind for item in agent.services.outbox.read(("run_report", "write_back"))]
    assert kinds.index("write_back") < len(kinds) - 1


async def test_a_failed_step_skips_what_needs_it_but_not_the_clean_up(agent: Rig) -> None:
    run = await agent.run(
        pipeline(
            {"name": "a", "do": {"exit": 3, "progress": [{"error": "the disk melted", "code": "melted"}]}},
            {"name": "b"},
            {"name": "c", "if": "failure()"},
            {"name": "d", "if": "always()"},
            writeback=[
                {"attribute": "how", "value": "${{ steps.a.outcome }}"},
                {"attribute": "no", "value": "${{ steps.a.outputs.x }}"},
            ],
        )
    )
    assert run.state == "failed"
    assert run.states == {"a": "failed", "b": "skipped", "c": "succeeded", "d": "succeeded"}
    assert run.failure.message == "step a failed: the disk melted"
    assert (run.failure.code, run.steps["a"].exit_code) == ("melted", 3)
    assert run.written == {"how": "failed"}


async def test_exit_75_is_tried_again_as_often_as_the_step_says(agent: Rig) -> None:
    retry = {"max": 2, "first_wait": "1ms"}
    run = await agent.run(pipeline({"name": "a", "do": {"exit": [75, 75, 0]}, "retry": retry}))
    assert (run.state, run.steps["a"].attempt) == ("succeeded", 3)
    run = await agent.run(pipeline({"name": "a", "do": {"exit": [75, 75, 75, 0]}, "retry": retry}))
    assert (run.state, run.steps["a"].attempt) == ("failed", 3)


async def test_a_permanent_failure_is_not_tried_again(agent: Rig) -> None:
    run = await agent.run(pipeline({"name": "a", "do": {"exit": [1, 0]}, "retry": {"max": 3}}))
    assert (run.state, run.steps["a"].attempt) == ("failed", 1)


async def test_a_step_that_takes_too_long_is_stopped(agent: Rig) -> None:
    run = await agent.run(pipeline({"name": "a", "do": {"hang": True}, "timeout": "100ms"}))
    assert run.steps["a"].failure.code == "step_timeout"
    assert run.state == "failed"


async def test_independent_steps_run_side_by_side(agent: Rig, runtime: FakeRuntime) -> None:
    text = pipeline(*({"name": name, "needs": [], "do": {"sleep": 0.3}} for name in "abcd"))
    started = asyncio.get_running_loop().time()
    run = await agent.run(text)
    assert run.state == "succeeded"
    assert asyncio.get_running_loop().time() - started < 0.9
    assert len([name for kind, name in runtime.calls if kind == "create" and "pause" in name]) == 4


async def test_cancel_stops_what_runs_and_starts_nothing_more(agent: Rig, runtime: FakeRuntime) -> None:
    run_id = await agent.start(
        pipeline({"name": "a", "do": {"hang": True}}, {"name": "b"}, {"name": "c", "if": "always()"})
    )
    await agent.until(running(runtime, f"outrider-{run_id}-a-1"))
    await agent.cancel(run_id)
    run = await agent.end(run_id)
    assert run.state == "cancelled"
    assert run.states == {"a": "cancelled", "b": "cancelled", "c": "succeeded"}


def running(runtime: FakeRuntime, name: str) -> Callable[[], Awaitable[bool]]:
    async def look() -> bool:
        return any(info.name == name and info.state == "running" for info in await runtime.list())

    return look


async def test_the_timeout_of_a_run_ends_it(agent: Rig) -> None:
    run = await agent.run(pipeline({"name": "a", "do": {"hang": True}}), timeout_s=0.2)
    assert (run.state, run.failure.code) == ("failed", "run_timeout")


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (["[1]"], "outputs_invalid"),
        (["{"], "outputs_invalid"),
        (['{"a": NaN}'], "outputs_invalid"),
        (["[" * 100_000], "outputs_invalid"),
        ([{"a": "x" * 70_000}], "outputs_too_long"),
        ([{"a": "x" * 1_100_000}], "outputs_too_long"),
    ],
)
async def test_outputs_that_break_the_contract_fail_the_step(
    agent: Rig, tmp_path: Path, lines: list[object], code: str
) -> None:
    path = tmp_path / "lines"
    path.write_text(json.dumps(lines))
    run = await agent.run(pipeline({"name": "a", "do": {"outputs_from": str(path)}}))
    assert run.steps["a"].failure.code == code


async def test_outputs_that_the_step_type_did_not_promise_fail_the_step(agent: Rig) -> None:
    run = await agent.run(pipeline({"name": "a", "uses": "test.word", "do": {"outputs": [{"word": 1}]}}))
    assert run.steps["a"].failure.code == "outputs_invalid"
    assert "word" in run.steps["a"].failure.message


async def test_outputs_are_not_read_through_a_link(tmp_path: Path, runtime: FakeRuntime) -> None:
    secret = tmp_path / "shadow"
    secret.write_text('{"stolen": "root"}')

    async def link(process: FakeProcess) -> int:
        path = outrider_of(process) / "outputs"
        path.unlink()
        path.symlink_to(secret)
        return 0

    runtime.programs[BASE_IMAGE] = link
    async with rig(tmp_path / "state", runtime) as agent:
        run = await agent.run(pipeline({"name": "a"}))
    assert run.steps["a"].failure.code == "outputs_invalid"
    assert not run.outputs["a"]


async def test_a_pipe_in_place_of_outputs_blocks_nobody(tmp_path: Path, runtime: FakeRuntime) -> None:
    async def pipe(process: FakeProcess) -> int:
        path = outrider_of(process) / "outputs"
        path.unlink()
        os.mkfifo(path)
        return 0

    runtime.programs[BASE_IMAGE] = pipe
    async with rig(tmp_path / "state", runtime) as agent:
        run = await agent.run(pipeline({"name": "a"}))
    assert run.steps["a"].failure.code == "outputs_invalid"


SECRET = "hunter2-and-more"
ENVS = {"envs": [{"set": "store"}]}


async def test_secrets_are_masked_in_logs_and_refused_in_outputs(agent: Rig) -> None:
    agent.link.values = {"store.KEY": SECRET}
    agent.link.secret_names = {"store.KEY"}
    step = {"name": "a", "envs": {"KEY": "store.KEY"}, "do": {"print": ["key="], "env": "KEY"}}
    run = await agent.run(pipeline(step, **ENVS))
    assert run.state == "succeeded", run.failure
    assert SECRET.encode() not in agent.log(run.run_id, "a")
    assert agent.log(run.run_id, "a").startswith(b"key=")
    step = {"name": "a", "envs": {"KEY": "store.KEY"}, "do": {"outputs": [{"x": f"a{SECRET}b"}]}}
    run = await agent.run(pipeline(step, **ENVS))
    assert run.steps["a"].failure.code == "secret_in_outputs"
    everything = b"".join(item.body for item in agent.services.outbox.read(("run_report", "event"), limit=1000))
    assert SECRET.encode() not in everything.replace(json.dumps(step).encode(), b"")


async def test_outputs_may_have_what_the_step_type_says_is_no_secret(agent: Rig) -> None:
    agent.link.values = {"store.NAME": "an-account", "store.KEY": SECRET}
    agent.link.secret_names = {"store.NAME", "store.KEY"}

    async def outcome(text: str, uses: str = "test.public", **envs: str) -> str | None:
        step = {"name": "a", "uses": uses, "envs": envs, "do": {"outputs": [{"x": text}]}}
        run = await agent.run(pipeline(step, **ENVS))
        return None if run.state == "succeeded" else run.steps["a"].failure.code

    both = {"NAME": "store.NAME", "KEY": "store.KEY"}
    assert await outcome("by an-account", **both) is None
    assert await outcome(f"an-account {SECRET}", **both) == "secret_in_outputs"
    assert await outcome("by an-account", "test.shell", **both) == "secret_in_outputs"
    # Nor what it was not allotted, and what is a secret by its other name as well.
    assert await outcome("by an-account", KEY="store.KEY") == "secret_in_outputs"
    assert await outcome(SECRET, NAME="store.KEY", KEY="store.KEY") == "secret_in_outputs"


async def test_a_step_waits_for_its_envs_and_says_so(agent: Rig) -> None:
    agent.link.connected.clear()
    agent.link.values = {"store.KEY": "v"}
    run_id = await agent.start(
        pipeline({"name": "free"}, {"name": "a", "needs": [], "envs": {"KEY": "store.KEY"}}, **ENVS)
    )
    await agent.until(lambda: agent.told(run_id).states.get("a") == "waiting")
    await agent.until(lambda: agent.told(run_id).states["free"] == "succeeded")
    assert agent.told(run_id).steps["a"].reason == "envs"
    agent.link.connected.set()
    assert (await agent.end(run_id)).state == "succeeded"


async def test_the_next_agent_waits_for_envs_only_for_what_is_left_of_the_timeout(
    tmp_path: Path, runtime: FakeRuntime
) -> None:
    text = pipeline({"name": "a", "timeout": "2s", "envs": {"K": "s.K"}}, envs=[{"set": "s"}])
    run = ""
    for _ in range(2):
        async with rig(tmp_path / "state", runtime, node_id="n1", connected=False) as agent:
            run = run or await agent.start(text)
            await agent.until(lambda agent=agent, run=run: agent.told(run).states.get("a") == "waiting")
            await asyncio.sleep(0.7)
    async with rig(tmp_path / "state", runtime, node_id="n1", connected=False) as agent:
        began = time.monotonic()
        ended = await agent.end(run)
    assert (ended.states["a"], ended.steps["a"].failure.code) == ("failed", "step_timeout")
    assert time.monotonic() - began < 1.6


async def test_a_wait_for_envs_counts_over_a_reboot(tmp_path: Path) -> None:
    class Boot(Clock):
        time = 1000.0

        def now(self) -> float:
            return type(self).time

    journal = Journal(tmp_path / "journal.db", migrations())
    before, after = State(journal, Boot("one")), State(journal, Boot("two"))
    steps = [types.StepStatus(name="a")]
    await before.commit(Transition.RUN_ACCEPTED, before.accept_run(pb.RunPipeline(run_id="r", lease_id="l"), steps))
    await before.commit(Transition.STEP_WAITING, before.step_ready("r", "a", 990.0))
    await before.commit(Transition.STEP_WAITING, before.step_ready("r", "a", 999.0))  # the next agent: it has waited
    await before.note_time()
    Boot.time = 7.0
    await after.note_time()
    Boot.time += 20
    record = after.find("r")
    assert record is not None
    step = record.steps["a"]
    assert step.ready_boot_id is not None
    assert step.ready_spent_s + after.clock.since(step.ready_boot_id, step.ready_clock) == 30
    await after.commit(Transition.ATTEMPT_INTENDED, after.attempt_intent("r", "a", 1, "c", ""))
    record = after.find("r")
    assert record is not None
    assert record.steps["a"].ready_boot_id is None  # a later attempt waits for as long again
    journal.close()


async def test_waiting_for_envs_ends_with_the_steps_timeout(agent: Rig) -> None:
    agent.link.connected.clear()
    step = {"name": "a", "envs": {"KEY": "store.KEY"}, "timeout": "700ms"}
    run = await agent.run(pipeline(step, **ENVS))
    assert run.steps["a"].failure.code == "step_timeout"


async def test_an_image_that_does_not_exist_fails_the_run_before_anything_starts(
    agent: Rig, runtime: FakeRuntime
) -> None:
    bad = {"name": "b", "with": {"image": "no/such:1"}}
    run = await agent.run(pipeline({"name": "a"}, bad))
    assert (run.state, run.failure.code) == ("failed", "image_not_found")
    assert not [name for kind, name in runtime.calls if kind == "create"]


@pytest.mark.parametrize(
    ("step", "code"),
    [
        ({"name": "a", "uses": "no.such"}, "invalid_input"),
        ({"name": "a", "with": {"scrip": "x"}}, "invalid_input"),
        ({"name": "a", "with": {"network": "lan"}}, "network_not_allowed"),
        ({"name": "a", "with": {"script": "${{ args.nope }}"}}, ""),
    ],
)
async def test_what_is_wrong_with_a_step_is_told_before_anything_starts(
    agent: Rig, runtime: FakeRuntime, step: dict[str, object], code: str
) -> None:
    text = json.dumps({"name": "p", "steps": [{"name": "z", "uses": "test.shell"}, {"uses": "test.shell", **step}]})
    try:
        run = await agent.run(text)
    except InvalidInput:
        assert code == ""
    else:
        assert run.state == "failed"
        assert not code or run.failure.code == code
        assert set(run.states.values()) == {"skipped"}
    assert not [name for kind, name in runtime.calls if kind == "create"]


async def test_too_much_output_fails_the_step_clearly(tmp_path: Path, runtime: FakeRuntime) -> None:
    async def chatter(process: FakeProcess) -> int:
        for _ in range(40):
            process.write(b"x" * 100_000)
            await asyncio.sleep(0.001)
        await process.signalled.wait()
        return 137

    runtime.programs[BASE_IMAGE] = chatter
    policy = NodePolicy.model_validate({"warm_none": 0, "networks": {}, "limits": {"step_log_bytes": 1024**2}})
    async with rig(tmp_path / "state", runtime, policy=policy) as agent:
        run = await agent.run(pipeline({"name": "a"}))
        assert run.steps["a"].failure.code == "output_limit"
        assert len(agent.log(run.run_id, "a")) == 1024**2
        assert run.steps["a"].stdout_bytes > 1024**2  # the gap counts


async def test_the_last_progress_is_told(agent: Rig) -> None:
    await agent.run(pipeline({"name": "a", "do": {"progress": [{"done": 1, "total": 4}, {"done": 3, "total": 4}]}}))
    last = agent.progress[-1].steps[0].progress
    assert (last.done, last.total) == (3, 4)


async def test_hooks_hear_of_every_attempt(agent: Rig) -> None:
    await agent.run(pipeline({"name": "a", "do": {"exit": [75, 0]}, "retry": {"max": 1, "first_wait": "1ms"}}))
    assert agent.plugin.before == ["test.shell", "test.shell"]
    assert agent.plugin.after == [False, True]


async def test_a_missing_engine_is_waited_for(agent: Rig, runtime: FakeRuntime) -> None:
    runtime.stop_engine()
    run_id = await agent.start(pipeline({"name": "a"}))
    await agent.until(lambda: agent.told(run_id).steps["a"].reason == "engine")
    assert not agent.services.engine.ok
    runtime.start_engine()
    run = await agent.end(run_id)
    assert run.state == "succeeded", run.failure


@pytest.mark.parametrize(("uses", "state", "attempts"), [("test.shell", "unknown", 1), ("test.again", "succeeded", 2)])
async def test_an_engine_that_stops_leaves_the_outcome_unknown_unless_the_step_can_be_done_again(
    agent: Rig, runtime: FakeRuntime, uses: str, state: str, attempts: int
) -> None:
    run_id = await agent.start(pipeline({"name": "a", "uses": uses, "do": {"sleep": 0.5}}, {"name": "b"}))
    await agent.until(running(runtime, f"outrider-{run_id}-a-1"))
    await asyncio.sleep(0.05)
    runtime.stop_engine()
    await asyncio.sleep(0.2)
    runtime.start_engine()
    run = await agent.end(run_id)
    assert (run.states["a"], run.steps["a"].attempt) == (state, attempts)
    assert run.states["b"] == ("skipped" if state == "unknown" else "succeeded")
    assert run.state == state


async def test_a_finished_run_leaves_nothing_but_what_the_server_must_learn(
    agent: Rig, runtime: FakeRuntime, tmp_path: Path
) -> None:
    text = pipeline({"name": "a", "volumes": {"v": "/v:rw"}}, volumes={"v": {}})
    run = await agent.run(text)
    assert run.state == "succeeded", run.failure
    await agent.services.netpool.settle()

    async def nothing_left() -> bool:
        return not await runtime.list()

    await agent.until(nothing_left)
    await agent.until(lambda: not list((tmp_path / "state" / "attempts").glob("*")))
    assert not list((tmp_path / "state" / "volumes").rglob(run.run_id))


async def test_the_next_agent_adopts_a_running_step(tmp_path: Path, runtime: FakeRuntime) -> None:
    async with rig(tmp_path / "state", runtime, node_id="n1") as first:
        run_id = await first.start(
            pipeline({"name": "a", "do": {"print": ["one\n"], "sleep": 0.6, "outputs": [{"x": 1}]}}, {"name": "b"})
        )
        await first.until(lambda: first.log(run_id, "a") == b"one\n")
    async with rig(tmp_path / "state", runtime, node_id="n1") as second:
        run = await second.end(run_id)
        assert run.state == "succeeded", run.failure
        assert (run.outputs["a"], run.steps["a"].attempt) == ({"x": 1}, 1)
        assert second.log(run_id, "a") == b"one\n"
        assert runtime.calls.count(("create", f"outrider-{run_id}-a-1")) == 1


async def test_the_next_agent_collects_a_step_that_ended_meanwhile(tmp_path: Path, runtime: FakeRuntime) -> None:
    async with rig(tmp_path / "state", runtime, node_id="n1") as first:
        run_id = await first.start(pipeline({"name": "a", "do": {"sleep": 0.2, "print": ["x"], "exit": 5}}))
        await first.until(running(runtime, f"outrider-{run_id}-a-1"))
    await asyncio.sleep(0.4)
    async with rig(tmp_path / "state", runtime, node_id="n1") as second:
        run = await second.end(run_id)
    assert (run.states["a"], run.steps["a"].exit_code) == ("failed", 5)


async def test_cancel_reaches_a_run_that_a_former_agent_began(tmp_path: Path, runtime: FakeRuntime) -> None:
    async with rig(tmp_path / "state", runtime, node_id="n1") as first:
        run_id = await first.start(pipeline({"name": "a", "do": {"hang": True}}, {"name": "b"}))
        await first.until(running(runtime, f"outrider-{run_id}-a-1"))
        # The command is on the disk, and the agent dies before it does anything about it.
        state = first.services.state
        await state.commit(Transition.RUN_CANCELLED, state.cancel_run(run_id, Cancellation("stop", 1)))
    async with rig(tmp_path / "state", runtime, node_id="n1") as second:
        run = await second.end(run_id)
    assert run.states == {"a": "cancelled", "b": "cancelled"}
    assert run.state == "cancelled"


async def test_a_container_that_somebody_removed_leaves_the_outcome_unknown(
    tmp_path: Path, runtime: FakeRuntime
) -> None:
    async with rig(tmp_path / "state", runtime, node_id="n1") as first:
        run_id = await first.start(pipeline({"name": "a", "do": {"hang": True}}))
        await first.until(running(runtime, f"outrider-{run_id}-a-1"))
        await asyncio.sleep(0.05)
    await runtime.remove(f"outrider-{run_id}-a-1", force=True)
    async with rig(tmp_path / "state", runtime, node_id="n1") as second:
        run = await second.end(run_id)
    assert (run.state, run.states["a"]) == ("unknown", "unknown")


async def test_a_container_that_the_engine_is_taking_back_is_made_anew(
    agent: Rig, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a dead agent's create left, and the engine removes: it was never started, so the attempt goes on."""
    refused = []
    start = runtime.start

    async def being_removed_once(container: str) -> None:
        if not refused and runtime.spec_of(container).name.endswith("-a-1"):
            refused.append(container)
            await runtime.remove(container, force=True)
            raise Conflict(f"{container} is being removed", code="being_removed")
        await start(container)

    monkeypatch.setattr(runtime, "start", being_removed_once)
    run = await agent.run(pipeline({"name": "a", "do": {"print": ["once"]}}))
    assert (run.state, run.steps["a"].attempt) == ("succeeded", 1)
    assert refused
    assert agent.log(run.run_id, "a") == b"once"


def _with_secret(**second: object) -> str:
    """A run whose first step is given the secret and whose second prints it, then waits."""
    return pipeline(
        {"name": "a", "envs": {"KEY": "store.KEY"}}, {"name": "b", "do": {"print": [SECRET], **second}}, **ENVS
    )


async def _second_step_begun(agent: Rig, runtime: FakeRuntime) -> str:
    agent.link.values, agent.link.secret_names = {"store.KEY": SECRET}, {"store.KEY"}
    run_id = await agent.start(_with_secret(hang=True))
    await agent.until(running(runtime, f"outrider-{run_id}-b-1"))
    await agent.until(lambda: bool(agent.log(run_id, "b")))
    return run_id


async def test_the_log_of_an_adopted_step_is_masked_as_it_was_before(tmp_path: Path, runtime: FakeRuntime) -> None:
    async with rig(tmp_path / "state", runtime, node_id="n1") as first:
        run_id = await _second_step_begun(first, runtime)
    async with rig(tmp_path / "state", runtime, node_id="n1", connected=False) as second:
        second.link.values, second.link.secret_names = {"store.KEY": SECRET}, {"store.KEY"}
        # The step was allotted no env; what its log is masked with is waited for all the same.
        await second.until(lambda: second.told(run_id).steps["b"].reason == "envs")
        second.link.connected.set()
        await second.until(lambda: second.told(run_id).steps["b"].reason == "")
        await second.cancel(run_id)
        run = await second.end(run_id)
    assert run.states["b"] == "cancelled"
    assert second.log(run_id, "b") == b"***"


async def test_an_adopted_step_is_stopped_without_its_secrets_and_what_cannot_be_masked_is_withheld(
    tmp_path: Path, runtime: FakeRuntime
) -> None:
    async with rig(tmp_path / "state", runtime, node_id="n1") as first:
        run_id = await _second_step_begun(first, runtime)
    async with rig(tmp_path / "state", runtime, node_id="n1", connected=False) as second:
        await second.until(lambda: second.told(run_id).steps["b"].reason == "envs")
        await second.cancel(run_id)
        run = await second.end(run_id)
        gaps = {row["stream"]: row["gap"] for row in second.services.state.journal.query_now("SELECT * FROM logs")}
        assert run.states == {"a": "succeeded", "b": "cancelled"}
        assert SECRET.encode() not in second.log(run_id, "b")
        assert gaps["stdout"] == -1
    assert next(kind for kind, _ in runtime.calls if kind in ("stop", "kill")) == "stop"
