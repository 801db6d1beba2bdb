"""Managed containers on the real engine: ports, readiness, adoption, and the steps that ask for them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from agent_core.container_spec import ContainerScope, GrantedVolume, ManagedSpec
from agent_core.containers import Containers
from agent_core.control import ControlSocket
from agent_core.policy import NodePolicy
from agent_core.ports import Ports
from agent_core.runtimes.base import LABEL_KIND, LABEL_NODE, ContainerSpec, Mount
from agent_core.runtimes.docker import DockerRuntime
from outrider.errors import Conflict, NotFound, PermanentError, PermissionDenied, PolicyViolation

if TYPE_CHECKING:
    from conftest import Node

BASE = "outrider/base:1"
SERVE = """
import http.server, os, sys
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/healthz" else 404); self.end_headers(); self.wfile.write(b"hi")
print("told port", os.environ.get("TOLD"), flush=True)
http.server.HTTPServer(("", 8080), H).serve_forever()
"""


def document(name: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "image": BASE,
        "args": ["python3", "-c", SERVE],
        "env": {"TOLD": "$(ports.http)"},
        "ports": [{"name": "http", "container": 8080}],
        "ready": {"http": {"port": "http", "path": "/healthz"}, "timeout_s": 20},
        "stop_signal": "SIGKILL",
        **more,
    }


async def scope_of(node: Node, run_id: str = "r1", object_ref: str | None = "game/a") -> ContainerScope:
    uid, gid = await node.identities.allot(f"object:{object_ref}" if object_ref else f"run:{run_id}")
    volume = await node.volumes.allot(run_id, object_ref, "saves", "run", False, None)
    return ContainerScope(run_id, "start", 1, object_ref, {"saves": GrantedVolume(volume.host_path, True)}, uid, gid)


async def get(url: str) -> str:
    return await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).read().decode())


async def test_managed_container_is_ready_when_started_and_adopted_when_asked_again(node: Node) -> None:
    name = f"{node.id}-web"
    scope = await scope_of(node)
    spec = ManagedSpec.parse(document(name, volumes={"saves": "/data:rw"}))
    started = await node.containers.start(spec, scope)
    port = started.ports["http"]
    assert 28600 <= port <= 28699
    assert await get(f"http://127.0.0.1:{port}/healthz") == "hi"
    output = b"".join([data async for _, data in node.containers.logs(name)])
    assert f"told port {port}".encode() in output

    again = await node.containers.start(spec, scope)
    assert (again.adopted, again.id, again.ports) == (True, started.id, started.ports)

    another_agent = Containers(node.runtime, node.journal, node.ports, node.volumes, node.policy, node.id)
    assert (await another_agent.start(spec, scope)).id == started.id

    with pytest.raises(Conflict, match="another specification"):
        await node.containers.start(ManagedSpec.parse(document(name)), scope)
    replaced = await node.containers.start(ManagedSpec.parse(document(name)), scope, replace=True)
    assert replaced.id != started.id

    info = await node.containers.inspect(name)
    host: Any = info.raw["HostConfig"]
    assert host["CapDrop"] == ["ALL"]
    assert host["ReadonlyRootfs"]
    assert "no-new-privileges" in host["SecurityOpt"]
    assert not host["Privileged"]
    assert host["LogConfig"]["Type"] == "local"
    assert info.raw["Config"]["User"] == f"{scope.uid}:{scope.gid}"  # type: ignore[index]


async def test_ports_are_kept_over_restarts_and_given_back_on_removal(node: Node) -> None:
    name = f"{node.id}-ports"
    scope = await scope_of(node)
    started = await node.containers.start(ManagedSpec.parse(document(name)), scope)
    port = started.ports["http"]
    await node.containers.restart(name, grace_s=0)
    listed = next(info for info in await node.containers.list() if info.name == name)
    assert [(p.name, p.host) for p in listed.ports] == [("http", port)]
    await node.containers.stop(name)
    assert node.ports.held(name) == {"http": port}
    await node.containers.start_existing(name)
    assert [p.host for p in (await node.containers.inspect(name)).ports] == [port]
    with pytest.raises(Conflict, match="is running"):
        await node.containers.remove(name)
    await node.containers.remove(name, force=True)
    assert node.ports.held(name) == {}
    with pytest.raises(NotFound):
        await node.containers.remove(name)


async def test_a_port_is_reached_on_its_interface_alone(node: Node) -> None:
    name = f"{node.id}-inside"
    policy = NodePolicy.model_validate(
        {"warm_none": 1, "ports": {"interface": "127.0.0.1", "interfaces": {"inside": "127.0.0.2"}}}
    )
    leases = Ports(node.journal, (28700, 28719), address="127.0.0.1", interfaces=policy.ports.interfaces)
    containers = Containers(node.runtime, node.journal, leases, node.volumes, policy, node.id)
    ports = [{"name": "http", "container": 8080, "interface": "inside"}, {"name": "usual", "container": 8080}]
    started = await containers.start(ManagedSpec.parse(document(name, ports=ports)), await scope_of(node))
    assert await get(f"http://127.0.0.2:{started.ports['http']}/healthz") == "hi"
    assert await get(f"http://127.0.0.1:{started.ports['usual']}/healthz") == "hi"
    for address, port in (("127.0.0.1", "http"), ("127.0.0.2", "usual")):
        with pytest.raises(urllib.error.URLError, match="refused"):
            await get(f"http://{address}:{started.ports[port]}/healthz")
    await containers.remove(name, force=True)


async def test_volume_outlives_its_run_while_a_container_mounts_it(node: Node) -> None:
    name = f"{node.id}-vol"
    scope = await scope_of(node)
    path = Path(scope.volumes["saves"].host_path)
    await node.containers.start(ManagedSpec.parse(document(name, volumes={"saves": "/data"})), scope)
    await node.volumes.release_run("r1")
    assert path.is_dir()
    await node.containers.remove(name, force=True)
    assert not path.exists()


async def test_what_does_not_get_ready_is_removed_and_shows_its_last_lines(node: Node) -> None:
    name = f"{node.id}-never"
    scope = await scope_of(node)
    args = ["sh", "-c", "echo no map of that name; exec sleep 60"]
    never = document(name, args=args, ready={"http": {"port": "http"}, "timeout_s": 1})
    with pytest.raises(PermanentError, match=r"not ready within 1 s(.|\n)*no map of that name"):
        await node.containers.start(ManagedSpec.parse(never), scope)
    crash = document(name, args=["sh", "-c", "echo out of cheese; exit 4"], ready={"log": "ready", "timeout_s": 20})
    started = time.monotonic()
    with pytest.raises(PermanentError, match=r"ended with exit code 4(.|\n)*out of cheese"):
        await node.containers.start(ManagedSpec.parse(crash), scope)
    assert time.monotonic() - started < 10
    assert not [info for info in await node.containers.list() if info.name == name]
    assert node.ports.held(name) == {}


@pytest.mark.parametrize(("named", "code"), [("SIGUSR1", 10), ("USR1", 10), (None, 15)])
async def test_stop_signal_that_is_named_is_the_one_that_is_delivered(node: Node, named: str | None, code: int) -> None:
    """Each signal ends the program with a code of its own; killed after the grace it would be 137."""
    script = "trap 'exit 10' USR1; trap 'exit 15' TERM; echo up; while :; do sleep 0.1; done"
    spec = ManagedSpec.parse(
        {"name": f"{node.id}-signal", "image": BASE, "args": ["sh", "-c", script], "ready": {"log": "up"}}
        | {"stop_signal": named, "stop_grace_s": 20}
    )
    await node.containers.start(spec, await scope_of(node))
    assert (await node.containers.stop(spec.name)).exit_code == code
    await node.containers.start_existing(spec.name)
    restarted = await node.containers.restart(spec.name)  # which stops it the same way
    assert restarted.state == "running"


async def test_readiness_by_connection_does_not_believe_the_port_proxy(node: Node) -> None:
    """The engine's proxy accepts on the published port at once; nothing listens in the container for a second."""
    late = "import socket,time; time.sleep(1.5); s=socket.socket(); s.bind(('',8080)); s.listen(); time.sleep(60)"
    spec = document(f"{node.id}-late", args=["python3", "-c", late], ready={"tcp": {"port": "http"}, "timeout_s": 20})
    started = time.monotonic()
    await node.containers.start(ManagedSpec.parse(spec), await scope_of(node))
    assert time.monotonic() - started > 1.5


