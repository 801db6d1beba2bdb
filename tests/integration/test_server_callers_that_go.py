"""A caller that goes in the middle of a call changes nothing about what was begun, and takes no server with it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from outrider.v1 import control_service_pb2 as cpb
from server_core.store.commits import Commit
from tests.integration.server_rig import PIPELINE, TIMEOUT, Rig, add_node, served


@asynccontextmanager
async def busy_writer(rig: Rig) -> AsyncIterator[None]:
    """What is to be written waits until this is left."""
    free, held = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        held.set()
        free.wait(TIMEOUT)

    busy = asyncio.ensure_future(rig.server._services.db.write(Commit.NODES_SEEN, hold))
    await asyncio.to_thread(held.wait, TIMEOUT)
    try:
        yield
    finally:
        free.set()
        await busy


async def gone(rig: Rig, call: asyncio.Future[object]) -> None:
    """Cancel this call once its write waits, and wait until the server has noticed."""
    waiting = rig.server._services.db._queue  # type: ignore[attr-defined]
    async with asyncio.timeout(TIMEOUT):
        while not waiting.qsize():
            await asyncio.sleep(0.01)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        while any("_handle_rpc" in repr(task.get_coro()) for task in asyncio.all_tasks()):
            await asyncio.sleep(0.01)


async def test_run_whose_caller_has_gone_before_its_commit_is_sent_to_its_node(tmp_path: Path) -> None:
    async with served(tmp_path / "server") as rig:
        agent = await (await add_node(rig)).start()
        async with rig.operator() as control:
            request = cpb.ExecutePipelineRequest(request_id="q", pipeline_yaml=PIPELINE, node_id="n1", key="k")
            async with busy_writer(rig):
                await gone(rig, asyncio.ensure_future(_outcome(control.ExecutePipeline(request, timeout=TIMEOUT))))
            [order] = await agent.runs()
            again = await control.ExecutePipeline(request, timeout=TIMEOUT)
            assert again.run_id == order.run_id
        await agent.stop()


async def test_agent_that_has_gone_before_its_session_is_written_takes_no_server_with_it(tmp_path: Path) -> None:
    async with served(tmp_path / "server") as rig:
        agent = await add_node(rig)
        for _ in range(5):  # what gRPC has let go of is not always in use for something else yet
            async with busy_writer(rig):
                await gone(rig, asyncio.ensure_future(agent.register()))
        assert (await agent.register()).epoch == 6
        await agent.stop()


async def _outcome(call: object) -> object:
    return await call  # type: ignore[misc]
