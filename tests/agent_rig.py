"""An agent's run engine without a server: what tests of runs are made with.

The session is the seam: `FakeLink` gives envs and the rig reads the outbox as the server would.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pydantic import BaseModel

from agent_core.agent import Agent
from agent_core.config import AgentConfig
from agent_core.policy import NodePolicy
from agent_core.runner import RunEngine
from agent_core.runtimes.base import LABEL_NODE, Runtime
from agent_core.services import Services
from agent_core.state import Cancellation
from outrider.steps import StepContext, StepPlan, StepType, hookimpl
from outrider.v1 import node_service_pb2 as pb
from outrider.v1 import types_pb2 as types

BASE_IMAGE = "outrider/base:1"


class ShellParams(BaseModel, extra="forbid"):
    script: str = "true"
    image: str = BASE_IMAGE
    network: str = "none"
    user: str | None = None


class AnyOutputs(BaseModel, extra="allow"):
    pass


class WordOutputs(BaseModel, extra="forbid"):
    word: str


def resolve_shell(params: ShellParams, _context: StepContext) -> StepPlan:
    return StepPlan(
        image=params.image,
        entrypoint=("/bin/sh", "-c"),
        args=(params.script,),
        network=params.network,
        user=params.user,
    )


def resolve_control(params: ShellParams, _context: StepContext) -> StepPlan:
    return StepPlan(image=params.image, entrypoint=("/bin/sh", "-c"), args=(params.script,), control="containers")


class ShellPlugin:
    """Step types for tests: any script in any image."""

    def __init__(self) -> None:
        self.before: list[str] = []
        self.after: list[bool] = []

    @hookimpl
    def outrider_step_types(self) -> list[StepType]:
        return [
            StepType(name="test.shell", params=ShellParams, outputs=AnyOutputs, resolve=resolve_shell),
            StepType(name="test.again", params=ShellParams, outputs=AnyOutputs, resolve=resolve_shell, idempotent=True),
            StepType(name="test.word", params=ShellParams, outputs=WordOutputs, resolve=resolve_shell),
            StepType(
                name="test.public",
                params=ShellParams,
                outputs=AnyOutputs,
                resolve=resolve_shell,
                envs=("NAME", "KEY"),
                public_envs=("NAME",),
            ),
            StepType(name="test.control", params=ShellParams, outputs=AnyOutputs, resolve=resolve_control),
        ]

    @hookimpl
    def outrider_before_step(self, step_type: str) -> None:
        self.before.append(step_type)

    @hookimpl
    def outrider_after_step(self, outcome: Any) -> None:
        self.after.append(outcome.succeeded)


class FakeLink:
    """In the session's place."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.secret_names: set[str] = set()
        self.connected = asyncio.Event()
        self.connected.set()

    async def get_envs(self, _run_id: str, _lease_id: str) -> tuple[dict[str, str], frozenset[str]]:
        await self.connected.wait()
        return dict(self.values), frozenset(self.secret_names)