async def test_port_asked_for_that_is_taken_is_a_clear_sentence(node: Node) -> None:
    with socket.socket() as taken:
        for port in range(28690, 28700):
            with contextlib.suppress(OSError):
                taken.bind(("0.0.0.0", port))
                break
        spec = document(f"{node.id}-taken", ports=[{"name": "http", "container": 8080, "host": port}])
        with pytest.raises(Conflict, match=f"port {port}/tcp is taken by another program"):
            await node.containers.start(ManagedSpec.parse(spec), await scope_of(node))
    assert not [info for info in await node.containers.list() if info.name == spec["name"]]


async def test_others_containers_are_listed_and_left_alone(node: Node) -> None:
    name = f"{node.id}-theirs"
    container = await node.runtime.create(ContainerSpec(name=name, image=BASE, args=("sleep", "60")))
    try:
        info = next(info for info in await node.containers.list() if info.name == name)
        assert node.containers.owner(info) == "foreign"
        for attempt in (node.containers.stop(name), node.containers.remove(name, force=True)):
            with pytest.raises(PolicyViolation, match="not started by Outrider"):
                await attempt
        with pytest.raises(Conflict, match="not Outrider's to use"):
            await node.containers.start(ManagedSpec.parse(document(name)), await scope_of(node))
        trusting = node.policy.model_copy(update={"control_foreign": True})
        allowed = Containers(node.runtime, node.journal, node.ports, node.volumes, trusting, node.id)
        await allowed.remove(name)
    finally:
        await node.runtime.remove(container, force=True)


