"""Steps and games that run as another user than their volumes belong to, at work on the same files."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent_core.container_spec import ContainerScope, GrantedVolume, ManagedSpec
from agent_core.policy import NodePolicy
from agent_core.runtimes.docker import DockerRuntime
from outrider.v1 import types_pb2 as types
from tests.agent_rig import BASE_IMAGE, Rig, rig, sweep

OBJECT = types.Object(ref=types.ObjectRef(kind="game", name="a"), attributes_json=b"{}", version=1)
ANOTHER = "1000:1000"
POLICY = NodePolicy.model_validate(
    {"warm_none": 0, "networks": {}, "managed": {"users": [ANOTHER]}, "ports": {"range": "28600-28699"}}
)


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Rig]:
    runtime = DockerRuntime()
    node_id = f"test-{secrets.token_hex(4)}"
    async with rig(tmp_path / "state", runtime, node_id=node_id, policy=POLICY) as started:
        yield started
    await sweep(runtime, node_id)
    await runtime.aclose()


def pipeline(*steps: tuple[str, str | None]) -> str:
    items = [
        {
            "name": f"s{n}",
            "uses": "test.shell",
            "with": {"script": f"set -e; umask 022; {script}"} | ({"user": user} if user else {}),
            "volumes": {"saves": "/data:rw"},
        }
        for n, (script, user) in enumerate(steps)
    ]
    return json.dumps({"name": "p", "volumes": {"saves": {"scope": "object", "keep": True}}, "steps": items})


async def test_steps_and_a_game_as_another_user_write_the_same_files(agent: Rig) -> None:
    run = await agent.run(
        pipeline(
            ("cd /data; mkdir cfg; echo fetched > cfg/server; chmod 644 cfg/server; (umask 077; id > key)", None),
            ("echo patched >> /data/cfg/server; echo made > /data/cfg/made; ! cat /data/key", ANOTHER),
            ("echo again >> /data/cfg/made; mkdir /data/world; echo level > /data/world/1", None),
        ),
        object=OBJECT,
    )
    assert run.state == "succeeded", agent.log(run.run_id, "s1", stream="stderr") + repr(run.failure).encode()

    services = agent.services
    saves = await services.volumes.allot(run.run_id, "game/a", "saves", "object", True, None)
    uid, gid = await services.identities.allot("object:game/a")
    scope = ContainerScope("r1", "start", 1, "game/a", {"saves": GrantedVolume(saves.host_path, True)}, uid, gid)
    play = "set -e; id -u; echo played >> /data/world/1; mv /data/cfg/server /data/cfg/old; mkdir /data/log; \
echo hit > /data/log/1; chmod 644 /data/log/1; echo ready; exec sleep 1000"
    game = {"name": f"{services.config.node_id}-game", "image": BASE_IMAGE, "args": ["sh", "-c", play]}
    game |= {"user": ANOTHER, "network": "none", "volumes": {"saves": "/data:rw"}, "ready": {"log": "ready"}}
    await services.containers.start(ManagedSpec.parse(game | {"restart": "no"}), scope)

    run = await agent.run(
        pipeline(("cat /data/cfg/old /data/world/1; echo more >> /data/log/1; rm -r /data/log", None)), object=OBJECT
    )
    assert run.state == "succeeded", agent.log(run.run_id, "s0", stream="stderr") + repr(run.failure).encode()
    assert agent.log(run.run_id, "s0") == b"fetched\npatched\nlevel\nplayed\n"
