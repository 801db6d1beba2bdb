"""Objects and env sets."""

from __future__ import annotations

import re

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import Connection

from outrider import wire
from outrider.errors import Conflict, InvalidInput, Problem
from outrider.pipeline import EnvName, Name
from outrider.v1 import control_service_pb2 as pb
from outrider.v1 import types_pb2
from server_core.access import current_caller
from server_core.bus.base import EVENTS
from server_core.control.common import Context, Part, check_name, check_ref
from server_core.security.vault import env_purpose
from server_core.store import audit, envs, events, objects, runs
from server_core.store.commits import Commit

_MAX_VALUE_BYTES = 64 * 1024
_ATTRIBUTE = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,127}")
_SET_NAME: TypeAdapter[str] = TypeAdapter(Name)
_ENV_NAME: TypeAdapter[str] = TypeAdapter(EnvName)


class Data(Part):
    async def SetObject(self, request: pb.SetObjectRequest, context: Context) -> types_pb2.Object:
        ref = check_ref(request.ref)
        attributes = wire.load_json_object(request.attributes_json, "attributes")
        for name in attributes:
            if not _ATTRIBUTE.fullmatch(name):
                raise InvalidInput(f"{name!r} can't be the name of an attribute", code="bad_name")
        expected = request.expected_version if request.HasField("expected_version") else None

        def work(connection: Connection) -> types_pb2.Object:
            found = objects.put(connection, ref, attributes, replace=request.replace, expected_version=expected)
            events.add(connection, "object.changed", objects.spoken(ref), data={"version": found.version})
            return found

        answer = await self._once("SetObject", Commit.OBJECT_SET, request, types_pb2.Object, work)
        self._s.bus.publish(EVENTS)
        return answer

    async def GetObject(self, request: pb.GetObjectRequest, context: Context) -> types_pb2.Object:
        ref = check_ref(request.ref)
        return await self._s.db.read(lambda c: objects.get(c, ref))

    async def ListObjects(self, request: pb.ListObjectsRequest, context: Context) -> pb.ListObjectsResponse:
        return pb.ListObjectsResponse(objects=await self._s.db.read(lambda c: objects.listed(c, request.kind)))

    async def RemoveObject(self, request: pb.RemoveObjectRequest, context: Context) -> pb.RemoveObjectResponse:
        ref = check_ref(request.ref)
        caller = current_caller()

        def work(connection: Connection) -> pb.RemoveObjectResponse:
            active = runs.active_of(connection, ref)
            if active:
                raise Conflict(
                    f"object {objects.spoken(ref)} has a run that is not over: {active[0].run_id}",
                    code="object_busy",
                    hint="cancel it or wait for its end",
                )
            objects.remove(connection, ref)
            events.add(connection, "object.removed", objects.spoken(ref))
            audit.add(connection, caller, "delete", "objects", objects.spoken(ref))
            return pb.RemoveObjectResponse()

        answer = await self._once("RemoveObject", Commit.OBJECT_REMOVE, request, pb.RemoveObjectResponse, work)
        self._s.bus.publish(EVENTS)
        return answer

    async def SetEnvSet(self, request: pb.SetEnvSetRequest, context: Context) -> pb.EnvSet:
        _check_envs(request)
        sealed = {
            name: self._s.vault.seal(value.encode(), env_purpose(request.name, name))
            for name, value in request.values.items()
        }
        expected = request.expected_version if request.HasField("expected_version") else None
        caller = current_caller()

        def work(connection: Connection) -> pb.EnvSet:
            found = envs.put(connection, request.name, sealed, request.remove, expected)
            events.add(connection, "env.changed", request.name, data={"version": found.version})
            names = {"set": sorted(sealed), "removed": sorted(request.remove)}
            audit.add(connection, caller, "update", "envs", request.name, data=names)
            return found

        answer = await self._once("SetEnvSet", Commit.ENV_SET, request, pb.EnvSet, work)
        self._s.bus.publish(EVENTS)
        return answer

    async def ListEnvSets(self, request: pb.ListEnvSetsRequest, context: Context) -> pb.ListEnvSetsResponse:
        return pb.ListEnvSetsResponse(env_sets=await self._s.db.read(envs.listed))

    async def RemoveEnvSet(self, request: pb.RemoveEnvSetRequest, context: Context) -> pb.RemoveEnvSetResponse:
        check_name("name of an env set", request.name)
        caller = current_caller()

        def work(connection: Connection) -> pb.RemoveEnvSetResponse:
            envs.remove(connection, request.name)
            events.add(connection, "env.removed", request.name)
            audit.add(connection, caller, "delete", "envs", request.name)
            return pb.RemoveEnvSetResponse()

        answer = await self._once("RemoveEnvSet", Commit.ENV_REMOVE, request, pb.RemoveEnvSetResponse, work)
        self._s.bus.publish(EVENTS)
        return answer


def _check_envs(request: pb.SetEnvSetRequest) -> None:
    """Refuse what no pipeline could name; never repeats a value."""
    problems = []
    if not _fits(_SET_NAME, request.name):
        problems.append(
            Problem(
                f"{request.name!r} can't be the name of an env set",
                hint="lower-case letters, digits, '_' and '-', beginning with a letter",
            )
        )
    for name, value in request.values.items():
        if not _fits(_ENV_NAME, name):
            problems.append(Problem(f"{name!r} can't be the name of an environment variable"))
        elif "\0" in value or len(value.encode()) > _MAX_VALUE_BYTES:
            problems.append(Problem(f"the value of {name} has a NUL or more than {_MAX_VALUE_BYTES} bytes"))
    if problems:
        raise InvalidInput(f"the env set can't be stored: {problems[0]}", problems)


def _fits(pattern: TypeAdapter[str], name: str) -> bool:
    try:
        pattern.validate_python(name)
    except ValidationError:
        return False
    return True