async def test_scope_reaches_its_own_object_only(node: Node) -> None:
    name = f"{node.id}-mine"
    await node.containers.start(ManagedSpec.parse(document(name)), await scope_of(node))
    other = await scope_of(node, "r2", "game/b")
    with pytest.raises(PermissionDenied, match="belongs to the object game/a"):
        await node.containers.stop(name, scope=other)
    assert await node.containers.list(other) == []
    later = await scope_of(node, "r3", "game/a")
    assert (await node.containers.stop(name, scope=later)).state == "exited"


async def run_step(node: Node, scope: ContainerScope, directory: Path, action: str, inputs: dict[str, Any]) -> int:
    """One attempt of a container step, as the agent runs it: its image in the sandbox, with the control socket."""
    directory.mkdir(parents=True)
    os.chown(directory, scope.uid, scope.gid)
    (directory / "inputs.json").write_text(json.dumps(inputs))
    control = ControlSocket(node.containers, scope, directory)
    await control.start()
    spec = ContainerSpec(
        name=f"{node.id}-{action}-{secrets.token_hex(3)}",
        image="outrider/step-container:0.1.0",
        args=(action,),
        env={"OUTRIDER_CONTROL": "/outrider/control.sock", "OUTRIDER_CONTRACT": "1", "SECRET": "s3cr3t-value"},
        labels={LABEL_NODE: node.id, LABEL_KIND: "step"},
        mounts=(Mount(str(directory), "/outrider", writable=True),),
        user=f"{scope.uid}:{scope.gid}",
    )
    container = await node.runtime.create(spec)
    await node.runtime.start(container)
    end = await node.runtime.exited(container)
    await control.aclose(attempt_over=True)
    return end.exit_code


