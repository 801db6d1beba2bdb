"""What the agent does for a managed container beyond starting it, on the real engine: it is watched and restarted,
gives way to its successor, has programs run inside it, files, a network of its object's own, and ports of both kinds.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from agent_core.container_spec import ContainerScope, GrantedVolume, ManagedSpec
from agent_core.control import ControlSocket
from agent_core.execs import ExecRequest, Executed
from agent_core.liveness import Supervisor
from agent_core.policy import NodePolicy
from agent_core.runtimes.base import LABEL_KIND, LABEL_NODE, ContainerSpec, Mount
from outrider.errors import Conflict, OperationTimeout, PermanentError, PolicyViolation

if TYPE_CHECKING:
    from conftest import Node

BASE = "outrider/base:1"
IDLE = "trap 'exit 0' TERM; while :; do sleep 0.1; done"
JOB = """
i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done
while [ ! -e /data/go ]; do sleep 0.1; done
exit 7
"""
DEAF = """
import socket, time
s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(("", 7000)); s.listen()
time.sleep(3); s.close(); time.sleep(3600)
"""
ECHO = """
import os, socket, threading
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(("", 7000))
t = socket.socket(); t.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); t.bind(("", 7000)); t.listen()
def datagrams():
    while True:
        data, who = u.recvfrom(100); u.sendto(b"udp " + data, who)
threading.Thread(target=datagrams, daemon=True).start()
print("up", flush=True)
while True:
    c, _ = t.accept(); c.sendall(b"tcp " + os.environ.get("VERSION", "").encode()); c.close()
"""


@pytest.fixture
def policy() -> NodePolicy:
    return NodePolicy.model_validate(
        {"ports": {"range": "28500-28599"}, "warm_none": 1, "managed": {"devices": ["/dev/zero"]}}
    )


@dataclass
class Watched:
    node: Node
    supervisor: Supervisor
    events: list[tuple[str, str, Mapping[str, Any]]] = field(default_factory=list)


@contextlib.asynccontextmanager
async def supervised(node: Node) -> AsyncIterator[Watched]:
    """The node with its supervision, as an agent has it."""
    events: list[tuple[str, str, Mapping[str, Any]]] = []

    async def emit(kind: str, subject: str, data: Mapping[str, Any]) -> None:
        events.append((kind, subject, data))

    async def available() -> None:
        await node.runtime.info()

    supervisor = Supervisor(node.runtime, node.containers, emit, available)

    async def listen() -> None:
        async for event in node.runtime.events():
            supervisor.heard(event)

    tasks = [asyncio.create_task(supervisor.run()), asyncio.create_task(listen())]
    yield Watched(node, supervisor, events)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
async def watched(node: Node) -> AsyncIterator[Watched]:
    async with supervised(node) as watched:
        yield watched


async def until(holds: Callable[[], Awaitable[Any]], what: str, within_s: float = 60.0) -> Any:
    deadline = time.monotonic() + within_s
    while not (found := await holds()):
        assert time.monotonic() < deadline, f"{what} did not come to hold"
        await asyncio.sleep(0.1)
    return found


async def scope_of(node: Node, step: str = "start", secrets_: tuple[str, ...] = ()) -> ContainerScope:
    uid, gid = await node.identities.allot("object:game/a")
    volume = await node.volumes.allot("r1", "game/a", "saves", "run", False, None)
    return ContainerScope("r1", step, 1, "game/a", {"saves": GrantedVolume(volume.host_path, True)}, uid, gid, secrets_)


def document(name: str, **more: Any) -> ManagedSpec:
    return ManagedSpec.parse({"name": name, "image": BASE, "args": ["sh", "-c", IDLE], "stop_grace_s": 1, **more})


async def run_in(node: Node, name: str, *args: str, **more: Any) -> tuple[int, str]:
    """A program inside a container: its exit code and all that it prints."""
    said, code = b"", -1
    request = ExecRequest.parse({"args": list(args), **more})
    async for item in node.containers.execute(name, request, await scope_of(node)):
        if isinstance(item, Executed):
            code = item.exit_code
        else:
            said += item[1]
    return code, said.decode()


async def test_what_is_not_alive_any_more_is_restarted_long_after_its_step_has_ended(watched: Watched) -> None:
    node, name = watched.node, f"{watched.node.id}-sick"
    spec = document(
        name,
        args=["sh", "-c", "echo up; touch /tmp/alive; " + IDLE],
        ready={"exec": {"args": ["test", "-e", "/tmp/alive"]}},
        live={"exec": {"args": ["test", "-e", "/tmp/alive"]}, "interval_s": 1, "failures": 2, "grace_s": 60},
    )
    started = await node.containers.start(spec, await scope_of(node))

    async def health() -> str:
        return (await node.containers.inspect(name)).health

    await until(lambda: _is(health, "live"), "the container live")
    before = await node.containers.inspect(name)
    assert (await run_in(node, name, "rm", "/tmp/alive"))[0] == 0
    after = await until(lambda: _restarted(node, name, before.started_at), "the restart")
    assert after.id == started.id
    await until(lambda: _is(health, "live"), "the container live again")
    [(kind, subject, data)] = [each for each in watched.events if each[0] == "container.restarted"]
    assert (kind, subject, data["restarts"]) == ("container.restarted", name, 1)
    assert "test ended with exit code 1" in data["reason"]
    # What somebody stops stays stopped.
    await node.containers.stop(name)
    await asyncio.sleep(1.5)
    assert (await node.containers.inspect(name)).state == "exited"


async def test_a_line_of_the_log_that_was_printed_while_no_agent_watched_counts_once(node: Node) -> None:
    """And not for the next run of the container: the engine's log has the lines of both."""
    name = f"{node.id}-unheard"
    script = "[ -e /data/told ] || { touch /data/told; echo FATAL ERROR; }; " + IDLE
    spec = document(name, args=["sh", "-c", script], volumes={"saves": "/data:rw"}, live={"log": "FATAL ERROR"})
    await node.containers.start(spec, await scope_of(node))
    before = await node.containers.inspect(name)
    async with supervised(node) as watched:
        after = await until(lambda: _restarted(node, name, before.started_at), "the restart")
        await asyncio.sleep(1.5)
        assert [each[0] for each in watched.events] == ["container.restarted"]
    async with supervised(node) as watched:  # the next agent
        await asyncio.sleep(1.5)
        assert watched.events == []
    assert (await node.containers.inspect(name)).started_at == after.started_at


