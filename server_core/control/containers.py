"""Containers: every call is a command to the node's agent, with a deadline; nothing is remembered here."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator

from sqlalchemy import Connection

from outrider import wire
from outrider.errors import Conflict, InvalidInput, OutriderError
from outrider.v1 import control_service_pb2 as pb
from outrider.v1 import node_service_pb2, types_pb2
from server_core.access import current_caller
from server_core.channel import Answer, ControlChannel, command
from server_core.control.common import Context, Part, request_digest
from server_core.store import nodes, requests
from server_core.store.commits import Commit
from server_core.streams import Pipe

_DEFAULT_GRACE_S = 10.0
_MAX_GRACE_S = 600.0


class Containers(Part):
    async def ListContainers(self, request: pb.ListContainersRequest, context: Context) -> pb.ListContainersResponse:
        channel = await self._channel(request.node_id)
        body = node_service_pb2.ListContainersCommand(all=request.all)
        result = await channel.request(command(_new_id(), list_containers=body), self._s.config.command_timeout_s)
        return pb.ListContainersResponse(containers=result.containers)

    async def InspectContainer(self, request: pb.InspectContainerRequest, context: Context) -> types_pb2.Container:
        _check_container(request.name)
        channel = await self._channel(request.node_id)
        body = node_service_pb2.InspectContainerCommand(name=request.name)
        result = await channel.request(command(_new_id(), inspect_container=body), self._s.config.command_timeout_s)
        return _one(result, request.name)

    async def StartContainer(self, request: pb.ContainerRequest, context: Context) -> types_pb2.Container:
        return await self._act(types_pb2.CONTAINER_ACTION_START, request)

    async def StopContainer(self, request: pb.ContainerRequest, context: Context) -> types_pb2.Container:
        return await self._act(types_pb2.CONTAINER_ACTION_STOP, request)

    async def RestartContainer(self, request: pb.ContainerRequest, context: Context) -> types_pb2.Container:
        return await self._act(types_pb2.CONTAINER_ACTION_RESTART, request)

    async def RemoveContainer(self, request: pb.ContainerRequest, context: Context) -> pb.RemoveContainerResponse:
        await self._act(types_pb2.CONTAINER_ACTION_REMOVE, request)
        return pb.RemoveContainerResponse()

    async def StreamContainerLogs(
        self, request: pb.ContainerLogsRequest, context: Context
    ) -> AsyncIterator[pb.ContainerLogData]:
        _check_container(request.name)
        channel = await self._channel(request.node_id)
        with self._s.pipes.make(request.node_id) as pipe:
            # An operator who does not speak of lines means all of them, as with the logs of runs.
            tail = request.tail if request.tail > 0 else -1
            body = node_service_pb2.StreamContainerLogsCommand(
                stream_id=pipe.stream_id, name=request.name, follow=request.follow, tail=tail
            )
            order = command(_new_id(), stream_container_logs=body)
            with channel.expect(order.command_id) as answer:
                watch = asyncio.ensure_future(self._order_stream(channel, order, answer, pipe))
                try:
                    async for batch in pipe.read():
                        if batch.data:
                            yield pb.ContainerLogData(stream=batch.stream, data=batch.data)
                finally:
                    watch.cancel()
                    if channel.open:
                        stop = node_service_pb2.StopStreamCommand(stream_id=pipe.stream_id)
                        await _send_quietly(channel, command(_new_id(), stop_stream=stop))

    async def _order_stream(
        self, channel: ControlChannel, order: node_service_pb2.Command, answer: Answer, pipe: Pipe
    ) -> None:
        """Ask for the stream, and end the pipe if it will never be filled."""
        try:
            await channel.order(order, answer, self._s.config.command_timeout_s)
            result = await asyncio.shield(answer.result)
            if result.HasField("failure"):
                raise wire.error_of(result.failure)
        except OutriderError as error:
            # A stream that is open tells its own end, also when the control channel is lost beside it.
            if not pipe.opened:
                await pipe.fail(error)

    async def _act(
        self, action: types_pb2.ContainerAction.ValueType, request: pb.ContainerRequest
    ) -> types_pb2.Container:
        """Idempotent twice over: the agent knows the command's id, and the answer is kept here."""
        _check_container(request.name)
        caller = current_caller().key
        digest = request_digest(types_pb2.ContainerAction.Name(action), request)
        sealed = await self._s.db.read(lambda c: requests.answer_of(c, caller, request.request_id, digest))
        if sealed is not None:
            return types_pb2.Container.FromString(self._s.vault.open(sealed, "answer"))
        grace_s = wire.seconds(request.grace) if request.HasField("grace") else _DEFAULT_GRACE_S
        if not 0 <= grace_s <= _MAX_GRACE_S:
            raise InvalidInput(f"a grace of {grace_s:g} s is not between 0 and {_MAX_GRACE_S:g} s", code="bad_grace")
        channel = await self._channel(request.node_id)
        body = node_service_pb2.ContainerCommand(
            name=request.name, action=action, grace=wire.duration(grace_s), force=request.force
        )
        command_id = "op-" + hashlib.sha256(f"{caller}\0{request.request_id}".encode()).hexdigest()[:24]
        result = await channel.request(command(command_id, container=body), self._s.config.command_timeout_s + grace_s)
        container = _one(result, request.name)

        def keep(connection: Connection) -> None:
            if requests.answer_of(connection, caller, request.request_id, digest) is None:
                self._keep(connection, request, digest, caller, container)

        await self._s.db.write(Commit.CONTAINER_ANSWER, keep)
        return container

    async def _channel(self, node_id: str) -> ControlChannel:
        """The way to a node. Raises NotFound, or Unavailable that says since when it is offline."""
        channel = self._s.fleet.channel(node_id)
        if channel is None:
            await self._s.db.read(lambda c: nodes.get(c, node_id))
            raise self._s.fleet.offline_error(node_id)
        return channel


def _new_id() -> str:
    return "q-" + secrets.token_hex(12)


def _check_container(name: str) -> None:
    if not name or len(name) > 255:
        raise InvalidInput("the name of a container is needed", code="bad_name")


def _one(result: node_service_pb2.CommandResult, name: str) -> types_pb2.Container:
    if len(result.containers) > 1:
        raise Conflict(f"several containers are called {name!r}", code="container_ambiguous", hint="give the whole id")
    return result.containers[0] if result.containers else types_pb2.Container(name=name)


async def _send_quietly(channel: ControlChannel, message: node_service_pb2.Command) -> None:
    try:
        await channel.send(node_service_pb2.ServerMessage(command=message))
    except OutriderError:
        return  # the channel is gone, and the stream with it
