"""What an agent takes from its server: names that become paths and containers are checked here once more."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from agent_core.runtimes.fake import FakeRuntime
from outrider.errors import InvalidInput
from outrider.v1 import node_service_pb2 as pb
from tests.agent_rig import rig

PIPELINE = b'{"name": "p", "steps": [{"name": "a", "uses": "test.shell", "with": {"script": "{}"}}]}'


@pytest.mark.parametrize("run_id", ["../../../x", "..", "a/b", "/etc", "", "r\n", "R1", "r" * 200])
async def test_the_id_of_a_run_is_never_a_path(tmp_path: Path, run_id: str) -> None:
    command = pb.RunPipeline(
        run_id=run_id,
        lease_id="l",
        pipeline_yaml=PIPELINE,
        pipeline_sha256=hashlib.sha256(PIPELINE).digest(),
    )
    async with rig(tmp_path / "state", FakeRuntime(), node_id="n1") as agent:
        with pytest.raises(InvalidInput, match="not the id of a run"):
            await agent.runs.accept(command, command_id="c", digest=b"d")
        assert not agent.runs.active