async def _is(get: Callable[[], Awaitable[str]], wanted: str) -> bool:
    return await get() == wanted


async def _restarted(node: Node, name: str, before: Any) -> Any:
    info = await node.containers.inspect(name)
    return info if info.state == "running" and info.started_at != before else None


@pytest.mark.long
async def test_a_log_line_or_a_port_can_tell_that_it_is_broken_and_a_limit_ends_the_restarts(watched: Watched) -> None:
    node = watched.node
    said = f"{node.id}-said"
    script = "echo up; sleep 1; echo FATAL ERROR; " + IDLE
    await node.containers.start(
        document(said, args=["sh", "-c", script], live={"log": "FATAL ERROR", "grace_s": 0},
                 restart={"policy": "always", "max": 1, "first_wait_s": 0.1}),
        await scope_of(node),
    )  # fmt: skip

    async def given_up() -> list[Any]:
        return [each for each in watched.events if each[:2] == ("container.unhealthy", said)]

    [(_, _, data)] = await until(given_up, "the end of the restarts")
    assert data == {"reason": "its log says 'FATAL ERROR'", "restarts": 1}
    assert [each for each in watched.events if each[:2] == ("container.restarted", said)]
    info = await node.containers.inspect(said)
    assert (info.state, info.health) == ("running", "failed")

    deaf = f"{node.id}-deaf"
    await node.containers.start(
        document(deaf, args=["python3", "-c", DEAF], ports=[{"name": "game", "container": 7000}],
                 ready={"tcp": {"port": "game"}}, stop_signal="SIGKILL",
                 live={"tcp": {"port": "game"}, "interval_s": 1, "failures": 2, "grace_s": 0}),
        await scope_of(node),
    )  # fmt: skip

    async def restarted() -> list[Any]:
        return [each for each in watched.events if each[:2] == ("container.restarted", deaf)]

    [(_, _, data), *_] = await until(restarted, "the restart of the one that does not listen any more")
    assert data["reason"] == "nothing accepted a connection on its port game"


