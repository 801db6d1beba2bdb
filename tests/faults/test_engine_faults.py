"""What an engine does to a step, told apart, on an engine of the tests' own: its restart with and without
live-restore, a kill, a removal, memory running out, and an engine that hangs on one container."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agent_core.policy import NodePolicy
from agent_core.runtimes.docker import DockerRuntime
from tests.agent_rig import Rig, rig, sweep
from tests.integration.test_agent_docker import pipeline
from tests.second_engine import Engine, second_engine

VOLUME = {"volumes": {"v": "/v:rw"}}
ONCE = "echo ran >> /v/times-$OUTRIDER_STEP; "
WAITS = ONCE + "echo before; until [ -e /v/go1 ]; do sleep 0.05; done; echo meanwhile; " + (
    "until [ -e /v/go2 ]; do sleep 0.05; done; echo after"
)  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with second_engine() as made:
        yield made


@pytest.fixture
def node_id() -> str:
    return f"test-{secrets.token_hex(4)}"


@pytest.fixture
def state_dir() -> Iterator[Path]:
    # Not pytest's tmp_path: that one is closed to the users that steps run as.
    path = Path("/var/tmp") / f"outrider-faults-{secrets.token_hex(6)}"
    path.mkdir(mode=0o711)
    yield path
    subprocess.run(["rm", "-rf", path], check=True)


@pytest.fixture
async def runtime(engine: Engine, node_id: str) -> AsyncIterator[DockerRuntime]:
    driver = DockerRuntime(engine.socket, call_timeout_s=4)
    yield driver
    await sweep(driver, node_id)
    await driver.aclose()


@contextlib.asynccontextmanager
async def agent_on(
    state_dir: Path, engine: Engine, node_id: str, *, policy: NodePolicy | None = None
) -> AsyncIterator[Rig]:
    """An agent with a driver of its own, as after a restart of its process."""
    driver = DockerRuntime(engine.socket, call_timeout_s=4)
    try:
        async with rig(state_dir, driver, node_id=node_id, policy=policy) as agent:
            yield agent
    finally:
        await driver.aclose()


async def started(engine: Engine, run_id: str, step: str) -> None:
    """Until the engine knows: a program's first words may come before that."""
    name = f"outrider-{run_id}-{step}-1"
    while (await asyncio.to_thread(engine.docker, "inspect", "-f", "{{.State.Status}}", name)).strip() != "running":
        await asyncio.sleep(0.05)


def volume(state_dir: Path, run_id: str) -> Path:
    return state_dir / "volumes" / "run" / run_id / "v"


async def restart(engine: Engine, *, live_restore: bool | None = None, kill: bool = False) -> None:
    await asyncio.to_thread(engine.stop, kill=kill)
    await asyncio.to_thread(engine.start, live_restore=live_restore)


async def live_restore(engine: Engine, wanted: bool) -> None:
    if engine.live_restore != wanted:
        await restart(engine, live_restore=wanted)


def code(run: object, step: str) -> str:
    return str(run.steps[step].failure.code)  # type: ignore[attr-defined]


