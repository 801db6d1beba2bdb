"""What operators do with a node's containers from afar: list, inspect, start, stop, restart, remove, read logs.

Each is a command of the server; its answer is a CommandResult. A log is a client stream of its own, opened
because a command asked for it and ended when the reader goes away.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime
from typing import Any

import grpc
import structlog

from agent_core.containers import Containers
from agent_core.runtimes.base import (
    LABEL_OBJECT,
    LABEL_RUN,
    LABEL_STEP,
    ContainerInfo,
)
from outrider.errors import InvalidInput, NotFound, OutriderError
from outrider.v1 import node_service_pb2 as pb
from outrider.v1 import node_service_pb2_grpc as pb_grpc
from outrider.v1 import types_pb2 as types
from outrider.wire import failure_of, seconds, timestamp

log = structlog.get_logger(__name__)

LOG_PIECE_BYTES = 128 * 1024
Restarting = Callable[[str], Awaitable[None]]
_STREAMS = {"stdout": types.LOG_STREAM_STDOUT, "stderr": types.LOG_STREAM_STDERR}


class RemoteContainers:
    """Carries out the server's container commands on one node."""

    def __init__(self, containers: Containers) -> None:
        self._containers = containers
        self._streams: dict[str, asyncio.Task[None]] = {}

    async def carry_out(
        self,
        command: pb.Command,
        *,
        again: bool = False,
        former: str | None = None,
        restarting: Restarting | None = None,
    ) -> pb.CommandResult:
        """Do what a container command asks; what goes wrong is in the result.

        ``again``: a former agent took it on, and died before it could say what came of it. What that agent did is not
        done a second time: one that was removed is no error, and a container is restarted once. For that
        ``restarting`` is told, before a restart, since when the container has run; as ``former`` it comes back.
        """
        result = pb.CommandResult(command_id=command.command_id)
        try:
            match command.WhichOneof("body"):
                case "container":
                    result.containers.extend(await self._act(command.container, again, former, restarting))
                case "list_containers":
                    result.containers.extend(await self._list(command.list_containers.all))
                case "inspect_container":
                    info = await self._containers.inspect(command.inspect_container.name)
                    result.containers.append(self.describe(info, whole=True))
                case other:
                    raise InvalidInput(f"this agent does not know the command {other!r}", code="unknown_command")
        except OutriderError as error:
            result.failure.CopyFrom(failure_of(error))
        return result

    async def _act(
        self, command: pb.ContainerCommand, again: bool, former: str | None, restarting: Restarting | None
    ) -> list[types.Container]:
        grace = seconds(command.grace) if command.HasField("grace") else None
        match command.action:
            case types.CONTAINER_ACTION_START:
                return [self.describe(await self._containers.start_existing(command.name))]
            case types.CONTAINER_ACTION_STOP:
                return [self.describe(await self._containers.stop(command.name, grace_s=grace))]
            case types.CONTAINER_ACTION_RESTART:
                info = await self._containers.inspect(command.name)
                since = info.started_at.isoformat() if info.started_at is not None else ""
                # By the engine's own word at both times: no clock says what came before what.
                if former is not None and info.state == "running" and since != former:
                    return [self.describe(info)]
                if former is None and restarting is not None:
                    await restarting(since)
                return [self.describe(await self._containers.restart(command.name, grace_s=grace))]
            case types.CONTAINER_ACTION_REMOVE:
                try:
                    await self._containers.remove(command.name, force=command.force)
                except NotFound:
                    if not again:
                        raise
                return []
        raise InvalidInput(f"this agent does not know the container action {command.action}", code="unknown_command")

    async def _list(self, everything: bool) -> list[types.Container]:
        found = await self._containers.list()
        return [self.describe(info) for info in found if everything or self._containers.owner(info) == "managed"]

    def describe(self, info: ContainerInfo, *, whole: bool = False) -> types.Container:
        """A container as it goes over the wire; ``whole``: with the engine's own answer, env values left out."""
        kind, _, name = info.labels.get(LABEL_OBJECT, "").partition("/")
        message = types.Container(
            id=info.id,
            name=info.name,
            image=info.image,
            state=info.state,
            health=info.health,
            owner=self._containers.owner(info),
            run_id=info.labels.get(LABEL_RUN, ""),
            step=info.labels.get(LABEL_STEP, ""),
            object=types.ObjectRef(kind=kind, name=name) if name else None,
            ports=[
                types.ContainerPort(
                    name=port.name,
                    container=port.container,
                    host=port.host,
                    protocol=port.protocol,
                    host_ip=port.host_ip,
                )
                for port in info.ports
            ],
            created_at=_timestamp(info.created_at),
            started_at=_timestamp(info.started_at),
            exit_code=info.exit_code or 0,
            restart_policy=info.restart_policy,
            mounts=[
                types.ContainerMount(source=mount.source, target=mount.target, writable=mount.writable)
                for mount in info.mounts
            ],
            restart_count=info.restart_count,
        )
        if whole:
            message.inspect_json = json.dumps(without_env_values(info.raw), default=str).encode()
        return message

    # Logs.

    def open_log(self, stub: pb_grpc.NodeServiceAsyncStub, command: pb.StreamContainerLogsCommand) -> None:
        """Begin to stream a container's log to the server."""
        self.stop_stream(command.stream_id)
        task = asyncio.create_task(self._stream(stub, command), name=f"log {command.name}")
        self._streams[command.stream_id] = task
        task.add_done_callback(lambda _: self._streams.pop(command.stream_id, None))

    def stop_stream(self, stream_id: str) -> None:
        """The reader went away. A stream that has ended already is no error."""
        task = self._streams.pop(stream_id, None)
        if task is not None:
            task.cancel()

    async def stop_streams(self) -> None:
        """End every stream: the connection is gone, or the agent stops."""
        tasks = list(self._streams.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._streams.clear()

    async def _stream(self, stub: pb_grpc.NodeServiceAsyncStub, command: pb.StreamContainerLogsCommand) -> None:
        try:
            await stub.StreamContainerLogs(self._pieces(command))
        except grpc.aio.AioRpcError as error:
            log.info("log_stream.ended", container=command.name, reason=error.details())

    async def _pieces(self, command: pb.StreamContainerLogsCommand) -> AsyncIterator[pb.ContainerLogBatch]:
        # The first message says which stream this is, also when the log is empty.
        yield pb.ContainerLogBatch(stream_id=command.stream_id)
        tail = command.tail if command.tail >= 0 else None
        try:
            source = self._containers.logs(command.name, follow=command.follow, tail=tail)
            async with contextlib.aclosing(source) as items:
                async for stream, data in items:
                    for start in range(0, len(data), LOG_PIECE_BYTES):
                        piece = data[start : start + LOG_PIECE_BYTES]
                        yield pb.ContainerLogBatch(stream_id=command.stream_id, stream=_STREAMS[stream], data=piece)
        except OutriderError as error:
            yield pb.ContainerLogBatch(stream_id=command.stream_id, failure=failure_of(error))


def without_env_values(raw: Any) -> Any:
    """The engine's inspect answer with the names of environment variables, and none of their values."""
    if isinstance(raw, dict):
        return {
            key: [str(item).partition("=")[0] for item in value]
            if key == "Env" and isinstance(value, list)
            else without_env_values(value)
            for key, value in raw.items()
        }
    if isinstance(raw, list):
        return [without_env_values(item) for item in raw]
    return raw


def _timestamp(moment: datetime | None) -> Any:
    return timestamp(moment) if moment is not None else None
