"""Roles of nodes, and which node has which."""

from __future__ import annotations

from sqlalchemy import Connection

from outrider.errors import InvalidInput, NotFound
from outrider.roles import Role, check_lock, make_role, read_lock
from outrider.v1 import control_service_pb2 as pb
from outrider.v1 import types_pb2
from server_core.access import current_caller
from server_core.bus.base import EVENTS, NODES
from server_core.control.common import Context
from server_core.control.nodes import Nodes
from server_core.store import audit, events, node_roles, nodes
from server_core.store.commits import Commit


class NodeRoles(Nodes):
    async def SetNodeRole(self, request: pb.SetNodeRoleRequest, context: Context) -> types_pb2.NodeRole:
        """Make or replace a role. A lock that does not fit it is refused; the answer leaves the lock out."""
        role, lock = _checked(request.role)
        expected = request.expected_version if request.HasField("expected_version") else None
        caller = current_caller()

        def work(connection: Connection) -> types_pb2.NodeRole:
            former = node_roles.find(connection, role.name)
            made = node_roles.put(connection, role, lock, expected)
            if former is None or former.version != made.version:
                data = {"version": made.version, "lock_sha256": made.lock_sha256.hex()}
                events.add(connection, "node_role.changed", role.name, data=data)
                audit.add(connection, caller, "update", "node_roles", role.name, data=data)
            made.ClearField("lock")
            return made

        answer = await self._once("SetNodeRole", Commit.NODE_ROLE_SET, request, types_pb2.NodeRole, work)
        self._s.bus.publish(EVENTS)
        return answer

    async def GetNodeRole(self, request: pb.GetNodeRoleRequest, context: Context) -> types_pb2.NodeRole:
        return await self._s.db.read(lambda c: node_roles.get(c, request.name))

    async def ListNodeRoles(self, request: pb.ListNodeRolesRequest, context: Context) -> pb.ListNodeRolesResponse:
        roles = await self._s.db.read(node_roles.listed)
        for role in roles:
            role.ClearField("lock")
        return pb.ListNodeRolesResponse(roles=roles)

    async def RemoveNodeRole(self, request: pb.RemoveNodeRoleRequest, context: Context) -> pb.RemoveNodeRoleResponse:
        caller = current_caller()

        def work(connection: Connection) -> pb.RemoveNodeRoleResponse:
            node_roles.remove(connection, request.name)
            events.add(connection, "node_role.removed", request.name)
            audit.add(connection, caller, "delete", "node_roles", request.name)
            return pb.RemoveNodeRoleResponse()

        answer = await self._once("RemoveNodeRole", Commit.NODE_ROLE_REMOVE, request, pb.RemoveNodeRoleResponse, work)
        self._s.bus.publish(EVENTS)
        return answer

    async def AssignNodeRole(self, request: pb.AssignNodeRoleRequest, context: Context) -> types_pb2.Node:
        """What the node has changes only when its environment is made anew there; until then it shows as drift."""
        expected = request.expected_version if request.HasField("expected_version") else None
        caller = current_caller()

        def work(connection: Connection) -> types_pb2.Node:
            former = nodes.get(connection, request.node_id)
            if request.role:
                node_roles.get(connection, request.role)
            made = nodes.assign(connection, request.node_id, request.role, expected)
            if made.version != former.version:
                data = {"role": request.role, "former": former.role, "version": made.version}
                events.add(connection, "node.role_changed", request.node_id, node_id=request.node_id, data=data)
                audit.add(connection, caller, "assign", "nodes", request.node_id, data=data)
            return types_pb2.Node(node_id=made.node_id, version=made.version)

        await self._once("AssignNodeRole", Commit.NODE_ASSIGN, request, types_pb2.Node, work)
        self._s.bus.publish(EVENTS)
        self._s.bus.publish(NODES)
        return await self.GetNode(pb.GetNodeRequest(node_id=request.node_id), context)


def _checked(given: types_pb2.NodeRole) -> tuple[Role, str]:
    plugins = {each.distribution: each.versions for each in given.plugins}
    if len(plugins) != len(given.plugins):
        raise InvalidInput(f"role {given.name} names a plugin twice", code="bad_role")
    role = make_role({"name": given.name, "description": given.description, "agent": given.agent, "plugins": plugins})
    try:
        lock = given.lock.decode("ascii")
    except UnicodeDecodeError as error:
        raise InvalidInput("the lock is not ASCII text", code="bad_lock") from error
    if not lock:
        raise NotFound(
            f"role {role.name} comes without a lock", code="lock_missing", hint="outrider node role lock FILE makes it"
        )
    check_lock(role, read_lock(lock))
    return role, lock