async def test_each_way_to_die_is_told_apart_and_harms_no_other_step(
    engine: Engine, runtime: DockerRuntime, state_dir: Path, node_id: str
) -> None:
    await live_restore(engine, False)
    sleeps = "echo up; sleep 600"
    eats = "python3 -c 'x = bytearray(200 << 20)'"
    small = {"resources": {"memory": "32MiB"}}
    steps: list[dict[str, object]] = [
        {"name": "killed", "sh": sleeps},
        {"name": "shot", "sh": sleeps},
        {"name": "stopped", "sh": "trap 'exit 143' TERM; echo up; while true; do sleep 0.05; done"},
        {"name": "removed", "sh": sleeps},
        {"name": "greedy", "sh": f"exec {eats}", **small},
        # It lives on a little: the notice of its child's end goes another way through the engine than its own.
        {"name": "parent", "sh": f"{eats}; sleep 2; exit 3", **small},
        {"name": "fine", "sh": "echo up; until [ -e /v/go ]; do sleep 0.05; done", **VOLUME},
    ]
    text = pipeline(*({**step, "needs": []} for step in steps), volumes={"v": {}})
    async with rig(state_dir, runtime, node_id=node_id) as agent:
        run_id = await agent.start(text)
        for name in ("killed", "shot", "stopped", "removed", "fine"):
            await agent.until(lambda name=name: agent.log(run_id, name) == b"up\n")
        names = {name: f"outrider-{run_id}-{name}-1" for name in ("killed", "shot", "stopped", "removed")}
        await asyncio.to_thread(engine.docker, "kill", names["killed"])
        pid = int(await asyncio.to_thread(engine.docker, "inspect", "-f", "{{.State.Pid}}", names["shot"]))
        os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(engine.docker, "stop", names["stopped"])
        await asyncio.to_thread(engine.docker, "rm", "-f", names["removed"])
        broken = {"killed", "shot", "stopped", "removed", "greedy", "parent"}
        await agent.until(lambda: all(agent.told(run_id).states[name] == "failed" for name in broken))
        assert agent.told(run_id).states["fine"] == "running"
        (volume(state_dir, run_id) / "go").touch()
        run = await agent.end(run_id)
    codes = {name: code(run, name) for name in broken}
    # An engine on a busy machine loses the kernel's notice at times: the control group is gone before it reads it.
    assert codes.pop("greedy") in ("out_of_memory", "killed")
    assert codes.pop("parent") in ("out_of_memory", "step_failed")
    assert codes == {"killed": "killed", "shot": "killed", "stopped": "killed", "removed": "container_removed"}
    assert "through the container engine" in run.steps["killed"].failure.message
    assert "by neither its memory limit nor Outrider" in run.steps["shot"].failure.message
    assert run.states["fine"] == "succeeded"


@pytest.mark.parametrize("kill", [False, pytest.param(True, marks=pytest.mark.long)])
async def test_what_survives_the_engines_restart_goes_on_and_not_a_byte_of_its_log_is_lost(
    engine: Engine, runtime: DockerRuntime, state_dir: Path, node_id: str, kill: bool
) -> None:
    await live_restore(engine, True)
    async with rig(state_dir, runtime, node_id=node_id) as agent:
        run_id = await agent.start(pipeline({"name": "a", "sh": WAITS, **VOLUME}, {"name": "b"}, volumes={"v": {}}))
        await agent.until(lambda: agent.log(run_id, "a") == b"before\n")
        await started(engine, run_id, "a")
        await asyncio.to_thread(engine.stop, kill=kill)
        (volume(state_dir, run_id) / "go1").touch()
        await agent.until(lambda: not agent.services.engine.ok)
        await asyncio.to_thread(engine.start)
        await agent.until(lambda: agent.services.engine.ok)
        # Read on while it runs, not only at its end.
        await agent.until(lambda: agent.log(run_id, "a") == b"before\nmeanwhile\n")
        (volume(state_dir, run_id) / "go2").touch()
        run = await agent.end(run_id)
        assert run.state == "succeeded", run.failure
        assert (run.steps["a"].attempt, agent.log(run_id, "a")) == (1, b"before\nmeanwhile\nafter\n")
        assert not gaps(agent, run_id)


@pytest.mark.parametrize("kill", [False, pytest.param(True, marks=pytest.mark.long)])
async def test_what_ended_with_its_engine_is_unknown_and_done_again_only_if_it_may_be(
    engine: Engine, runtime: DockerRuntime, state_dir: Path, node_id: str, kill: bool
) -> None:
    await live_restore(engine, False)
    again = ONCE + "echo up; [ $(wc -l < /v/times-b) = 2 ] || sleep 600"
    async with rig(state_dir, runtime, node_id=node_id) as agent:
        run_id = await agent.start(
            pipeline(
                {"name": "a", "sh": WAITS, "needs": [], **VOLUME},
                {"name": "b", "uses": "test.again", "sh": again, "needs": [], **VOLUME},
                {"name": "c", "needs": ["a"]},
                {"name": "d", "needs": ["a"], "if": "${{ always() }}"},
                volumes={"v": {}},
            )
        )
        await agent.until(lambda: agent.log(run_id, "a") == b"before\n" and agent.log(run_id, "b") == b"up\n")
        await restart(engine, kill=kill)
        run = await agent.end(run_id)
        assert run.states == {"a": "unknown", "b": "succeeded", "c": "skipped", "d": "succeeded"}
        assert (run.state, code(run, "a")) == ("unknown", "engine_stopped")
        assert (run.steps["a"].attempt, run.steps["b"].attempt) == (1, 2)
        assert agent.log(run_id, "a") == b"before\n"


