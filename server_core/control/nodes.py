"""Nodes, and the server itself."""

from __future__ import annotations

from sqlalchemy import Connection

from outrider import __version__
from outrider.v1 import control_service_pb2 as pb
from outrider.v1 import types_pb2
from server_core import dispatch
from server_core.bus.base import EVENTS, NODES
from server_core.control.common import Context, Part, check_node_id
from server_core.security import tokens as token_digests
from server_core.store import events, nodes, runs, tokens
from server_core.store.commits import Commit
from server_core.store.common import stamp


class Nodes(Part):
    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.ServerInfo:
        known = await self._s.db.read(nodes.listed)
        return pb.ServerInfo(
            version=__version__,
            server_id=self._s.server_id,
            started_at=stamp(self._s.started_us),
            nodes=len(known),
            nodes_online=self._s.fleet.online_count(),
        )

    async def AddNode(self, request: pb.AddNodeRequest, context: Context) -> pb.AddNodeResponse:
        check_node_id(request.node_id)
        token = token_digests.mint(token_digests.NODE_PREFIX)
        caller = tokens.Caller(tokens.NODE, request.node_id, "node", token_digests.digest(token))

        def work(connection: Connection) -> pb.AddNodeResponse:
            nodes.add(connection, request.node_id, request.labels, request.role)
            tokens.add(connection, caller)
            events.add(connection, "node.added", request.node_id, node_id=request.node_id)
            return pb.AddNodeResponse(node=nodes.get(connection, request.node_id), token=token)

        answer = await self._once("AddNode", Commit.NODE_ADD, request, pb.AddNodeResponse, work)
        self._s.bus.publish(EVENTS)
        self._s.bus.publish(NODES)
        return answer

    async def ListNodes(self, request: pb.ListNodesRequest, context: Context) -> pb.ListNodesResponse:
        known = await self._s.db.read(nodes.listed)
        return pb.ListNodesResponse(nodes=[self._s.fleet.describe(node) for node in known])

    async def GetNode(self, request: pb.GetNodeRequest, context: Context) -> types_pb2.Node:
        return self._s.fleet.describe(await self._s.db.read(lambda c: nodes.get(c, request.node_id)))

    async def RemoveNode(self, request: pb.RemoveNodeRequest, context: Context) -> pb.RemoveNodeResponse:
        """The node's token is revoked; its containers go on. What becomes of its runs can't be known any more."""
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
            return pb.RemoveNodeResponse()

        answer = await self._once("RemoveNode", Commit.NODE_REMOVE, request, pb.RemoveNodeResponse, work)
        self._s.access.forget_tokens()
        self._s.fleet.forget(request.node_id)
        for run_id, ref in ended:
            self._s.dispatcher.settled(run_id, ref)
        self._s.bus.publish(EVENTS)
        self._s.bus.publish(NODES)
        return answer
