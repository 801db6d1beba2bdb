"""The sandbox of a step and of a managed container, looked at from the inside."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from agent_core.container_spec import ContainerScope, GrantedVolume, ManagedSpec
from agent_core.runtimes.base import LABEL_KIND, LABEL_NODE, ContainerSpec, Mount

if TYPE_CHECKING:
    from conftest import Node

BASE = "outrider/base:1"

LOOK = r"""
import json, os, resource, socket, sys, time
def status():
    return dict(line.split(":\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\t" in line)
def attempt(work):
    try:
        work()
        return "done"
    except OSError as error:
        return os.strerror(error.errno)
def connect():
    socket.create_connection(("192.0.2.1", 80), timeout=3)
s = status()
print(json.dumps({
    "uid": os.getuid(), "gid": os.getgid(), "groups": os.getgroups(),
    "caps": {k: int(s[k].strip(), 16) for k in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")},
    "no_new_privs": s["NoNewPrivs"].strip(), "seccomp": s["Seccomp"].strip(),
    "mounts": [line.split()[4:6] for line in open("/proc/self/mountinfo")],
    "env": dict(os.environ),
    "interfaces": sorted(name for _, name in socket.if_nameindex()),
    "write_root": attempt(lambda: open("/x", "w")), "write_etc": attempt(lambda: open("/etc/passwd", "a")),
    "write_tmp": attempt(lambda: open("/tmp/x", "w").write("x")),
    "write_rw": attempt(lambda: open("/rw/x", "w").write("x")), "write_ro": attempt(lambda: open("/ro/x", "w")),
    "read_ro": attempt(lambda: open("/ro/given").read()),
    "tmp_bytes": os.statvfs("/tmp").f_blocks * os.statvfs("/tmp").f_frsize,
    "connect": attempt(connect), "processes": [p for p in os.listdir("/proc") if p.isdigit()],
    "sockets": [p for p in ("/var/run/docker.sock", "/run/docker.sock") if os.path.exists(p)],
    "limits": {n: open(p).read().strip() for n, ps in LIMITS.items() for p in ps if os.path.exists(p)},
    "core": resource.getrlimit(resource.RLIMIT_CORE),
    "namespaces": {name: os.readlink(f"/proc/self/ns/{name}") for name in NAMESPACES},
}), flush=True)
if "stay" in sys.argv:
    time.sleep(1000)
"""
LIMITS = {
    "memory": ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"],
    "pids": ["/sys/fs/cgroup/pids.max", "/sys/fs/cgroup/pids/pids.max"],
    "cpu": ["/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us"],
    # Only version 2 counts swap by itself. A kernel may not count it at all, and has none of these files.
    "swap": ["/sys/fs/cgroup/memory.swap.max"],
    "memory_and_swap": ["/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes"],
}
NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "uts")
PROGRAM = f"LIMITS, NAMESPACES = {LIMITS!r}, {NAMESPACES!r}\n{LOOK}"


async def look(node: Node, **options: Any) -> dict[str, Any]:
    spec = ContainerSpec(
        name=f"{node.id}-look",
        image=BASE,
        args=("python3", "-c", PROGRAM),
        labels={LABEL_NODE: node.id, LABEL_KIND: "step"},
        memory_bytes=64 * 1024**2,
        cpus=0.5,
        pids=32,
        **options,
    )
    container = await node.runtime.create(spec)
    output = b""
    async with node.runtime.attach(container) as pieces:
        await node.runtime.start(container)
        async for _, data in pieces:
            output += data
    end = await node.runtime.exited(container)
    assert end.exit_code == 0, output.decode()
    answer: dict[str, Any] = json.loads(output)
    return answer


@pytest.fixture
async def seen(node: Node) -> dict[str, Any]:
    uid, gid = await node.identities.allot("object:game/a")
    writable = await node.volumes.allot("r1", "game/a", "rw", "object", True, None)
    given = await node.volumes.allot("r1", "game/a", "ro", "run", False, None)
    (Path(given.host_path) / "given").write_text("read me")
    seen = await look(
        node,
        user=f"{uid}:{gid}",
        env={"ONE": "1", "HOME": "/tmp"},
        mounts=(Mount(writable.host_path, "/rw", writable=True), Mount(given.host_path, "/ro")),
    )
    written = os.stat(Path(writable.host_path) / "x")
    assert (written.st_uid, written.st_gid) == (uid, gid)
    return seen | {"expected": (uid, gid)}


async def test_step_runs_as_the_allotted_user_without_any_privilege(seen: dict[str, Any]) -> None:
    has_no_privilege(seen)


def has_no_privilege(seen: dict[str, Any]) -> None:
    assert (seen["uid"], seen["gid"]) == seen["expected"]
    assert seen["uid"] >= 200_000
    assert set(seen["groups"]) <= {seen["gid"]}
    assert set(seen["caps"].values()) == {0}
    assert seen["no_new_privs"] == "1"
    assert seen["seccomp"] == "2"  # proc(5): a filter, the engine's default profile
    assert seen["sockets"] == []
    assert seen["processes"] == ["1"]


async def test_step_sees_exactly_its_mounts_in_their_mode(seen: dict[str, Any]) -> None:
    sees_exactly_its_mounts(seen)
    has_a_tmp_of_its_own(seen, 64 * 1024**2)


def sees_exactly_its_mounts(seen: dict[str, Any]) -> None:
    system = {"/", "/etc/resolv.conf", "/etc/hostname", "/etc/hosts"}
    mounts = {path: options.split(",")[0] for path, options in seen["mounts"]}
    own = {p: m for p, m in mounts.items() if p not in system and not p.startswith(("/proc", "/sys", "/dev"))}
    assert own == {"/tmp": "rw", "/rw": "rw", "/ro": "ro"}
    assert mounts["/"] == "ro"
    assert seen["write_root"] == "Read-only file system"
    assert seen["write_etc"] in ("Read-only file system", "Permission denied")
    assert seen["write_tmp"] == "done"
    assert seen["write_rw"] == "done"
    assert seen["write_ro"] == "Read-only file system"
    assert seen["read_ro"] == "done"


async def test_step_sees_exactly_its_envs(seen: dict[str, Any], runtime: Any) -> None:
    import docker

    image = docker.APIClient().inspect_image(BASE)["Config"]["Env"]
    from_image = dict(variable.split("=", 1) for variable in image)
    assert seen["env"] == from_image | {"HOSTNAME": seen["env"]["HOSTNAME"], "ONE": "1", "HOME": "/tmp"}


async def test_step_without_a_network_class_reaches_nothing(seen: dict[str, Any]) -> None:
    reaches_nothing(seen)


def reaches_nothing(seen: dict[str, Any]) -> None:
    assert seen["interfaces"] == ["lo"]
    assert seen["connect"] == "Network is unreachable"


async def test_step_is_limited(seen: dict[str, Any]) -> None:
    is_limited(seen, memory=64 * 1024**2, pids=32, cpu_us="50000")


def is_limited(seen: dict[str, Any], *, memory: int, pids: int, cpu_us: str) -> None:
    """``cpu_us``: microseconds of processor time in the kernel's usual period of 100 ms."""
    limits = dict(seen["limits"])
    assert limits.pop("swap", "0") == "0"
    assert limits.pop("memory_and_swap", str(memory)) == str(memory)
    assert limits.pop("cpu").split() in ([cpu_us], [cpu_us, "100000"])
    assert limits == {"memory": str(memory), "pids": str(pids)}
    assert seen["core"] == [0, 0]


def has_a_tmp_of_its_own(seen: dict[str, Any], size_bytes: int) -> None:
    options = {path: set(options.split(",")) for path, options in seen["mounts"]}
    assert options["/tmp"] >= {"rw", "nosuid", "nodev", "noexec"}
    assert seen["tmp_bytes"] == size_bytes


def shares_no_namespace_with_the_host(seen: dict[str, Any]) -> None:
    """This process is on the engine's host, and was not given namespaces other than the engine's."""
    assert [name for name in NAMESPACES if seen["namespaces"][name] == os.readlink(f"/proc/self/ns/{name}")] == []


@pytest.mark.parametrize("oci_runtime", ["runc", "crun"])
async def test_step_shares_no_namespace_with_the_host(node: Node, oci_runtime: str) -> None:
    if oci_runtime not in (await node.runtime.info()).oci_runtimes:
        pytest.skip(f"this engine has no {oci_runtime}")
    seen = await look(node, user="200001:200001", oci_runtime=oci_runtime)
    shares_no_namespace_with_the_host(seen)
    is_limited(seen, memory=64 * 1024**2, pids=32, cpu_us="50000")
    has_a_tmp_of_its_own(seen, 64 * 1024**2)


async def test_managed_container_has_the_same_sandbox(node: Node) -> None:
    uid, gid = await node.identities.allot("object:game/a")
    writable = await node.volumes.allot("r1", "game/a", "rw", "object", True, None)
    given = await node.volumes.allot("r1", "game/a", "ro", "run", False, None)
    (Path(given.host_path) / "given").write_text("read me")
    volumes = {"rw": GrantedVolume(writable.host_path, True), "ro": GrantedVolume(given.host_path, True)}
    name = f"{node.id}-managed"
    spec = {
        "name": name,
        "image": BASE,
        "args": ["python3", "-c", PROGRAM, "stay"],
        "network": "none",
        "volumes": {"rw": "/rw:rw", "ro": "/ro"},
        "resources": {"memory_bytes": 64 * 1024**2, "cpus": 0.5, "pids": 32},
        "tmp_size_bytes": 1024**2,
        "ready": {"log": "namespaces", "timeout_s": 30},
        "stop_signal": "SIGKILL",
    }
    await node.containers.start(ManagedSpec.parse(spec), ContainerScope("r1", "start", 1, "game/a", volumes, uid, gid))
    seen = json.loads(b"".join([data async for _, data in node.containers.logs(name)]))
    has_no_privilege(seen | {"expected": (uid, gid)})
    sees_exactly_its_mounts(seen)
    has_a_tmp_of_its_own(seen, 1024**2)
    reaches_nothing(seen)
    is_limited(seen, memory=64 * 1024**2, pids=32, cpu_us="50000")
    shares_no_namespace_with_the_host(seen)


async def test_namespace_of_the_pool_gives_a_step_no_more_than_its_class(node: Node) -> None:
    await node.pool.start()
    nothing = await node.pool.lease("r1", "none")
    isolated = await look(node, network=f"container:{nothing}", user="200001:200001")
    assert isolated["interfaces"] == ["lo"]
    assert isolated["processes"] == ["1"]
    node.pool.release("r1")
    await node.pool.settle()
    assert all(info.id != nothing for info in await node.runtime.list(labels={LABEL_NODE: node.id}))


async def test_missing_mount_source_is_refused_instead_of_made(node: Node) -> None:
    source = node.root / "not-there"
    with pytest.raises(Exception, match="bind source path does not exist"):
        await look(node, mounts=(Mount(str(source), "/x", writable=True),))
    assert not source.exists()