@pytest.mark.parametrize(
    ("program", "agent_stays", "kill"),
    [
        ("true", True, False),
        ("sleep 600", False, False),
        pytest.param("sleep 600", True, True, marks=pytest.mark.long),
        pytest.param("true", False, True, marks=pytest.mark.long),
    ],
)
async def test_a_step_that_an_engine_forgot_in_the_middle_of_its_start_is_not_run_twice(
    engine: Engine, state_dir: Path, node_id: str, program: str, agent_stays: bool, kill: bool
) -> None:
    await live_restore(engine, True)
    policy = NodePolicy(warm_none=0, networks={}, oci_runtime="late")
    again = ONCE + f"[ $(wc -l < /v/times-b) = 2 ] || {program}"

    def ran() -> list[Path]:
        return sorted((state_dir / "volumes" / "node").rglob("times-?"))

    async with contextlib.AsyncExitStack() as stack:
        with engine.starts_come_late():
            agent = await stack.enter_async_context(agent_on(state_dir, engine, node_id, policy=policy))
            run_id = await agent.start(
                pipeline(
                    {"name": "a", "sh": ONCE + program, "needs": [], **VOLUME},
                    {"name": "b", "uses": "test.again", "sh": again, "needs": [], **VOLUME},
                    volumes={"v": {"scope": "node"}},
                )
            )
            await agent.until(lambda: len(ran()) == 2)
            if not agent_stays:
                await stack.aclose()
            await asyncio.to_thread(engine.stop, kill=kill)
        await asyncio.to_thread(engine.start)
        if not agent_stays:
            agent = await stack.enter_async_context(agent_on(state_dir, engine, node_id, policy=policy))
        run = await agent.end(run_id)
        assert run.states == {"a": "unknown", "b": "succeeded"}, run.failure
        assert code(run, "a") == "engine_stopped"
        assert (run.steps["a"].attempt, run.steps["b"].attempt) == (1, 2)
        assert [len(path.read_text().splitlines()) for path in ran()] == [1, 2]
        assert not processes_of(run_id)


