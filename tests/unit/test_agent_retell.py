"""What a node still knows of runs that are over, for a server that has lost it."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

from agent_core.runtimes.fake import FakeProcess, FakeRuntime
from outrider.v1 import node_service_pb2 as pb
from outrider.v1 import types_pb2 as types
from tests.agent_rig import BASE_IMAGE, Rig, rig

STEPS = [{"name": "a", "uses": "test.shell"}, {"name": "b", "uses": "test.shell"}]
TEXT = json.dumps({"name": "p", "steps": STEPS})


carried_out: list[str] = []


async def program(process: FakeProcess) -> int:
    carried_out.append(process.spec.name)
    directory = next(Path(mount.source) for mount in process.spec.mounts if mount.target == "/outrider")
    (directory / "outputs").write_text('{"port": 4711}\n')
    return 0 if process.spec.env["OUTRIDER_STEP"] == "a" else 7


async def acknowledge_all(agent: Rig) -> None:
    outbox = agent.services.outbox
    await outbox.acknowledge(item.sequence for item in outbox.read(("run_report", "write_back", "event")))


async def test_end_that_was_acknowledged_is_reported_once_more_when_it_is_asked_for(tmp_path: Path) -> None:
    async with rig(tmp_path, FakeRuntime({BASE_IMAGE: program})) as agent:
        first = await agent.run(TEXT)
        state = agent.services.state
        assert [held.run_id for held in state.held()] == [first.run_id]
        await agent.runs.retell([first.run_id])
        waiting = agent.services.outbox.read(("run_report",))
        await acknowledge_all(agent)
        assert not state.held()
        assert await state.forget(commands_before=0, runs_before=time.time() - 3600, keep_runs=10) == []
        await agent.runs.retell([first.run_id, "rnever"])
        [item] = agent.services.outbox.read(("run_report",))
        assert item.sequence > waiting[-1].sequence  # while one waits, asking adds none
        report = pb.RunReport.FromString(item.body)
        assert report.lease_id == "lease-1"
        assert report.state == types.RUN_STATE_FAILED
        assert report.failure == first.failure
        assert report.HasField("finished_at")
        assert report.logs_gone  # none of them waits
        steps = {step.name: step for step in report.steps}
        assert (steps["a"].state, steps["b"].state) == (types.STEP_STATE_SUCCEEDED, types.STEP_STATE_FAILED)
        assert steps["a"].outputs_json == first.steps["a"].outputs_json
        assert steps["b"].exit_code == 7
        assert [held.run_id for held in state.held()] == [first.run_id]


async def test_run_that_is_sent_again_though_it_is_over_is_not_run_but_reported(tmp_path: Path) -> None:
    async with rig(tmp_path, FakeRuntime({BASE_IMAGE: program})) as agent:
        first = await agent.run(TEXT)
        await acknowledge_all(agent)
        before = list(carried_out)
        record = agent.services.state.find(first.run_id)
        assert record is not None
        await agent.runs.accept(record.command, command_id="again", digest=b"d")
        assert agent.runs.active == []
        assert carried_out == before
        [item] = agent.services.outbox.read(("run_report",))
        assert pb.RunReport.FromString(item.body).state == types.RUN_STATE_FAILED


async def test_ends_are_kept_for_a_time_and_in_number(tmp_path: Path) -> None:
    async with rig(tmp_path, FakeRuntime({BASE_IMAGE: program})) as agent:
        ended = [(await agent.run(TEXT)).run_id for _ in range(3)]
        state = agent.services.state
        assert await state.forget(commands_before=0) == []  # the server has not got them yet
        await acknowledge_all(agent)
        assert await state.forget(commands_before=0, runs_before=0, keep_runs=2) == ended[:1]
        assert await state.forget(commands_before=0, runs_before=math.inf, keep_runs=2) == ended[1:]
        await agent.runs.retell(ended)
        assert agent.services.outbox.read(("run_report",)) == []
