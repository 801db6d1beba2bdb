"""An agent that lost its journal and whose engine hangs on a container: on the fake engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from agent_core.rebuild import Rebuild
from agent_core.runtimes.base import ContainerInfo
from agent_core.runtimes.fake import FakeProcess, FakeRuntime
from outrider.v1 import node_service_pb2 as pb
from outrider.v1 import types_pb2 as types
from tests.agent_rig import BASE_IMAGE, Rig, rig
from tests.faults import damage

# Idempotent: where nothing is known of it, it is tried again.
AGAIN = '{"name": "p", "steps": [{"name": "a", "uses": "test.again"}]}'


class Program:
    """Goes on until it is let go; ``runs`` counts."""

    def __init__(self) -> None:
        self.runs = 0
        self.go = asyncio.Event()

    async def __call__(self, process: FakeProcess) -> int:
        self.runs += 1
        process.write(b"up\n")
        await self.go.wait()
        return 0


async def hold(process: FakeProcess) -> int:
    await process.signalled.wait()
    return 0


class Engine(FakeRuntime):
    """Does not answer at all what is asked about a container in ``stuck``."""

    stuck: frozenset[str] = frozenset()

    async def inspect(self, container: str) -> ContainerInfo:
        if self._find(container).info.name in self.stuck:
            await asyncio.sleep(60)
        return await super().inspect(container)


class Server:
    """What the server knows: these runs, and nothing of their steps' ends."""

    def __init__(self, *runs: tuple[pb.RunPipeline, list[types.StepStatus]]) -> None:
        self._runs = [pb.RecoverRunsResponse.Recovered(command=command, steps=steps) for command, steps in runs]
        self.seen: set[str] = set()

    async def RecoverRuns(self, request: pb.RecoverRunsRequest, timeout: float) -> pb.RecoverRunsResponse:
        self.seen = {each.run_id for each in request.seen}
        return pb.RecoverRunsResponse(runs=self._runs)


def known_of(agent: Rig, run_id: str) -> tuple[pb.RunPipeline, list[types.StepStatus]]:
    record = agent.services.state.find(run_id)
    assert record is not None
    return record.command, list(agent.told(run_id).steps.values())


@pytest.mark.parametrize("answers_late", [True, False])
async def test_a_step_on_whose_container_the_engine_hangs_is_adopted_and_not_run_again(
    answers_late: bool, tmp_path: Path
) -> None:
    program = Program()
    engine = Engine({BASE_IMAGE: program, "outrider/pause:1": hold}, images=set())
    async with rig(tmp_path / "state", engine, node_id="n1") as first:
        runs = [await first.start(AGAIN) for _ in range(2)]
        for run_id in runs:
            await first.until(lambda run_id=run_id: first.log(run_id, "a") == b"up\n")
        server: Any = Server(*(known_of(first, run_id) for run_id in runs))
    damage.tear(tmp_path / "state/journal.db")
    hanging = f"outrider-{runs[0]}-a-1"
    if answers_late:
        engine.hangs_on.add(hanging)
    else:
        engine.stuck = frozenset({hanging})
    async with rig(tmp_path / "state", engine, node_id="n1") as second:
        rebuild = Rebuild(second.services, second.runs)
        assert rebuild.pending
        await asyncio.wait_for(rebuild.recover(server), 15)
        assert server.seen == set(runs)
        program.go.set()
        assert (await second.end(runs[1])).states == {"a": "succeeded"}  # nobody waits for the other one
        assert second.told(runs[0]).steps["a"].attempt == 1
        assert second.told(runs[0]).states["a"] in ("running", "waiting")  # for the engine
        engine.hangs_on.clear()
        engine.stuck = frozenset()
        if answers_late:
            assert (await second.end(runs[0])).states == {"a": "succeeded"}
    assert program.runs == 2
    await engine.aclose()