def processes_of(run_id: str) -> list[str]:
    """What the machine says, whatever the engine does."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if run_id.encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


@pytest.mark.parametrize("survives", [True, False])
async def test_an_engine_that_restarted_while_no_agent_was_there(
    engine: Engine, runtime: DockerRuntime, state_dir: Path, node_id: str, survives: bool
) -> None:
    await live_restore(engine, survives)
    async with agent_on(state_dir, engine, node_id) as first:
        run_id = await first.start(pipeline({"name": "a", "sh": WAITS, **VOLUME}, volumes={"v": {}}))
        await first.until(lambda: first.log(run_id, "a") == b"before\n")
    (volume(state_dir, run_id) / "go1").touch()
    await restart(engine)
    async with agent_on(state_dir, engine, node_id) as second:
        if survives:
            await second.until(lambda: second.log(run_id, "a") == b"before\nmeanwhile\n")
            (volume(state_dir, run_id) / "go2").touch()
        run = await second.end(run_id)
        assert run.steps["a"].attempt == 1
        if survives:
            assert run.state == "succeeded", run.failure
            assert second.log(run_id, "a") == b"before\nmeanwhile\nafter\n"
            assert not gaps(second, run_id)
        else:
            assert (run.state, code(run, "a")) == ("unknown", "engine_stopped")


@pytest.mark.parametrize("agent_stays", [True, False])
async def test_what_is_written_while_no_engine_is_there_to_take_it_is_told_as_a_gap(
    engine: Engine, runtime: DockerRuntime, state_dir: Path, node_id: str, agent_stays: bool
) -> None:
    await live_restore(engine, True)
    async with contextlib.AsyncExitStack() as stack:
        agent = await stack.enter_async_context(agent_on(state_dir, engine, node_id))
        run_id = await agent.start(pipeline({"name": "a", "sh": WAITS, **VOLUME}, volumes={"v": {}}))
        await agent.until(lambda: agent.log(run_id, "a") == b"before\n")
        pid = await asyncio.to_thread(engine.docker, "inspect", "-f", "{{.State.Pid}}", f"outrider-{run_id}-a-1")
        if not agent_stays:
            await stack.aclose()
        await asyncio.to_thread(engine.stop)
        for name in ("go1", "go2"):
            (volume(state_dir, run_id) / name).touch()
        async with asyncio.timeout(20):
            while Path("/proc", pid.strip()).exists():
                await asyncio.sleep(0.02)
        await asyncio.to_thread(engine.start)
        if not agent_stays:
            agent = await stack.enter_async_context(agent_on(state_dir, engine, node_id))
        run = await agent.end(run_id)
        version = await asyncio.to_thread(engine.docker, "version", "--format", "{{.Server.Version}}")
        if int(version.partition(".")[0]) < 23 or run.state == "succeeded":
            assert run.state == "succeeded", run.failure
        else:  # it does not know how it ended
            assert (run.state, code(run, "a")) == ("unknown", "engine_stopped")
        whole = b"before\nmeanwhile\nafter\n"
        assert whole.startswith(agent.log(run_id, "a"))
        assert gaps(agent, run_id) == {"stdout": -1, "stderr": -1}


def gaps(agent: Rig, run_id: str) -> dict[str, int]:
    """The bytes that logs lack at their end, by stream; -1: nobody knows how many."""
    return {log.key.stream: log.gap for log in agent.services.spool.pending() if log.key.run_id == run_id and log.gap}


async def test_an_engine_that_hangs_on_one_container_blocks_neither_the_others_nor_the_agents_start(
    engine: Engine, runtime: DockerRuntime, state_dir: Path, node_id: str
) -> None:
    async with agent_on(state_dir, engine, node_id) as first:
        stuck = await first.start(pipeline({"name": "a", "sh": WAITS, **VOLUME}, volumes={"v": {}}))
        await first.until(lambda: first.log(stuck, "a") == b"before\n")
        container = f"outrider-{stuck}-a-1"
        shim = shim_of(await asyncio.to_thread(engine.docker, "inspect", "-f", "{{.Id}}", container))
        os.kill(shim, signal.SIGSTOP)
        try:
            await first.cancel(stuck, grace_s=1)
            await first.until(lambda: container in first.services.engine.stuck)
            assert (await first.run(pipeline({"name": "a"}))).state == "succeeded"
            assert stuck in first.runs.active
        except BaseException:
            os.kill(shim, signal.SIGCONT)
            raise
    try:
        began = time.monotonic()
        async with agent_on(state_dir, engine, node_id) as second:
            await second.until(lambda: second.services.engine.ok)
            assert time.monotonic() - began < 15
            assert (await second.run(pipeline({"name": "a"}))).state == "succeeded"
            await second.until(lambda: container in second.services.engine.stuck)
            assert stuck in second.runs.active, "it may run: it is not over"
            os.kill(shim, signal.SIGCONT)
            run = await second.end(stuck)
            assert (run.state, run.steps["a"].attempt) == ("cancelled", 1)
            assert second.log(stuck, "a") == b"before\n"
            await second.until(lambda: container not in second.services.engine.stuck)
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended with its container
            os.kill(shim, signal.SIGCONT)


def shim_of(container_id: str) -> int:
    """The process between the engine and this container."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"containerd-shim" in words[0] and container_id.strip().encode() in words:
                return int(entry.name)
    raise AssertionError(f"no shim of {container_id}")


@pytest.mark.long
async def test_an_engine_that_hangs_as_a_whole_is_told_and_waited_for(
    engine: Engine, runtime: DockerRuntime, state_dir: Path, node_id: str
) -> None:
    assert engine.process is not None
    async with agent_on(state_dir, engine, node_id) as agent:
        await agent.until(lambda: agent.services.engine.ok)
        os.kill(engine.process.pid, signal.SIGSTOP)
        try:
            run_id = await agent.start(pipeline({"name": "a", "sh": "echo done"}))
            await agent.until(lambda: not agent.services.engine.ok, 60)
            await agent.until(lambda: "engine" in agent.told(run_id).steps["a"].reason, 60)
        finally:
            os.kill(engine.process.pid, signal.SIGCONT)
        run = await agent.end(run_id)
        assert (run.state, run.steps["a"].attempt) == ("succeeded", 1)
        assert agent.log(run_id, "a") == b"done\n"
