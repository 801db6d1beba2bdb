"""Everything that can befall a site, and the book of what operators asked for and were told.

`World` is driven by a test, step by step; `tests/model/judge.py` heals what is broken, lets every program end, and
compares what the server says with what the engine did.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

from outrider.errors import OutriderError
from outrider.v1 import control_service_pb2 as cpb
from outrider.v1 import types_pb2 as types
from tests.model.engine import Execution
from tests.model.network import Direction
from tests.model.pipelines import Pipeline
from tests.model.site import MOMENT_S, NODE, UNWIND_S, Site


@dataclass
class Submitted:
    """What an operator asked for. ``run_id`` is known once the server has answered."""

    key: str
    pipeline: Pipeline
    object_name: str
    run_id: str = ""
    cancel_asked: bool = False
    resolved: bool = False  # an operator was asked, or may have been heard, to settle what is unknown of it
    retry_of: str = ""  # the run that it goes on from
    states: list[int] = field(default_factory=list)  # those that were seen, each once, in order


class World(Site):
    """A site, and everything that can befall it. Each method lets one thing happen and gives the others a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.submitted: list[Submitted] = []
        self.cuts = 0
        self._sequence = 0

    def submit(self, pipeline: Pipeline, object_name: str = "") -> Submitted:
        """An operator asks for a run; whether the server could answer shows in its run_id."""
        self._sequence += 1
        asked = Submitted(f"key-{self._sequence}", pipeline, object_name)
        self.submitted.append(asked)
        self.do(self._submit(asked))
        return asked

    def submit_again(self, asked: Submitted, times: int = 1) -> None:
        """The same request under the same key, ``times`` at once: it stays one run."""

        async def all_at_once() -> None:
            await asyncio.gather(*(self._submit(asked) for _ in range(times)))

        self.do(all_at_once())

    def cancel(self, asked: Submitted) -> None:
        asked.cancel_asked = True
        request = cpb.CancelRunRequest(request_id=f"cancel-{asked.key}", run_id=asked.run_id, reason="a test")
        request.grace.FromMilliseconds(5000)

        self.do(self._ask(self.control.CancelRun, request))

    def resolve(self, asked: Submitted, verdict: int) -> None:
        """An operator settles what is unknown of a run."""
        self._sequence += 1
        asked.resolved = True
        request = cpb.ResolveRunRequest(
            request_id=f"resolve-{self._sequence}", run_id=asked.run_id, verdict=verdict, reason="a test"
        )
        self.do(self._ask(self.control.ResolveRun, request))
        self.find_retries()

    def retry(self, asked: Submitted) -> None:
        """An operator has a run go on in another."""
        self._sequence += 1
        request = cpb.RetryRunRequest(
            request_id=f"retry-{self._sequence}", run_id=asked.run_id, allow_offline=True, reason="a test"
        )
        self.do(self._ask(self.control.RetryRun, request))
        self.find_retries()

    def drain(self, *, undo: bool, deadline_s: float = 0) -> None:
        """An operator empties the node, or lets it take runs again."""
        self._sequence += 1
        request = cpb.DrainNodeRequest(request_id=f"drain-{self._sequence}", node_id=NODE, reason="a test", undo=undo)
        if deadline_s:
            request.deadline.FromSeconds(int(deadline_s))
            for asked in self.submitted:
                asked.cancel_asked = True  # what is not over by then is cancelled
        self.do(self._ask(self.control.DrainNode, request))

    def find_retries(self) -> None:
        """Take note of the runs that go on from others."""

        async def find() -> None:
            with contextlib.suppress(OutriderError):
                found = await self._call(self.control.ListRuns, cpb.ListRunsRequest(node_id=NODE, limit=1000))
                known = {asked.run_id: asked for asked in self.submitted if asked.run_id}
                for run in reversed(found.runs):
                    if run.run_id not in known and run.retry_of in known:
                        former = known[run.retry_of]
                        made = Submitted(
                            run.run_id, former.pipeline, former.object_name, run.run_id, retry_of=former.run_id
                        )
                        made.cancel_asked = former.cancel_asked
                        known[run.run_id] = made
                        self.submitted.append(made)

        self.do(find(), 0)

    def finish(self, run: Execution, code: int, output: str = "") -> None:
        """A program ends by itself."""

        async def end() -> None:
            if output and code == 0:
                self.engine.outputs(run, output)
            if not run.told.done():
                run.told.set_result(code)

        self.do(end())

    def write(self, run: Execution, data: bytes) -> None:
        """A program prints."""

        async def put() -> None:
            self.engine.write(run, data)

        self.do(put(), 0.1)

    def start_agent(self) -> None:
        self.do(self._start_agent())

    def kill_agent(self) -> None:
        assert self.agent_process is not None

        async def kill() -> None:
            assert self.agent_process is not None
            self.agent_process.kill("the test")

        self.do(kill())

    def kill_agent_within(self, instants: int) -> None:
        """At a later instant: the n-th write, request or message from now."""
        assert self.agent_process is not None
        self.agent_process.die_within(instants)

    def kill_server_within(self, instants: int) -> None:
        assert self.server_process is not None
        self.server_process.die_within(instants)

    def stop_agent(self) -> None:
        """In order, as on SIGTERM."""

        async def stop() -> None:
            assert self._agent is not None
            assert self._agent_task is not None
            assert self.agent_process is not None
            self._agent.stop()
            await asyncio.wait({self._agent_task}, timeout=UNWIND_S)
            self.agent_process.kill("it stopped")

        self.do(stop())

    def start_server(self) -> None:
        self.do(self._start_server())

    def kill_server(self) -> None:
        async def kill() -> None:
            assert self.server_process is not None
            self.server_process.kill("the test")

        self.do(kill())

    def stop_server(self) -> None:
        async def stop() -> None:
            assert self._server is not None
            assert self.server_process is not None
            stopping = self.server_process.start(self._server.stop(1.0))
            await asyncio.wait({stopping}, timeout=UNWIND_S)
            self.server_process.kill("it stopped")

        self.do(stop())

    def cut(self) -> None:
        self.cuts += 1

        async def cut() -> None:
            self.link.cut()

        self.do(cut())

    def hush(self, *directions: Direction) -> None:
        """The link goes silent; nobody is told."""
        self.cuts += 1

        async def hush() -> None:
            self.link.hush(*directions)

        self.do(hush())

    def heal(self) -> None:
        async def heal() -> None:
            self.link.heal()

        self.do(heal())

    def stop_engine(self) -> None:
        async def stop() -> None:
            self.engine.stop_engine()

        self.do(stop())

    def start_engine(self) -> None:
        async def start() -> None:
            self.engine.start_engine()
            await self.engine.start(self.game)

        self.do(start())

    def reboot(self) -> None:
        """The machine of the node is switched off and on; the engine is back before the agent is."""

        async def reboot() -> None:
            if self.agent_process is not None:
                self.agent_process.kill("a reboot")
            await self._bury()
            self.engine.power_off()
            self.clocks.boot()
            await asyncio.sleep(MOMENT_S)
            self.engine.start_engine()
            await self.engine.start(self.game)

        self.do(reboot())

    def meddle(self, run: Execution, *, remove: bool) -> None:
        self.do(self.engine.meddle(run.process.spec.name, remove=remove))

    # -- inside

    async def _submit(self, asked: Submitted) -> None:
        request = cpb.ExecutePipelineRequest(
            request_id=asked.key,
            key=asked.key,
            pipeline_yaml=asked.pipeline.text.encode(),
            node_id=NODE,
            allow_offline=True,
        )
        if asked.object_name:
            request.object.CopyFrom(types.ObjectRef(kind="game", name=asked.object_name))
        try:
            run = await self._call(self.control.ExecutePipeline, request)
        except OutriderError:
            return
        assert asked.run_id in ("", run.run_id), f"the key {asked.key} made two runs: {asked.run_id}, {run.run_id}"
        asked.run_id = run.run_id

    async def _look(self) -> None:
        """Note each state that the server tells of a run."""
        if not self.server_up:
            return
        for asked in self.submitted:
            if not asked.run_id:
                continue
            with contextlib.suppress(OutriderError):
                run = await self._call(self.control.GetRun, cpb.GetRunRequest(run_id=asked.run_id))
                if not asked.states or asked.states[-1] != run.state:
                    asked.states.append(run.state)
        with contextlib.suppress(OutriderError):
            node = await self._call(self.control.GetNode, cpb.GetNodeRequest(node_id=NODE))
            if node.HasField("drain") and node.drain.drained:
                running = [each.key for each in self.engine.running()]
                assert not running, f"the node is told to be drained, and {running} run"
