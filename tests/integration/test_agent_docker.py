"""Runs on a real Docker Engine: the engine's side of every promise that the run engine makes."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent_core.runtimes.base import LABEL_RUN
from agent_core.runtimes.docker import DockerRuntime
from tests.agent_rig import Rig, rig, sweep


@pytest.fixture
async def runtime() -> AsyncIterator[DockerRuntime]:
    runtime = DockerRuntime()
    yield runtime
    await runtime.aclose()


@pytest.fixture
async def node_id(runtime: DockerRuntime) -> AsyncIterator[str]:
    node_id = f"test-{secrets.token_hex(4)}"
    yield node_id
    await sweep(runtime, node_id)


@pytest.fixture
async def agent(tmp_path: Path, runtime: DockerRuntime, node_id: str) -> AsyncIterator[Rig]:
    async with rig(tmp_path / "state", runtime, node_id=node_id) as started:
        yield started


def pipeline(*steps: dict[str, object], **more: object) -> str:
    items = [{"uses": "test.shell", "with": {"script": step.pop("sh", "true")}, **step} for step in steps]
    return json.dumps({"name": "p", **more, "steps": items})


async def test_files_and_outputs_go_from_step_to_step(agent: Rig) -> None:
    volumes = {"v": {}}
    run = await agent.run(
        pipeline(
            {"name": "a", "sh": "echo data > /v/f; echo '{\"x\": 7}' >> /outrider/outputs", "volumes": {"v": "/v:rw"}},
            {"name": "b", "sh": "cat /v/f; cat /outrider/inputs.json", "volumes": {"v": "/v"}},
            {"name": "c", "sh": "test ${{ steps.a.outputs.x }} = 7 && ! touch /v/g", "volumes": {"v": "/v"}},
            volumes=volumes,
            writeback=[{"attribute": "dir", "value": "${{ volumes.v.host_path }}"}],
        )
    )
    assert run.state == "succeeded", run.failure
    assert agent.log(run.run_id, "b").startswith(b'data\n{"script"')
    assert run.written["dir"].startswith(str(agent.services.config.state_dir))


async def test_both_streams_arrive_whole_byte_for_byte(agent: Rig) -> None:
    script = "import os,sys; os.write(1, bytes(range(256)) * 4000); os.write(2, b'\\xff\\x00err')"
    run = await agent.run(pipeline({"name": "a", "sh": f'python3 -c "{script}"'}))
    assert run.state == "succeeded", run.failure
    assert agent.log(run.run_id, "a") == bytes(range(256)) * 4000
    assert agent.log(run.run_id, "a", stream="stderr") == b"\xff\x00err"
    assert (run.steps["a"].stdout_bytes, run.steps["a"].stderr_bytes) == (1024000, 5)


async def test_a_step_killed_for_its_memory_says_so(agent: Rig) -> None:
    step = {"name": "a", "sh": "python3 -c 'x = bytearray(200 << 20)'", "resources": {"memory": "32MiB"}}
    run = await agent.run(pipeline(step))
    assert run.steps["a"].failure.code == "out_of_memory", run.failure
    assert "32 MiB" in run.failure.message


async def test_a_command_that_is_not_in_the_image_is_a_clear_failure(agent: Rig) -> None:
    run = await agent.run(pipeline({"name": "a", "sh": "exec /no/such/program"}))
    assert (run.state, run.steps["a"].exit_code) == ("failed", 127)


async def test_cancel_gives_grace_and_then_kills(agent: Rig) -> None:
    polite = "trap 'echo bye; exit 0' TERM; echo up; while true; do sleep 0.05; done"
    stubborn = "trap '' TERM; echo up; while true; do sleep 0.05; done"
    run_id = await agent.start(
        pipeline({"name": "a", "needs": [], "sh": polite}, {"name": "b", "needs": [], "sh": stubborn})
    )
    await agent.until(lambda: agent.log(run_id, "a") == b"up\n" and agent.log(run_id, "b") == b"up\n")
    started = time.monotonic()
    await agent.cancel(run_id, grace_s=1)
    run = await agent.end(run_id)
    assert run.states == {"a": "cancelled", "b": "cancelled"}
    assert agent.log(run_id, "a") == b"up\nbye\n"
    assert 1 <= time.monotonic() - started < 6


async def test_too_much_in_outrider_fails_the_step(agent: Rig) -> None:
    run = await agent.run(pipeline({"name": "a", "sh": "head -c 30000000 /dev/zero > /outrider/progress; sleep 30"}))
    assert run.steps["a"].failure.code == "directory_limit"


async def test_nothing_is_left_of_a_finished_run(agent: Rig, runtime: DockerRuntime) -> None:
    run = await agent.run(pipeline({"name": "a"}, {"name": "b"}))

    async def nothing_left() -> bool:
        return not await runtime.list(labels={LABEL_RUN: run.run_id})

    await agent.until(nothing_left)


CHILD = """
import asyncio, sys
from pathlib import Path
from agent_core.runtimes.docker import DockerRuntime
from agent_core.telemetry.logs import configure_logging
from tests.agent_rig import rig