async def test_steps_start_and_stop_through_their_control_socket(node: Node) -> None:
    import outrider_step_container as plugin

    from outrider.steps import StepContext

    types = {step_type.name: step_type for step_type in plugin.outrider_step_types()}
    context = StepContext(run_id="r1", step="start")
    scope = await scope_of(node)
    # The directory of an attempt is deeper than the path of a Unix socket may be long.
    deep = node.root / ("d" * 60) / ("e" * 60)
    name = f"{node.id}-game"
    start = types["container.start"]
    params = start.params.model_validate(
        {
            "name": name,
            "image": BASE,
            "args": ["python3", "-c", SERVE],
            "env_from": ["SECRET"],
            "ports": [{"name": "http", "container": 8080}],
            "ready": {"log": "told port", "timeout": "20s"},
            "volumes": {"saves": "/data:rw"},
            "stop_signal": "SIGKILL",
        }
    )
    plan = start.resolve(params, context)
    inputs = json.loads(json.dumps(plan.inputs))
    assert await run_step(node, scope, deep / "1", plan.args[0], inputs) == 0
    outputs = start.outputs.model_validate_json((deep / "1" / "outputs").read_text())
    assert await get(f"http://127.0.0.1:{outputs.ports['http']}/healthz") == "hi"  # type: ignore[attr-defined]

    stop = types["container.stop"]
    stop_plan = stop.resolve(stop.params.model_validate({"name": name, "remove": True}), context)
    assert await run_step(node, scope, deep / "2", stop_plan.args[0], json.loads(json.dumps(stop_plan.inputs))) == 0
    assert json.loads((deep / "2" / "outputs").read_text())["state"] == "removed"
    assert await run_step(node, scope, deep / "3", stop_plan.args[0], json.loads(json.dumps(stop_plan.inputs))) == 1
    assert f"no container {name}" in (deep / "3" / "progress").read_text()


TAIL = """
import asyncio, sys
from agent_core.runtimes.docker import DockerRuntime
async def main():
    runtime = DockerRuntime()
    total = 0
    async for _, data in runtime.logs(sys.argv[1], follow=True):
        total += len(data)
        print(total, flush=True)
    await runtime.aclose()
asyncio.run(main())
"""


LOUD = """
import sys, time
time.sleep(2)
for _ in range(32 * 1024):
    sys.stdout.buffer.write(b"x" * 1023 + b"\\n")
"""


async def test_stopped_reader_of_its_log_does_not_freeze_a_managed_container(node: Node) -> None:
    args = ["python3", "-c", LOUD]
    spec = document(f"{node.id}-loud", args=args, ready=None, restart="no", ports=[], env={})
    started = await node.containers.start(ManagedSpec.parse(spec), await scope_of(node))
    reader = await asyncio.to_thread(
        subprocess.Popen, [sys.executable, "-c", TAIL, started.id], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert reader.stdout is not None
        assert await asyncio.to_thread(reader.stdout.readline)  # it reads: now it is stopped
        os.kill(reader.pid, signal.SIGSTOP)
        end = await asyncio.wait_for(node.containers.wait(started.id), 60)
        assert end.exit_code == 0
        before = time.monotonic()
        await node.containers.inspect(started.id)
        assert time.monotonic() - before < 2
    finally:
        reader.kill()
        reader.wait()
        if reader.stdout:
            reader.stdout.close()


async def test_agent_that_comes_back_serves_the_same_socket_again(node: Node, runtime: DockerRuntime) -> None:
    from outrider_stepkit.control import ControlClient

    scope = await scope_of(node)
    directory = node.root / "attempt"
    directory.mkdir()
    first = ControlSocket(node.containers, scope, directory)
    await first.start()
    await first.aclose(attempt_over=False)
    second = ControlSocket(node.containers, scope, directory)
    await second.start()
    try:
        client = ControlClient(str(directory / "control.sock"))
        assert await asyncio.to_thread(client.list) == {"containers": []}
        stat = os.stat(directory / "control.sock")
        assert (stat.st_uid, stat.st_gid, stat.st_mode & 0o777) == (scope.uid, scope.gid, 0o600)
    finally:
        await second.aclose(attempt_over=True)
