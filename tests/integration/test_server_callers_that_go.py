"""A caller that goes in the middle of a call changes nothing about what was begun."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from outrider.v1 import control_service_pb2 as cpb
from server_core.store.commits import Commit
from tests.integration.server_rig import PIPELINE, TIMEOUT, add_node, served


async def test_run_whose_caller_has_gone_before_its_commit_is_sent_to_its_node(tmp_path: Path) -> None:
    async with served(tmp_path / "server") as rig:
        agent = await (await add_node(rig)).start()
        free, held = threading.Event(), threading.Event()

        def hold(_: object) -> None:
            held.set()
            free.wait(TIMEOUT)

        async with rig.operator() as control:
            request = cpb.ExecutePipelineRequest(request_id="q", pipeline_yaml=PIPELINE, node_id="n1", key="k")
            # The writer is busy, so that the acceptance waits behind it.
            busy = asyncio.ensure_future(rig.server._services.db.write(Commit.NODES_SEEN, hold))
            await asyncio.to_thread(held.wait, TIMEOUT)
            call = control.ExecutePipeline(request, timeout=TIMEOUT)
            waiting = rig.server._services.db._queue  # type: ignore[attr-defined]
            async with asyncio.timeout(TIMEOUT):
                while not waiting.qsize():
                    await asyncio.sleep(0.01)
            call.cancel()
            await asyncio.gather(asyncio.ensure_future(_outcome(call)), return_exceptions=True)
            free.set()
            await busy
            [order] = await agent.runs()
            again = await control.ExecutePipeline(request, timeout=TIMEOUT)
            assert again.run_id == order.run_id
        await agent.stop()


async def _outcome(call: object) -> None:
    await call  # type: ignore[misc]
