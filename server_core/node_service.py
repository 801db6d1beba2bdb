"""NodeService: what agents call. Who calls was decided by the interceptor; payloads never say it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
from collections.abc import AsyncIterator
from typing import Any

import grpc
import structlog
from sqlalchemy import Connection

from outrider import __version__, wire
from outrider.errors import Conflict, InvalidInput, NotFound, OutriderError, TemporaryError, Unauthenticated
from outrider.pipeline import ATTRIBUTE_PATTERN, load_pipeline, plain_envs
from outrider.v1 import node_service_pb2, node_service_pb2_grpc, types_pb2
from server_core.access import current_caller, current_session
from server_core.bus.base import EVENTS, NODES, log_topic, run_topic
from server_core.channel import ControlChannel
from server_core.control.common import request_digest
from server_core.recovery import recover
from server_core.security import tokens
from server_core.security.vault import env_purpose
from server_core.services import Services
from server_core.store import envs, events, logs, node_roles, nodes, objects, requests, runs
from server_core.store.commits import Commit
from server_core.store.common import monotonic_us, now_us, stamp
from server_core.store.runs import RunRow

log = structlog.get_logger(__name__)

_MAX_OBJECTS = 1000  # in one question
_ATTRIBUTE = re.compile(ATTRIBUTE_PATTERN)

Context = grpc.aio.ServicerContext[Any, Any]


class NodeService(node_service_pb2_grpc.NodeServiceServicer):
    def __init__(self, services: Services) -> None:
        self._s = services

    async def Register(
        self, request: node_service_pb2.RegisterRequest, context: Context
    ) -> node_service_pb2.RegisterResponse:
        """A new session, or the last one resumed. Raises TemporaryError with the time to wait when a whole fleet
        comes back at once and it is not this node's turn."""
        node_id = current_caller().name
        wait_s = self._s.admission.wait_s(node_id)
        if wait_s > 0:
            raise TemporaryError(
                f"the server lets {self._s.admission.per_second:g} nodes a second back in; the turn of node {node_id} "
                f"is in {wait_s:.1f} s",
                code="resource_exhausted",
                retry_after_s=wait_s,
            )
        wire.load_json_object(request.facts_json, "facts_json")
        for info in request.step_types:
            wire.load_json_object(info.params_schema_json, f"params_schema_json of step type {info.name}")
            wire.load_json_object(info.outputs_schema_json, f"outputs_schema_json of step type {info.name}")
        # Now: gRPC takes the call from under its context when the caller goes, whoever still asks it something.
        new_id, peer = "s" + secrets.token_hex(16), context.peer()
        session = await self._s.db.write(
            Commit.SESSION_BEGIN, lambda c: nodes.begin_session(c, node_id, request, new_id, peer)
        )
        self._s.fleet.began_session(node_id, session)
        self._s.bus.publish(NODES)
        log.info("node registered", node=node_id, epoch=session.epoch, resumed=session.resumed)
        return node_service_pb2.RegisterResponse(
            session_id=session.session_id,
            epoch=session.epoch,
            resumed=session.resumed,
            heartbeat=self._s.fleet.heartbeat_policy(node_id),
            server_version=__version__,
            server_time=stamp(now_us()),
            server_id=self._s.server_id,
        )

    async def GetOwnRole(
        self, request: node_service_pb2.GetOwnRoleRequest, context: Context
    ) -> node_service_pb2.OwnRole:
        """The role of the node that asks, as the server has it now."""
        node_id = current_caller().name

        def read(connection: Connection) -> node_service_pb2.OwnRole:
            role = nodes.get(connection, node_id).role
            definition = node_roles.find(connection, role) if role else None
            return node_service_pb2.OwnRole(role=role, definition=definition)

        return await self._s.db.read(read)

    async def Heartbeat(
        self, request: node_service_pb2.HeartbeatRequest, context: Context
    ) -> node_service_pb2.HeartbeatResponse:
        caller = current_caller()
        return await self._heartbeat(caller.name, caller.token_digest, request)

    # The stubs know generators alone; gRPC also takes a coroutine that writes by itself.
    async def Connect(  # type: ignore[override]
        self, request_iterator: AsyncIterator[node_service_pb2.AgentMessage], context: Context
    ) -> None:
        """The control channel. A reader and a writer; whichever ends first, or a close by the server, ends it."""
        caller = current_caller()
        channel = ControlChannel(caller.name, *current_session())
        self._s.fleet.attach(channel)
        tasks = [
            asyncio.ensure_future(self._read(channel, caller.token_digest, request_iterator)),
            asyncio.ensure_future(self._write(channel, context)),
            asyncio.ensure_future(channel.wait_closed()),
        ]
        nudge = asyncio.ensure_future(self._s.dispatcher.ask_for_report(channel))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._s.fleet.detach(channel)
            for task in (*tasks, nudge):
                task.cancel()
            await asyncio.gather(*tasks, nudge, return_exceptions=True)

    async def ReportEvents(
        self, request_iterator: AsyncIterator[node_service_pb2.EventBatch], context: Context
    ) -> node_service_pb2.ReportEventsResponse:
        node_id = current_caller().name
        acknowledged = 0
        async for batch in request_iterator:
            await self._fence()
            for event in batch.events:
                wire.load_json_object(event.data_json, f"data_json of event {event.sequence}")
            stored = await self._s.db.write(
                Commit.EVENTS,
                lambda c, batch=batch: events.add_reported(c, node_id, batch.events),  # type: ignore[misc]
            )
            acknowledged = max(acknowledged, stored)
            self._s.bus.publish(EVENTS)
        return node_service_pb2.ReportEventsResponse(acknowledged=acknowledged)

    async def StreamRunLogs(
        self, request_iterator: AsyncIterator[node_service_pb2.RunLogBatch], context: Context
    ) -> node_service_pb2.RunLogAck:
        """Append what comes; each batch is acknowledged on the control channel once it is on the disk."""
        node_id = current_caller().name
        positions: dict[tuple[str, str, int, int], node_service_pb2.RunLogAck.Position] = {}
        resend: dict[tuple[str, str, int, int], node_service_pb2.RunLogAck.Position] = {}
        unknown: set[str] = set()
        async for batch in request_iterator:
            await self._fence()
            pieces = [logs.measure(chunk) for chunk in batch.chunks]
            appended = await self._s.db.write(
                Commit.LOGS,
                lambda c, pieces=pieces: logs.append(c, node_id, pieces),  # type: ignore[misc]
            )
            for position in appended.positions:
                positions[(position.run_id, position.step, position.attempt, position.stream)] = position
            await self._acknowledge_logs(
                node_id, node_service_pb2.RunLogAck(positions=appended.positions, unknown_runs=appended.foreign)
            )
            for run_id in {position.run_id for position in appended.positions}:
                self._s.bus.publish(log_topic(run_id))
            # Neither may hold up the logs of others: the agent goes on without these, or from the right place.
            unknown.update(appended.foreign)
            for chunk in appended.loose:
                key = (chunk.run_id, chunk.step, chunk.attempt, chunk.stream)
                resend.setdefault(key, positions[key])
                log.warning(
                    "a log does not follow on what is stored",
                    run=chunk.run_id,
                    step=chunk.step,
                    stored=positions[key].offset,
                    came=chunk.offset,
                )
            if resend:
                break
        return node_service_pb2.RunLogAck(
            positions=positions.values(), unknown_runs=sorted(unknown), resend=resend.values()
        )

    async def StreamContainerLogs(
        self, request_iterator: AsyncIterator[node_service_pb2.ContainerLogBatch], context: Context
    ) -> node_service_pb2.StreamEnd:
        first = await anext(aiter(request_iterator), None)
        if first is None:
            return node_service_pb2.StreamEnd()
        pipe = self._s.pipes.of(current_caller().name, first.stream_id)

        async def batches() -> AsyncIterator[node_service_pb2.ContainerLogBatch]:
            yield first
            async for batch in request_iterator:
                await self._fence()
                yield batch

        await pipe.fill(batches())
        return node_service_pb2.StreamEnd()

    async def GetObject(self, request: node_service_pb2.RunRef, context: Context) -> types_pb2.Object:
        node_id = current_caller().name

        def read(connection: Connection) -> types_pb2.Object:
            row = _run_of(connection, node_id, request)
            if row.object is None:
                raise NotFound(f"run {row.run_id} is for no object", code="run_without_object")
            return objects.get(connection, types_pb2.ObjectRef(kind=row.object_kind, name=row.object_name))

        return await self._s.db.read(read)

    async def FindRemovedObjects(
        self, request: node_service_pb2.FindRemovedObjectsRequest, context: Context
    ) -> node_service_pb2.FindRemovedObjectsResponse:
        if len(request.objects) > _MAX_OBJECTS:
            raise InvalidInput(f"ask for at most {_MAX_OBJECTS} objects at a time", code="too_many")
        gone = await self._s.db.read(lambda c: [ref for ref in request.objects if objects.was_removed(c, ref)])
        return node_service_pb2.FindRemovedObjectsResponse(removed=gone)

    async def RecoverRuns(
        self, request: node_service_pb2.RecoverRunsRequest, context: Context
    ) -> node_service_pb2.RecoverRunsResponse:
        node_id = current_caller().name
        return await self._s.db.read(lambda connection: recover(connection, node_id, request.seen))

    async def GetEnvs(
        self, request: node_service_pb2.GetEnvsRequest, context: Context
    ) -> node_service_pb2.GetEnvsResponse:
        """The values of the envs that the run's steps are allotted; those that a set holds are secrets."""
        node_id = current_caller().name

        def read(connection: Connection) -> tuple[RunRow, dict[str, bytes | None]]:
            row = _run_of(connection, node_id, request.run)
            if runs.is_over(row.state):
                raise Conflict(f"run {row.run_id} is over, so nobody needs its envs", code="run_over")
            names = [str(name) for name in wire.load_json(row.env_names_json.encode(), [])]
            return row, {
                name: envs.sealed_value(connection, *name.split(".", 1)) if "." in name else None for name in names
            }

        row, sealed = await self._s.db.read(read)
        plain = plain_envs(load_pipeline(row.pipeline_yaml)) if any("." not in name for name in sealed) else {}
        answer = node_service_pb2.GetEnvsResponse()
        for name, value in sealed.items():
            if "." not in name:
                answer.values[name] = plain[name]
            elif value is None:
                raise NotFound(f"env {name} was removed after run {row.run_id} was accepted", code="unknown_env")
            else:
                answer.values[name] = self._s.vault.open(value, env_purpose(*name.split(".", 1))).decode()
                answer.secret_names.append(name)
        return answer

    async def WriteBack(
        self, request: node_service_pb2.WriteBackRequest, context: Context
    ) -> node_service_pb2.WriteBackResponse:
        """Recorded once: a repeated request gets the answer of the first, whatever has changed since."""
        caller, node_id = current_caller(), current_caller().name
        values = {}
        for attribute in request.attributes:
            if not _ATTRIBUTE.fullmatch(attribute.name):
                raise InvalidInput(f"{attribute.name!r} can't be the name of an attribute", code="bad_attribute")
            values[attribute.name] = wire.load_json(attribute.value_json)
        digest = request_digest("WriteBack", request)

        def write(connection: Connection) -> int:
            answered = requests.answer_of(connection, caller.key, request.request_id, digest)
            if answered is not None:
                return int(answered)
            row = _run_of(connection, node_id, request.run)
            runs.merge_writeback(connection, row.run_id, values)
            version = 0
            if row.object is not None:
                snapshot = types_pb2.Object.FromString(row.object)
                version = objects.write_back(connection, snapshot, row.run_id, row.sequence, values)
            # Nothing in it is secret, so it needs no seal.
            requests.keep(connection, caller.key, request.request_id, digest, b"%d" % version)
            return version

        version = await self._s.db.write(Commit.WRITE_BACK, write)
        self._s.bus.publish(run_topic(request.run.run_id))
        return node_service_pb2.WriteBackResponse(status_version=version)

    async def _fence(self) -> None:
        """A stream that was opened in a session that is not the newest any more is refused in the middle."""
        await self._s.fleet.check_session(current_caller().name, *current_session())

    # -- the control channel -------------------------------------------------------------------------------

    async def _read(
        self, channel: ControlChannel, token_digest: bytes, messages: AsyncIterator[node_service_pb2.AgentMessage]
    ) -> None:
        async for message in messages:
            if not channel.open:
                await channel.wait_closed()  # another has taken its place: what still comes on this one is of the past
                return
            match message.WhichOneof("body"):
                case "heartbeat":
                    answer = await self._heartbeat(channel.node_id, token_digest, message.heartbeat)
                    await channel.send(node_service_pb2.ServerMessage(heartbeat=answer))
                case "command_ack":
                    await self._s.dispatcher.take_ack(channel, message.command_ack)
                case "command_result":
                    channel.take_result(message.command_result)
                case "run_report":
                    await self._s.dispatcher.take_report(channel, message.run_report)
                case "full_report":
                    report = message.full_report
                    self._s.fleet.heard(channel.node_id, report.brief if report.HasField("brief") else None)
                    await self._s.dispatcher.reconcile(channel, report)
                case other:
                    log.warning("an agent sent a message that is not known here", node=channel.node_id, body=other)

    @staticmethod
    async def _write(channel: ControlChannel, context: Context) -> None:
        while True:
            await context.write(await channel.next_message())

    async def _heartbeat(
        self, node_id: str, token_digest: bytes, request: node_service_pb2.HeartbeatRequest
    ) -> node_service_pb2.HeartbeatResponse:
        fleet = self._s.fleet
        answer = node_service_pb2.HeartbeatResponse(sequence=request.sequence)
        answer.sent_at.FromMicroseconds(monotonic_us())
        try:
            await fleet.check_session(node_id, request.session_id, request.epoch)
        except Conflict:
            answer.register_again = True
            return answer
        if not tokens.proof_is_right(request.proof, token_digest, request.session_id, request.epoch, request.sequence):
            raise Unauthenticated(f"a heartbeat of node {node_id} carries a wrong proof", code="wrong_proof")
        if not fleet.beat_is_new(node_id, request.sequence):
            raise Conflict(f"a heartbeat of node {node_id} came twice", code="heartbeat_repeated", hint="connect anew")
        fleet.heard(node_id, request.brief)
        answer.heartbeat.CopyFrom(fleet.heartbeat_policy(node_id))
        answer.full_report_wanted = await self._s.dispatcher.disagrees(node_id, request.brief)
        return answer

    async def _acknowledge_logs(self, node_id: str, ack: node_service_pb2.RunLogAck) -> None:
        channel = self._s.fleet.channel(node_id)
        if channel is not None and ack.positions:
            # Not there to be had: the agent gets the positions as the call's answer, or sends again.
            with contextlib.suppress(OutriderError):
                await channel.send(node_service_pb2.ServerMessage(log_ack=ack))


def _run_of(connection: Connection, node_id: str, ref: node_service_pb2.RunRef) -> RunRow:
    """The run, if it is this node's and under this lease. To others it does not exist."""
    row = runs.row_of(connection, ref.run_id)
    if row is None or row.node_id != node_id:
        raise NotFound(f"node {node_id} has no run {ref.run_id!r}", code="unknown_run")
    if row.lease_id != ref.lease_id:
        raise Conflict(f"run {ref.run_id} is under another lease", code="lease_superseded")
    return row