configure_logging()

async def main():
    async with rig(Path(sys.argv[1]), DockerRuntime(), node_id=sys.argv[2]) as agent:
        await agent.start(sys.stdin.read(), run_id=sys.argv[3])
        print("accepted", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


async def begin_and_kill(tmp_path: Path, node_id: str, run_id: str, text: str, after_s: float) -> None:
    """An agent in a process of its own that takes the run on, and SIGKILL at some later moment."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CHILD, str(tmp_path / "state"), node_id, run_id,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(text.encode())
        child.stdin.write_eof()
        assert await child.stdout.readline() == b"accepted\n"
        await asyncio.sleep(after_s)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        await child.wait()


@pytest.mark.parametrize("after_s", [0.0, 0.1, 0.25, 0.6, 1.5])
async def test_killed_agent_adopts_its_running_container(
    tmp_path: Path, runtime: DockerRuntime, node_id: str, after_s: float
) -> None:
    run_id = f"r{secrets.token_hex(8)}"
    count = "i=0; while [ $i -lt 20 ]; do echo line $i; i=$((i+1)); sleep 0.05; done"
    once = "echo ran >> /v/times"
    text = pipeline(
        {"name": "a", "sh": f"{once}; {count}", "volumes": {"v": "/v:rw"}},
        {"name": "b", "sh": f"{once}; cat /v/times", "volumes": {"v": "/v:rw"}},
        volumes={"v": {}},
    )
    await begin_and_kill(tmp_path, node_id, run_id, text, after_s)
    async with rig(tmp_path / "state", runtime, node_id=node_id) as agent:
        run = await agent.end(run_id)
        assert run.state == "succeeded", run.failure
        assert {name: each.attempt for name, each in run.steps.items()} == {"a": 1, "b": 1}
        assert agent.log(run_id, "a") == b"".join(b"line %d\n" % i for i in range(20))
        assert agent.log(run_id, "b") == b"ran\nran\n", "each step ran once"


async def test_a_step_that_ended_while_no_agent_was_there_has_its_own_outcome(
    tmp_path: Path, runtime: DockerRuntime, node_id: str
) -> None:
    run_id = f"r{secrets.token_hex(8)}"
    text = pipeline({"name": "a", "sh": "sleep 1; echo done; echo '{\"x\": 1}' >> /outrider/outputs"}, {"name": "b"})
    await begin_and_kill(tmp_path, node_id, run_id, text, 0.9)
    await asyncio.sleep(2)
    async with rig(tmp_path / "state", runtime, node_id=node_id) as agent:
        run = await agent.end(run_id)
        assert run.state == "succeeded", run.failure
        assert (run.outputs["a"], run.steps["a"].attempt) == ({"x": 1}, 1)
        assert agent.log(run_id, "a") == b"done\n"
