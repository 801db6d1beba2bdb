"""The Docker driver on the real engine."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent_core.runtimes.base import LABEL_KIND, LABEL_NODE, ContainerSpec, run_began
from agent_core.runtimes.docker import DockerRuntime
from outrider.errors import (
    Conflict,
    EngineUnavailable,
    InvalidInput,
    NotFound,
    OutriderError,
    PermanentError,
    TemporaryError,
)

if TYPE_CHECKING:
    from conftest import Node

BASE = "outrider/base:1"


def spec(node: Node, name: str, *args: str, **options: object) -> ContainerSpec:
    labels = {LABEL_NODE: node.id, LABEL_KIND: "step"}
    return ContainerSpec(name=f"{node.id}-{name}", image=BASE, args=args, labels=labels, **options)  # type: ignore[arg-type]


BYTES = "import os,sys; d = bytes(range(256)) * 4096; os.write(2, b'err'); sys.stdout.buffer.write(d); sys.exit(3)"


async def test_attached_output_and_logs_are_byte_exact(node: Node) -> None:
    container = await node.runtime.create(spec(node, "bytes", "python3", "-c", BYTES))
    attached: dict[str, bytes] = {"stdout": b"", "stderr": b""}
    async with node.runtime.attach(container) as pieces:
        await node.runtime.start(container)
        async for stream, data in pieces:
            attached[stream] += data
    end = await node.runtime.exited(container)
    assert (end.exit_code, end.oom_killed, end.engine_stopped) == (3, False, False)
    expected = hashlib.sha256(bytes(range(256)) * 4096).hexdigest()
    assert hashlib.sha256(attached["stdout"]).hexdigest() == expected
    assert attached["stderr"] == b"err"

    logged: dict[str, bytes] = {"stdout": b"", "stderr": b""}
    async with contextlib.aclosing(node.runtime.logs(container)) as logs:
        async for stream, data in logs:
            logged[stream] += data
    # The engine's log ends every message with a newline, also the last one of a stream.
    assert hashlib.sha256(logged["stdout"].removesuffix(b"\n")).hexdigest() == expected
    assert logged["stderr"].removesuffix(b"\n") == b"err"


async def test_the_log_of_one_run_of_a_container_is_told_apart_from_those_of_former_ones(node: Node) -> None:
    """Also its very first and its very last line, which the engine may take down before its start and after its end."""
    script = "echo begins $(cat /proc/sys/kernel/random/uuid); sleep 1; echo ends"
    container = await node.runtime.create(spec(node, "runs", "sh", "-c", script))
    ends = []
    for _ in range(3):
        await node.runtime.start(container)
        info = await node.runtime.inspect(container)
        assert info.state == "running"
        ends.append((run_began(info), info.finished_at))
        while (await node.runtime.inspect(container)).state == "running":
            await asyncio.sleep(0.02)
    lines = (await log_since(node, container, None)).splitlines()
    assert len(lines) == 6
    for number, (began, former_end) in enumerate(ends):
        assert (await log_since(node, container, began)).splitlines() == lines[2 * number :]
        assert len((await log_since(node, container, former_end)).splitlines()) in (6 - 2 * number, 7 - 2 * number)


async def log_since(node: Node, container: str, since: datetime | None) -> str:
    async with contextlib.aclosing(node.runtime.logs(container, since=since)) as logs:
        return b"".join([data async for _, data in logs]).decode()


async def test_exit_is_known_however_early_or_late_it_is_asked_for(node: Node) -> None:
    runtime = node.runtime
    created = [await runtime.create(spec(node, f"e{code}", "sh", "-c", f"exit {code}")) for code in range(4)]
    early = asyncio.create_task(runtime.exited(created[0]))
    await asyncio.sleep(0.2)
    assert not early.done()  # never started is not ended
    for container in created:
        await runtime.start(container)
    await asyncio.sleep(1)
    assert [(await early).exit_code, *[(await runtime.exited(c)).exit_code for c in created[1:]]] == [0, 1, 2, 3]
    other = DockerRuntime()
    try:
        assert (await other.exited(created[3])).exit_code == 3  # an agent that was not there
        assert (await other.exited(created[3], boot="another engine")).engine_stopped
    finally:
        await other.aclose()


async def test_program_that_handles_no_signals_stops_at_once_under_the_init(node: Node) -> None:
    container = await node.runtime.create(spec(node, "init", "sh", "-c", "sleep 60; true", init=True))
    await node.runtime.start(container)
    started = time.monotonic()
    await node.runtime.stop(container, grace_s=10)
    assert time.monotonic() - started < 5
    assert (await node.runtime.exited(container)).exit_code == 143


async def test_end_for_want_of_memory_is_told(node: Node) -> None:
    eat = "x = []\nwhile True: x.append(bytearray(1 << 20))"
    # An engine on a busy machine loses the kernel's notice at times: the control group is gone before it reads it.
    for number in range(5):
        made = spec(node, f"oom-{number}", "python3", "-c", eat, memory_bytes=24 * 1024**2)
        container = await node.runtime.create(made)
        await node.runtime.start(container)
        end = await node.runtime.exited(container)
        assert end.exit_code == 137
        if end.oom_killed:
            return
    pytest.fail("no notice in five times")


async def test_removed_container_ends_the_wait_for_it(node: Node) -> None:
    container = await node.runtime.create(spec(node, "gone", "sleep", "60"))
    waiting = asyncio.create_task(node.runtime.exited(container))
    await asyncio.sleep(0.3)
    await node.runtime.remove(container, force=True)
    with pytest.raises(NotFound):
        await asyncio.wait_for(waiting, 10)
    await node.runtime.remove(container)  # once more is no error


async def test_errors_are_sentences(node: Node) -> None:
    with pytest.raises(NotFound, match="image no-such/image:1 is not on this node"):
        await node.runtime.find_image("no-such/image:1")
    with pytest.raises(NotFound, match="no-such/image:1"):
        await node.runtime.create(ContainerSpec(name=f"{node.id}-x", image="no-such/image:1"))
    with pytest.raises(NotFound, match="no container nobody"):
        await node.runtime.inspect("nobody")
    container = await node.runtime.create(spec(node, "twice", "sleep", "60"))
    with pytest.raises(Conflict, match=r"container named .*-twice"):
        await node.runtime.create(spec(node, "twice", "sleep", "60"))
    await node.runtime.start(container)
    with pytest.raises(Conflict):
        await node.runtime.remove(container)
    broken = await node.runtime.create(spec(node, "broken", "no-such-program"))
    with pytest.raises(PermanentError, match="no-such-program"):
        await node.runtime.start(broken)


async def test_registry_that_does_not_answer_may_do_so_later(runtime: DockerRuntime) -> None:
    with pytest.raises(TemporaryError, match=r"localhost:1/no/image:7 can't be pulled now.*refused") as caught:
        await runtime.pull_image("localhost:1/no/image:7")
    assert caught.value.code == "registry_unavailable"


async def test_engine_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    runtime = DockerRuntime(str(tmp_path / "none.sock"))
    try:
        with pytest.raises(EngineUnavailable, match="can't be reached: No such file"):
            await runtime.info()
        with pytest.raises(EngineUnavailable):
            async with runtime.attach("x"):
                pass
        with pytest.raises(EngineUnavailable):
            async for _ in runtime.logs("x"):
                pass
    finally:
        await runtime.aclose()


async def test_hung_engine_call_blocks_no_other_and_times_out(node: Node, tmp_path: Path) -> None:
    """An engine that accepts and never answers one kind of call: the others must not wait for it."""
    path = str(tmp_path / "half.sock")

    over = asyncio.Event()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(30):
            head = await reader.readuntil(b"\r\n\r\n")
            if b"/containers/hung/json" in head:
                await over.wait()
            else:
                inner_reader, inner_writer = await asyncio.open_unix_connection("/var/run/docker.sock")
                inner_writer.write(head[:-2] + b"Connection: close\r\n\r\n")
                writer.write(await inner_reader.read(-1))
                inner_writer.close()
        writer.close()

    server = await asyncio.start_unix_server(relay, path)
    runtime = DockerRuntime(path, call_timeout_s=3)
    try:
        hung = [asyncio.create_task(runtime.inspect("hung")) for _ in range(4)]
        started = time.monotonic()
        await runtime.list(labels={LABEL_NODE: node.id})
        assert time.monotonic() - started < 2
        for result in await asyncio.gather(*hung, return_exceptions=True):
            assert isinstance(result, OutriderError)
            assert "in time" in str(result)
    finally:
        over.set()
        await runtime.aclose()
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0.05)


async def test_port_taken_is_a_clear_sentence(node: Node) -> None:
    from agent_core.runtimes.base import PortBinding

    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        binding = PortBinding(80, port)
        container = await node.runtime.create(spec(node, "port", "sleep", "60", network="bridge", ports=(binding,)))
        with pytest.raises(Conflict, match=f"port {port} is taken"):
            await node.runtime.start(container)


async def test_events_tell_what_happens(node: Node) -> None:
    seen: list[str] = []

    async def listen() -> None:
        async with contextlib.aclosing(node.runtime.events()) as events:
            async for event in events:
                if event.labels.get(LABEL_NODE) == node.id:
                    seen.append(event.action)
                    if event.action == "destroy":
                        return

    task = asyncio.create_task(listen())
    await asyncio.sleep(0.3)
    container = await node.runtime.create(spec(node, "events", "true"))
    await node.runtime.start(container)
    await node.runtime.exited(container)
    await node.runtime.remove(container)
    await asyncio.wait_for(task, 10)
    assert seen == ["create", "start", "die", "destroy"]


async def test_inspect_leaves_the_values_of_envs_out(node: Node) -> None:
    container = await node.runtime.create(spec(node, "env", "true", env={"SECRET": "xyzzy-1234"}))
    info = await node.runtime.inspect(container)
    assert "xyzzy-1234" not in repr(info)
    assert "SECRET" in info.raw["Config"]["Env"]  # type: ignore[index]


async def test_boot_identity_is_steady(runtime: DockerRuntime) -> None:
    first, second = await runtime.info(), await runtime.info()
    assert first.boot == second.boot
    assert str(os.getpid()) not in first.boot.split("/")


async def test_a_name_leads_to_no_other_thing_of_the_engines(runtime: DockerRuntime) -> None:
    for name in ("../images/outrider/base:1", "../networks/bridge", "..", "a/b", ""):
        with pytest.raises(NotFound, match="no container"):
            await runtime.inspect(name)
    for image in ("../networks/bridge", "../images/outrider/base:1", "a//b"):
        with pytest.raises(InvalidInput, match="not the name of an image"):
            await runtime.find_image(image)


async def test_connections_to_the_engine_stay_few(runtime: DockerRuntime) -> None:
    """As many as there are calls at a time, whatever the paths; a pool for each path would take all descriptors."""

    async def ask(number: int) -> None:
        with contextlib.suppress(NotFound):
            await runtime.inspect(f"outrider-test-nobody-{number}")

    await ask(0)
    before = len(os.listdir("/proc/self/fd"))
    for group in range(10):
        await asyncio.gather(*(ask(group * 60 + number) for number in range(60)))
    assert len(os.listdir("/proc/self/fd")) - before <= 60