class Rig:
    """One agent's engine, started. ``reports`` has what the server would have been told."""

    def __init__(self, agent: Agent, services: Services, link: FakeLink, plugin: ShellPlugin) -> None:
        self.services = services
        self.runs: RunEngine = agent._runs
        self.link = link
        self.plugin = plugin
        self.progress: list[pb.RunReport] = []

    async def start(self, yaml: str, *, run_id: str = "", timeout_s: float = 0, **fields: Any) -> str:
        run_id = run_id or f"r{secrets.token_hex(8)}"
        text = yaml.encode()
        command = pb.RunPipeline(
            run_id=run_id,
            lease_id="lease-1",
            pipeline_yaml=text,
            pipeline_sha256=hashlib.sha256(text).digest(),
            args_json=json.dumps(fields.pop("args", {})).encode(),
            **fields,
        )
        if timeout_s:
            command.timeout.FromMilliseconds(int(timeout_s * 1000))
        await self.runs.accept(command, command_id=f"c-{run_id}", digest=b"d")
        return run_id

    async def run(self, yaml: str, **fields: Any) -> SimpleNamespace:
        return await self.end(await self.start(yaml, **fields))

    async def end(self, run_id: str, within_s: float = 60) -> SimpleNamespace:
        async with asyncio.timeout(within_s):
            while run_id in self.runs.active:
                await asyncio.sleep(0.01)
        return self.told(run_id)

    async def cancel(self, run_id: str, grace_s: float = 5) -> None:
        await self.runs.cancel(run_id, Cancellation("a test", grace_s), command_id=f"x-{run_id}", digest=b"d")

    async def until(self, condition: Any, within_s: float = 20) -> None:
        async with asyncio.timeout(within_s):
            while True:
                holds = condition()
                if await holds if inspect.isawaitable(holds) else holds:
                    return
                await asyncio.sleep(0.01)

    def told(self, run_id: str) -> SimpleNamespace:
        """The run as a server that got every report sees it."""
        state, failure = types.RUN_STATE_UNSPECIFIED, types.Failure()
        steps: dict[str, types.StepStatus] = {}
        for item in self.services.outbox.read(("run_report",), limit=10_000):
            report = pb.RunReport.FromString(item.body)
            if report.run_id == run_id:
                state, failure = report.state, report.failure
                steps.update((each.name, each) for each in report.steps)
        written = {}
        for item in self.services.outbox.read(("write_back",), limit=1000):
            request = pb.WriteBackRequest.FromString(item.body)
            if request.run.run_id == run_id:
                written = {each.name: json.loads(each.value_json) for each in request.attributes}
        return SimpleNamespace(
            run_id=run_id,
            state=types.RunState.Name(state).removeprefix("RUN_STATE_").lower(),
            failure=failure,
            steps=steps,
            states={
                name: types.StepState.Name(each.state).removeprefix("STEP_STATE_").lower()
                for name, each in steps.items()
            },
            outputs={name: json.loads(each.outputs_json or b"{}") for name, each in steps.items()},
            written=written,
        )

    def log(self, run_id: str, step: str, attempt: int = 1, stream: str = "stdout") -> bytes:
        path = self.services.config.state_dir / "spool" / run_id / step / f"{attempt}.{stream}"
        return path.read_bytes() if path.exists() else b""


@asynccontextmanager
async def rig(
    state_dir: Path,
    runtime: Runtime,
    *,
    node_id: str = "",
    policy: NodePolicy | None = None,
    connected: bool = True,
    **config: Any,
) -> AsyncIterator[Rig]:
    """A run engine on ``state_dir``. Leaving it is what the end of an agent's process is to its containers.

    ``connected=False``: without a server until somebody sets ``link.connected``.
    """
    node_id = node_id or f"test-{secrets.token_hex(4)}"
    agent = Agent(
        AgentConfig(node_id=node_id, server="localhost:1", token="t", state_dir=state_dir, plugins=[], **config),
        runtime=runtime,
    )
    state_dir.mkdir(parents=True, exist_ok=True)
    policy = policy or NodePolicy(warm_none=0, networks={})
    async with agent._parts(policy) as services:
        link, plugin = FakeLink(), ShellPlugin()
        if not connected:
            link.connected.clear()
        services.envs = link
        report = services.plugins.register(plugin, name="shell", distribution="test-shell", version="1")
        assert report.ok, report.error
        rig = Rig(agent, services, link, plugin)
        services.live = rig.progress.append
        watch = asyncio.create_task(services.engine.run())
        agent._runs.resume()
        try:
            yield rig
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)


async def sweep(runtime: Runtime, node_id: str) -> None:
    """Remove everything that a test made under this node id."""
    for info in await runtime.list(labels={LABEL_NODE: node_id}):
        await runtime.remove(info.id, force=True)