async def test_a_successor_that_is_started_first_takes_name_and_supervision_and_the_port_is_never_dead(
    node: Node,
) -> None:
    name = f"{node.id}-web"
    scope = await scope_of(node)

    def version(number: int, **more: Any) -> ManagedSpec:
        return document(
            name,
            args=["python3", "-c", ECHO],
            env={"VERSION": str(number)},
            ports=[{"name": "game", "container": 7000, "protocol": "tcp+udp"}],
            ready={"tcp": {"port": "game"}, "timeout_s": 30},
            stop_signal="SIGKILL",
            **more,
        )

    first = await node.containers.start(version(1), scope)
    port = first.ports["game"]
    assert await asyncio.to_thread(_tcp, port) == b"tcp 1"
    assert await asyncio.to_thread(_udp, port) == b"udp hello"  # one number, both protocols

    second = await node.containers.start(version(2), scope, replace="start-first")
    assert (second.name, second.replaced, second.id != first.id) == (name, True, True)
    assert second.ports["game"] != port
    assert await asyncio.to_thread(_tcp, second.ports["game"]) == b"tcp 2"
    listed = [info.name for info in await node.containers.list(scope)]
    assert listed == [name]
    assert node.ports.held(name) == second.ports
    assert (await node.containers.start(version(2), scope)).adopted  # the same as if it had always been there

    third = await node.containers.start(version(3), scope, replace="stop-first")
    assert third.ports == second.ports  # they wait for the successor
    assert await asyncio.to_thread(_tcp, third.ports["game"]) == b"tcp 3"

    never = document(name, ready={"log": "never", "timeout_s": 1})
    with pytest.raises(PermanentError, match="not ready") as failed:
        await node.containers.start(never, scope, replace="stop-first")
    assert "the former container runs again" in str(failed.value)
    assert (await node.containers.inspect(name)).id == third.id
    await until(lambda: _says(third.ports["game"], b"tcp 3"), "the former container serving again")
    fixed = document(name, ports=[{"name": "game", "container": 7000, "host": third.ports["game"]}])
    with pytest.raises(Conflict, match="can't be two containers' at a time"):
        await node.containers.start(fixed, scope, replace="start-first")
    await node.containers.remove(name, force=True)
    assert node.ports.held(name) == {}
    await until(lambda: _reaped(node), "the kernel letting go of the ports")


async def _says(port: int, wanted: bytes) -> bool:
    with contextlib.suppress(OSError):
        return await asyncio.to_thread(_tcp, port) == wanted
    return False


async def _reaped(node: Node) -> bool:
    await node.ports.reap()
    return not node.ports.releasing()


