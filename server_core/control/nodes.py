"""Nodes, and the server itself."""

from __future__ import annotations

from sqlalchemy import Connection

from outrider import __version__, wire
from outrider.errors import InvalidInput
from outrider.v1 import control_service_pb2 as pb
from outrider.v1 import types_pb2
from server_core import dispatch, roles
from server_core.access import current_caller
from server_core.bus.base import EVENTS, NODES
from server_core.control.common import Context, Part, check_node_id
from server_core.security import tokens as token_digests
from server_core.store import audit, draining, events, node_roles, nodes, runs, tokens
from server_core.store.commits import Commit
from server_core.store.common import now_us, stamp

_MAX_DEADLINE_S = 30 * 24 * 3600.0


class Nodes(Part):
    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.ServerInfo:
        known = await self._s.db.read(nodes.count)
        return pb.ServerInfo(
            version=__version__,
            server_id=self._s.server_id,
            started_at=stamp(self._s.started_us),
            nodes=known,
            nodes_online=self._s.fleet.online_count(),
        )

    async def AddNode(self, request: pb.AddNodeRequest, context: Context) -> pb.AddNodeResponse:
        check_node_id(request.node_id)
        token = token_digests.mint(token_digests.NODE_PREFIX)
        by = current_caller()
        caller = tokens.Caller(tokens.NODE, request.node_id, "node", token_digests.digest(token))

        def work(connection: Connection) -> pb.AddNodeResponse:
            if request.role:
                node_roles.get(connection, request.role)
            nodes.add(connection, request.node_id, request.labels, request.role)
            tokens.add(connection, caller)
            events.add(connection, "node.added", request.node_id, node_id=request.node_id)
            audit.add(connection, by, "create", "nodes", request.node_id)
            return pb.AddNodeResponse(node=nodes.get(connection, request.node_id), token=token)

        answer = await self._once("AddNode", Commit.NODE_ADD, request, pb.AddNodeResponse, work)
        self._s.bus.publish(EVENTS)
        self._s.bus.publish(NODES)
        return answer

    async def ListNodes(self, request: pb.ListNodesRequest, context: Context) -> pb.ListNodesResponse:
        known, wanted = await self._s.db.read(lambda c: (nodes.listed(c), roles.all_wanted(c)))
        described = [self._s.fleet.describe(roles.describe(node, wanted.get(node.role))) for node in known]
        for node in described:
            del node.step_types[:]
            del node.plugins[:]
        return pb.ListNodesResponse(nodes=await self._s.drains.describe_all(described))

    async def GetNode(self, request: pb.GetNodeRequest, context: Context) -> types_pb2.Node:
        def read(connection: Connection) -> types_pb2.Node:
            node = nodes.get(connection, request.node_id)
            found = node_roles.find(connection, node.role) if node.role else None
            return roles.describe(node, None if found is None else roles.Wanted.of(found))

        node = await self._s.db.read(read)
        return await self._s.drains.describe(self._s.fleet.describe(node))

    async def DrainNode(self, request: pb.DrainNodeRequest, context: Context) -> types_pb2.Node:
        """Durable. Runs that wait for the node go on waiting; those that it has may end, until the deadline."""
        caller, node_id = current_caller(), request.node_id
        deadline_s = wire.seconds(request.deadline)
        if not 0 <= deadline_s <= _MAX_DEADLINE_S or (request.undo and deadline_s):
            raise InvalidInput(f"a deadline of {deadline_s:g} s is not between 0 and 30 days", code="bad_deadline")
        reason = request.reason.strip()[: audit.MAX_REASON]
        deadline_us = now_us() + round(deadline_s * 1e6) if deadline_s else None

        def work(connection: Connection) -> types_pb2.Node:
            data: dict[str, object] = {"by": caller.name, "reason": reason}
            if request.undo:
                news, type_, verb = draining.end(connection, node_id), "node.drain_ended", "undrain"
            else:
                news = draining.begin(connection, node_id, reason, caller.name, deadline_us)
                type_, verb = "node.draining", "drain"
                data["deadline_s"] = deadline_s
            if news:
                events.add(connection, type_, node_id, node_id=node_id, data=data)
            audit.add(connection, caller, verb, "nodes", node_id, reason=reason, data={"deadline_s": deadline_s})
            return nodes.get(connection, node_id)

        await self._once("DrainNode", Commit.NODE_DRAIN, request, types_pb2.Node, work)
        await self._s.drains.changed(node_id)
        self._s.dispatcher.kick_soon(node_id)
        self._s.bus.publish(EVENTS)
        self._s.bus.publish(NODES)
        return await self.GetNode(pb.GetNodeRequest(node_id=node_id), context)

    async def RemoveNode(self, request: pb.RemoveNodeRequest, context: Context) -> pb.RemoveNodeResponse:
        """The node's token is revoked; its containers go on. What becomes of its runs can't be known any more."""
        by = current_caller()
        ended: list[tuple[str, types_pb2.ObjectRef | None]] = []
        failure = types_pb2.Failure(
            error_class=types_pb2.ERROR_CLASS_PERMANENT,
            code="node_removed",
            message=f"node {request.node_id} was removed while it had this run",
        )

        def work(connection: Connection) -> pb.RemoveNodeResponse:
            nodes.remove(connection, request.node_id)
            tokens.remove(connection, tokens.NODE, request.node_id)
            for row in runs.active_on(connection, request.node_id):
                state = runs.UNKNOWN if row.sent else runs.CANCELLED
                runs.settle(connection, row.run_id, state, failure)
                ended.append((row.run_id, dispatch.finished(connection, row.run_id)))
            events.add(connection, "node.removed", request.node_id, node_id=request.node_id)
            audit.add(connection, by, "delete", "nodes", request.node_id)
            return pb.RemoveNodeResponse()

        answer = await self._once("RemoveNode", Commit.NODE_REMOVE, request, pb.RemoveNodeResponse, work)
        self._s.access.forget_tokens()
        self._s.fleet.forget(request.node_id)
        self._s.drains.forget(request.node_id)
        for run_id, ref in ended:
            self._s.dispatcher.settled(run_id, ref)
        self._s.bus.publish(EVENTS)
        self._s.bus.publish(NODES)
        return answer
