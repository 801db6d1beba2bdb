"""Who may call what: the permission table, and the one interceptor that decides.

Default deny: a method that has no entry in the table stops the server from starting. The interceptor also is
where errors become statuses, so that a handler only ever raises an OutriderError.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from google.protobuf.descriptor import ServiceDescriptor

from outrider import tls, wire
from outrider.errors import OutriderError, PermissionDenied, Unauthenticated
from server_core.fleet import Fleet
from server_core.logs import trace
from server_core.security import tokens as token_digests
from server_core.store import tokens
from server_core.store.base import Database
from server_core.store.tokens import Caller

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Rule:
    """What a method does, in the words that roles are made of. ``session``: only in the node's newest session."""

    audience: str  # "operator", "node" or "public"
    verb: str = ""
    resource: str = ""
    session: bool = False


def _operator(verb: str, resource: str) -> Rule:
    return Rule(tokens.OPERATOR, verb, resource)


_PUBLIC = Rule("public")
_NODE = Rule(tokens.NODE, session=True)

CONTROL = {
    "GetServerInfo": _operator("get", "server"),
    "AddNode": _operator("create", "nodes"),
    "ListNodes": _operator("list", "nodes"),
    "GetNode": _operator("get", "nodes"),
    "RemoveNode": _operator("delete", "nodes"),
    "DrainNode": _operator("drain", "nodes"),
    "SetNodeRole": _operator("update", "node_roles"),
    "GetNodeRole": _operator("get", "node_roles"),
    "ListNodeRoles": _operator("list", "node_roles"),
    "RemoveNodeRole": _operator("delete", "node_roles"),
    "AssignNodeRole": _operator("assign", "nodes"),
    "ValidatePipeline": _operator("validate", "pipelines"),
    "GetPipelineSchema": _operator("get", "pipelines"),
    "ExecutePipeline": _operator("create", "runs"),
    "ListRuns": _operator("list", "runs"),
    "GetRun": _operator("get", "runs"),
    "CancelRun": _operator("cancel", "runs"),
    "ResolveRun": _operator("resolve", "runs"),
    "RetryRun": _operator("retry", "runs"),
    "WatchRun": _operator("get", "runs"),
    "StreamRunLogs": _operator("get", "logs"),
    "ListContainers": _operator("list", "containers"),
    "InspectContainer": _operator("get", "containers"),
    "StartContainer": _operator("start", "containers"),
    "StopContainer": _operator("stop", "containers"),
    "RestartContainer": _operator("restart", "containers"),
    "RemoveContainer": _operator("delete", "containers"),
    "StreamContainerLogs": _operator("get", "logs"),
    "SetObject": _operator("update", "objects"),
    "GetObject": _operator("get", "objects"),
    "ListObjects": _operator("list", "objects"),
    "RemoveObject": _operator("delete", "objects"),
    "SetEnvSet": _operator("update", "envs"),
    "ListEnvSets": _operator("list", "envs"),
    "RemoveEnvSet": _operator("delete", "envs"),
    "SubscribeEvents": _operator("list", "events"),
    "ListAudit": _operator("list", "audit"),
    "VerifyAudit": _operator("list", "audit"),
}
NODE = {
    "Register": Rule(tokens.NODE),
    "Heartbeat": _NODE,
    "Connect": _NODE,
    "ReportEvents": _NODE,
    "StreamRunLogs": _NODE,
    "StreamContainerLogs": _NODE,
    "GetObject": _NODE,
    "GetEnvs": _NODE,
    "WriteBack": _NODE,
    "RecoverRuns": _NODE,
    "FindRemovedObjects": _NODE,
    "GetOwnRole": Rule(tokens.NODE),
}
HEALTH = {"Check": _PUBLIC, "Watch": _PUBLIC, "List": _PUBLIC}
REFLECTION = {"ServerReflectionInfo": _operator("get", "server")}

# What a role may do, as (verb, resource); "*" stands for all.
ROLES: Mapping[str, frozenset[tuple[str, str]]] = {
    "admin": frozenset({("*", "*")}),
    "viewer": frozenset({("get", "*"), ("list", "*"), ("validate", "*")}),
}

_caller: ContextVar[Caller] = ContextVar("caller")
_session: ContextVar[tuple[str, int]] = ContextVar("session")


def current_caller() -> Caller:
    """Who made the call that is being served."""
    return _caller.get()


def current_session() -> tuple[str, int]:
    """Session id and epoch under which a node made the call that is being served."""
    return _session.get()


