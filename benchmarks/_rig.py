"""What the benchmarks stand on: `outrider dev` as a process of its own, and a client of its server."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import yaml

from outrider.tls import Identity, open_channel
from outrider.v1 import control_service_pb2 as control
from outrider.v1 import control_service_pb2_grpc as control_grpc
from outrider.v1 import types_pb2 as types

OUTRIDER = Path(sys.executable).with_name("outrider")
IMAGE = "outrider/base:1"
READY_TIMEOUT_S = 30.0
TERMINAL = (
    types.RUN_STATE_SUCCEEDED,
    types.RUN_STATE_FAILED,
    types.RUN_STATE_CANCELLED,
    types.RUN_STATE_UNKNOWN,
)


@dataclass(frozen=True, slots=True)
class Result:
    """A row of the table: what, against what, the ratio and its aim."""

    name: str
    against: str
    figure: str
    aim: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Rig:
    """A running `outrider dev`: its process id, its context and its node."""

    pid: int
    context: Path
    node: str = "dev"


@contextmanager
def dev() -> Iterator[Rig]:
    """Server and agent in one process, with a state of their own, until the block ends."""
    folder = Path(tempfile.mkdtemp(prefix="outrider-bench-"))
    context = folder / "context.yaml"
    env = os.environ | {"OUTRIDER_CONTEXT": str(context)}
    for name in ("OUTRIDER_SERVER", "OUTRIDER_CA", "OUTRIDER_TOKEN"):
        env.pop(name, None)
    with (folder / "dev.log").open("w") as log:
        process = subprocess.Popen(
            [OUTRIDER, "dev", "--data-dir", folder / "state", "--listen", "127.0.0.1:0"],
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            _wait(process, context, folder / "dev.log")
            yield Rig(process.pid, context)
        finally:
            process.terminate()
            process.wait(timeout=60)
            shutil.rmtree(folder, ignore_errors=True)


def _wait(process: subprocess.Popen[bytes], context: Path, log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        if context.exists() and asyncio.run(_online(context)):
            return
        time.sleep(0.2)
    raise SystemExit(f"error: 'outrider dev' did not get ready:\n{log.read_text()}")


async def _online(context: Path) -> bool:
    async with Client(context) as client:
        nodes = (await client.stub.ListNodes(control.ListNodesRequest(), timeout=5)).nodes
        return any(node.online for node in nodes)


class Client:
    """The operator's side of one benchmark."""

    def __init__(self, context: Path) -> None:
        here = yaml.safe_load(context.read_text())
        if "contexts" in here:
            here = here["contexts"][here["current"]]
        ca = here["ca"]
        pem = ca.encode() if "BEGIN CERTIFICATE" in ca else Path(ca).read_bytes()
        self._channel = open_channel(here["server"], ca=pem, identity=Identity(token=here["token"]))
        self.stub = cast("control_grpc.ControlServiceAsyncStub", control_grpc.ControlServiceStub(self._channel))

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._channel.close(None)

    async def run(self, pipeline: str, node: str = "dev") -> float:
        """Execute ``pipeline`` to its end; the wall time in seconds. A run that does not succeed ends the benchmark."""
        text = pipeline.encode()
        started = time.perf_counter()
        accepted = await self.stub.ExecutePipeline(
            control.ExecutePipelineRequest(
                request_id=str(uuid.uuid4()),
                pipeline_yaml=text,
                pipeline_sha256=hashlib.sha256(text).digest(),
                node_id=node,
            ),
            timeout=30,
        )
        last = accepted
        async for last in self.stub.WatchRun(control.WatchRunRequest(run_id=accepted.run_id), timeout=300):
            if last.state in TERMINAL:
                break
        took = time.perf_counter() - started
        if last.state != types.RUN_STATE_SUCCEEDED:
            raise SystemExit(f"error: the run {accepted.run_id} did not succeed: {last}")
        return took


def trivial_pipeline(steps: int) -> str:
    """A pipeline of steps that do nothing, one after another."""
    lines = ["name: trivial", "steps:"]
    for number in range(steps):
        lines += [f"  - name: s{number}", "    uses: container.run", f"    with: {{image: '{IMAGE}', args: ['true']}}"]
    return "\n".join(lines) + "\n"


async def docker_runs(count: int) -> float:
    """As many `docker run --rm` of the same image in a row, as a shell would; wall time in seconds."""
    started = time.perf_counter()
    for _ in range(count):
        process = await asyncio.create_subprocess_exec("docker", "run", "--rm", IMAGE, "true")
        if await process.wait():
            raise SystemExit("error: 'docker run' failed")
    return time.perf_counter() - started