def _tcp(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        return connection.recv(100)


def _udp(port: int) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.settimeout(2)
        for _ in range(10):
            sender.sendto(b"hello", ("127.0.0.1", port))
            with contextlib.suppress(TimeoutError):
                return sender.recv(100)
    raise AssertionError("no answer over udp")


async def test_containers_of_one_object_find_one_another_on_a_network_of_their_own(node: Node) -> None:
    scope = await scope_of(node)
    server, client, alone = (f"{node.id}-{name}" for name in ("db", "game", "alone"))
    await node.containers.start(
        document(
            server, args=["python3", "-c", ECHO], network="none", private_network=True, aliases=["database"],
            ready={"log": "up"}, stop_signal="SIGKILL",
        ),
        scope,
    )  # fmt: skip
    await node.containers.start(document(client, private_network=True), scope)
    await node.containers.start(document(alone), scope)
    ask = "import socket; print(socket.create_connection(('{}', 7000), timeout=3).recv(9).decode())"
    for host in ("database", server):
        assert await run_in(node, client, "python3", "-c", ask.format(host)) == (0, "tcp \n"), host
    assert (await run_in(node, alone, "python3", "-c", ask.format(server)))[0] == 1
    assert len(await node.runtime.list_networks(labels={LABEL_NODE: node.id, LABEL_KIND: "private"})) == 1
    for name in (server, client, alone):
        await node.containers.remove(name, force=True)
    assert await node.runtime.list_networks(labels={LABEL_NODE: node.id, LABEL_KIND: "private"}) == []


async def test_files_are_the_containers_alone_and_what_is_secret_in_them_is_masked_in_its_log(node: Node) -> None:
    name, secret = f"{node.id}-files", "pa55word-of-the-console"
    scope = await scope_of(node, secrets_=(secret,))
    spec = document(
        name,
        args=["sh", "-c", "cat /etc/game/server.cfg; stat -c '%u %a' /etc/game/server.cfg; /run/hello; " + IDLE],
        ports=[{"name": "game", "protocol": "udp"}],
        files={
            "/etc/game/server.cfg": {"text": f"port $(ports.game)\nrcon {secret}\nliteral $$(ports.game)\n"},
            "/run/hello": {"text": "#!/bin/sh\necho hello from a file\n", "executable": True},
        },
        ready={"log": "hello from a file"},
        labels={"team": "blue"},
        devices=["/dev/zero:/dev/nothing:r"],
        restart={"policy": "on-failure", "max": 3},
    )
    started = await node.containers.start(spec, scope)
    said = b"".join([data async for _, data in node.containers.logs(name)]).decode()
    assert said == (
        f"port {started.ports['game']}\nrcon ***\nliteral $(ports.game)\n{scope.uid} 400\nhello from a file\n"
    )
    info = await node.containers.inspect(name)
    assert info.labels["team"] == "blue"
    host: Any = info.raw["HostConfig"]
    assert host["RestartPolicy"] == {"Name": "on-failure", "MaximumRetryCount": 3}
    assert await run_in(node, name, "sh", "-c", "head -c 3 /dev/nothing | wc -c") == (0, "3\n")
    with pytest.raises(PolicyViolation, match="the device /dev/mem"):
        await node.containers.start(document(f"{name}-2", devices=["/dev/mem"]), scope)
    assert (await run_in(node, name, "sh", "-c", "echo x >> /etc/game/server.cfg"))[0] != 0
    await node.containers.restart(name, grace_s=0)
    paths = [Path(mount.source) for mount in info.mounts if mount.target.startswith(("/etc", "/run"))]
    assert len(paths) == 2
    assert all(path.exists() for path in paths)
    assert oct(paths[0].parent.stat().st_mode & 0o777) == "0o700"
    await node.containers.remove(name, force=True)
    assert not any(path.exists() for path in paths)


@pytest.mark.long
async def test_a_program_inside_a_container_runs_once_and_is_killed_when_its_time_is_over(node: Node) -> None:
    name = f"{node.id}-exec"
    await node.containers.start(document(name, volumes={"saves": "/data:rw"}), await scope_of(node))
    script = "echo run >> /data/runs; echo out; echo err >&2; exit 3"
    code, said = await run_in(node, name, "sh", "-c", script, id="one")
    assert code == 3
    assert sorted(said.split()) == ["err", "out"]
    assert (await run_in(node, name, "sh", "-c", script, id="one"))[0] == 3  # asked again: not run again
    assert await run_in(node, name, "cat", "/data/runs") == (0, "run\n")
    with pytest.raises(Conflict, match="something else was asked"):
        await run_in(node, name, "true", id="one")
    begun = time.monotonic()
    with pytest.raises(OperationTimeout, match="did not end within 1 s, and was killed"):
        await run_in(node, name, "sleep", "1000", timeout_s=1)
    assert time.monotonic() - begun < 20
    _, processes = await run_in(node, name, "sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
    assert "sleep 1000" not in processes
    with pytest.raises(PolicyViolation, match="the user 0"):
        await run_in(node, name, "id", user="0")
    waiting = asyncio.create_task(run_in(node, name, "sleep", "1000", id="late"))
    await until(lambda: _runs(node, name, "sleep 1000"), "the program running")
    await node.containers.end_attempt(await scope_of(node))
    assert not await _runs(node, name, "sleep 1000")
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await node.containers.stop(name)
    with pytest.raises(Conflict, match="is exited, so nothing can be run inside it"):
        await run_in(node, name, "true")


async def _runs(node: Node, name: str, what: str) -> bool:
    _, processes = await run_in(node, name, "sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
    return what in processes.replace("cat /proc", "")


@dataclass
class Ended:
    exit_code: int
    outputs: dict[str, Any]
    progress: str
    log: str


async def carry_out(node: Node, scope: ContainerScope, params: Mapping[str, Any], **env: str) -> Ended:
    """One step of the container plugin as the agent runs it: resolved, in its image, in the sandbox."""
    import outrider_step_container as plugin

    from outrider.steps import StepContext

    uses = next(each for each in plugin.outrider_step_types() if each.name == f"container.{scope.step}")
    plan = uses.resolve(uses.params.model_validate(params), StepContext(run_id="r1", step=scope.step))
    directory = node.root / f"attempt-{secrets.token_hex(4)}"
    directory.mkdir()
    os.chown(directory, scope.uid, scope.gid)
    (directory / "inputs.json").write_text(json.dumps(plan.inputs))
    control = ControlSocket(node.containers, scope, directory)
    await control.start()
    saves = scope.volumes["saves"].host_path
    container = await node.runtime.create(
        ContainerSpec(
            name=f"{node.id}-step-{secrets.token_hex(3)}",
            image=plan.image,
            args=plan.args,
            env={"OUTRIDER_CONTROL": "/outrider/control.sock", "OUTRIDER_CONTRACT": "1", **env},
            labels={LABEL_NODE: node.id, LABEL_KIND: "step"},
            mounts=(Mount(str(directory), "/outrider", writable=True), Mount(saves, "/saves", writable=True)),
            user=f"{scope.uid}:{scope.gid}",
        )
    )
    await node.runtime.start(container)
    end = await node.runtime.exited(container)
    log = b"".join([data async for _, data in node.runtime.logs(container)]).decode()
    await control.aclose(attempt_over=True)
    outputs: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (directory / "outputs").read_text().splitlines():
            outputs |= json.loads(line)
    progress = (directory / "progress").read_text() if (directory / "progress").exists() else ""
    return Ended(end.exit_code, outputs, progress, log)


async def test_the_steps_exec_wait_and_logs(node: Node) -> None:
    name = f"{node.id}-job"
    start = await scope_of(node, "start", ("the-secret-token",))
    params = {
        "name": name,
        "image": BASE,
        "args": ["sh", "-c", "cat /etc/job.cfg; " + JOB],
        "files": {"/etc/job.cfg": "token $(envs.TOKEN) in a file\n"},
        "volumes": {"saves": "/data:rw"},
        "restart": "no",
        "ready": {"log": "line 1999"},
    }  # fmt: skip
    ended = await carry_out(node, start, params, TOKEN="the-secret-token")
    assert ended.exit_code == 0, ended
    assert ended.outputs["host_paths"] == {"saves": start.volumes["saves"].host_path}

    run = {"name": name, "args": ["sh", "-c", "echo count $WHAT; exit 4"], "env": {"WHAT": "it"}, "capture": True}
    ended = await carry_out(node, await scope_of(node, "exec"), run | {"ok": [4]})
    assert (ended.exit_code, ended.outputs) == (0, {"exit_code": 4, "stdout": "count it"})
    ended = await carry_out(node, await scope_of(node, "exec"), run)
    assert ended.exit_code == 1
    assert "ended with exit code 4" in ended.progress

    await run_in(node, name, "touch", "/data/go")
    ended = await carry_out(node, await scope_of(node, "wait"), {"name": name})
    assert ended.exit_code == 1
    assert f"the container {name} ended with exit code 7" in ended.progress
    ended = await carry_out(node, await scope_of(node, "wait"), {"name": name, "ok": None})
    assert (ended.exit_code, ended.outputs["exit_code"]) == (0, 7)

    ended = await carry_out(node, await scope_of(node, "logs"), {"name": name, "to": "/saves/logs/job.log"})
    assert ended.exit_code == 0, ended
    wanted = "token *** in a file\n" + "".join(f"line {i}\n" for i in range(2000))
    written = (Path(start.volumes["saves"].host_path) / "logs" / "job.log").read_bytes()
    assert written.decode() == wanted
    assert ended.outputs == {
        "path": "/saves/logs/job.log", "size_bytes": len(written), "sha256": hashlib.sha256(written).hexdigest(),
    }  # fmt: skip