def permission_table(
    services: Iterable[tuple[ServiceDescriptor, Mapping[str, Rule]]],
) -> dict[str, Rule]:
    """Full method names to rules. Raises ValueError unless every method has exactly one, and no rule is left over."""
    table: dict[str, Rule] = {}
    wrong = []
    for service, rules in services:
        methods = {method.name for method in service.methods}
        wrong += [f"{service.full_name}/{name} has no entry" for name in sorted(methods - set(rules))]
        # A health service of an older library lacks List; an entry for a call that can't be made does no harm.
        if service.full_name.startswith("outrider."):
            wrong += [f"{service.full_name}/{name} does not exist" for name in sorted(set(rules) - methods)]
        table |= {f"/{service.full_name}/{name}": rules[name] for name in methods & set(rules)}
    if wrong:
        raise ValueError(f"the permission table does not fit the services: {', '.join(wrong)}")
    return table


def allows(role: str, rule: Rule) -> bool:
    granted = ROLES.get(role, frozenset())
    return any(verb in ("*", rule.verb) and resource in ("*", rule.resource) for verb, resource in granted)


class Access(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Decides about every call, before its handler sees anything."""

    def __init__(self, table: Mapping[str, Rule], db: Database, fleet: Fleet) -> None:
        self._table = table
        self._db = db
        self._fleet = fleet
        self._known: dict[bytes, Caller] = {}

    def forget_tokens(self) -> None:
        """A token was revoked: look all of them up again."""
        self._known.clear()

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(handler_call_details)
        rule = self._table.get(handler_call_details.method)
        if handler is None or rule == _PUBLIC:
            return handler
        return _wrap(handler, rule, self._admit)

    async def _admit(self, rule: Rule | None, context: Any) -> Caller:
        metadata = {str(key): str(value) for key, value in context.invocation_metadata() or ()}
        caller = await self._authenticate(metadata.get(tls.AUTHORIZATION_KEY, ""))
        if rule is None:
            raise PermissionDenied("this call is not in the permission table")
        if rule.audience != caller.kind:
            raise PermissionDenied(
                f"this is the token of a {caller.kind}, and the call is for {rule.audience}s",
                code="wrong_audience",
                hint="agents need the token that `outrider node add` showed, operators their own",
            )
        if caller.kind == tokens.NODE:
            await self._check_node(rule, caller, metadata)
        elif not allows(caller.role, rule):
            raise PermissionDenied(f"{caller.name} (role {caller.role}) may not {rule.verb} {rule.resource}")
        return caller

    async def _authenticate(self, authorization: str) -> Caller:
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("the call carries no token", code="token_missing", hint="give one (OUTRIDER_TOKEN)")
        digest = token_digests.digest(token)
        caller = self._known.get(digest)
        if caller is None:
            caller = await self._db.read(lambda c: tokens.find(c, digest))
            if caller is None:
                raise Unauthenticated(
                    "the token is not one that this server knows", code="token_wrong", hint="it may have been revoked"
                )
            self._known[digest] = caller
        return caller

    async def _check_node(self, rule: Rule, caller: Caller, metadata: Mapping[str, str]) -> None:
        claimed = metadata.get(tls.NODE_KEY, caller.name)
        if claimed != caller.name:
            raise Unauthenticated(
                f"the token is not that of node {claimed!r}", code="token_wrong", hint="check node_id and token"
            )
        if rule.session:
            epoch = metadata.get(tls.EPOCH_KEY, "")
            session = metadata.get(tls.SESSION_KEY, ""), int(epoch) if epoch.isdecimal() else 0
            await self._fleet.check_session(caller.name, *session)
            _session.set(session)


def _wrap(handler: Any, rule: Rule | None, admit: Callable[[Rule | None, Any], Awaitable[Caller]]) -> Any:
    """The same handler behind ``admit``, with its errors as statuses."""
    kind = ("stream" if handler.request_streaming else "unary", "stream" if handler.response_streaming else "unary")
    inner = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    make = getattr(grpc, f"{kind[0]}_{kind[1]}_rpc_method_handler")

    async def call(request: Any, context: Any) -> Any:
        try:
            _caller.set(await admit(rule, context))
            if kind != ("unary", "unary"):
                return await inner(request, context)
            # A caller that has gone must not end it between the commit and what follows from it: a run that was
            # accepted would be told to nobody.
            work = asyncio.ensure_future(inner(request, context))
            work.add_done_callback(lambda done: done.cancelled() or done.exception())
            return await asyncio.shield(work)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _refuse(context, error)

    async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            _caller.set(await admit(rule, context))
            async for answer in inner(request, context):
                yield answer
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _refuse(context, error)

    wrapped = generate if inspect.isasyncgenfunction(inner) else call
    return make(wrapped, handler.request_deserializer, handler.response_serializer)


async def _refuse(context: Any, error: Exception) -> None:
    if not isinstance(error, OutriderError):
        log.error("a call failed unforeseen", traceback=trace(error))
    await wire.abort(context, error)
