"""What the parts of ControlService share."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import Message
from sqlalchemy import Connection

from outrider.errors import InvalidInput
from outrider.v1 import control_service_pb2_grpc, types_pb2
from server_core.access import current_caller
from server_core.services import Services
from server_core.store import requests
from server_core.store.commits import Commit

Context = grpc.aio.ServicerContext[Any, Any]
M = TypeVar("M", bound=Message)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_NODE_ID = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")


class Changing(Protocol):
    """A request that changes something."""

    request_id: str

    def SerializeToString(self, *, deterministic: bool = ...) -> bytes: ...


class Part(control_service_pb2_grpc.ControlServiceServicer):
    """A part of ControlService."""

    def __init__(self, services: Services) -> None:
        self._s = services

    async def _once(
        self, method: str, commit: Commit, request: Changing, answer: type[M], work: Callable[[Connection], M]
    ) -> M:
        """Do ``work`` in a transaction and keep its answer beside it; for a repeated request give that answer again."""
        caller, digest = current_caller().key, request_digest(method, request)

        def run(connection: Connection) -> M:
            sealed = requests.answer_of(connection, caller, request.request_id, digest)
            if sealed is not None:
                return answer.FromString(self._s.vault.open(sealed, "answer"))
            made = work(connection)
            self._keep(connection, request, digest, caller, made)
            return made

        return await self._s.db.write(commit, run)

    async def _answered(self, request: Changing, digest: bytes, answer: type[M]) -> M | None:
        """The answer that this very request got before: to be asked for ahead of checks that could refuse it now."""
        caller = current_caller().key
        sealed = await self._s.db.read(lambda c: requests.answer_of(c, caller, request.request_id, digest))
        return None if sealed is None else answer.FromString(self._s.vault.open(sealed, "answer"))

    def _keep(self, connection: Connection, request: Changing, digest: bytes, caller: str, answer: Message) -> None:
        sealed = self._s.vault.seal(answer.SerializeToString(), "answer")
        requests.keep(connection, caller, request.request_id, digest, sealed)


def request_digest(method: str, request: Changing) -> bytes:
    """What tells one request from another. Raises InvalidInput if it has no usable id."""
    if not request.request_id or len(request.request_id) > 128:
        raise InvalidInput(
            "a call that changes something needs a request_id of at most 128 characters",
            code="request_id_missing",
            hint="make a new one for every new request, and repeat it when you repeat the request",
        )
    return hashlib.sha256(method.encode() + b"\0" + request.SerializeToString(deterministic=True)).digest()


def check_name(what: str, name: str) -> None:
    """Raise InvalidInput unless ``name`` can name an object or its kind."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"{name!r} can't be the {what}" if name else f"the {what} is missing",
            code="bad_name",
            hint="letters, digits, '.', '_' and '-', at most 63, beginning with a letter or digit",
        )


def check_node_id(node_id: str) -> None:
    """Raise InvalidInput unless an agent could have this id: it also becomes part of names on the node."""
    if not _NODE_ID.fullmatch(node_id):
        raise InvalidInput(
            f"{node_id!r} can't be the id of a node" if node_id else "the id of the node is missing",
            code="bad_name",
            hint="at most 63 of a-z, 0-9, '.', '_' and '-', beginning and ending with a letter or digit",
        )


def check_ref(ref: types_pb2.ObjectRef) -> types_pb2.ObjectRef:
    """The reference, if it could be an object's. Raises InvalidInput."""
    check_name("kind of an object", ref.kind)
    check_name("name of an object", ref.name)
    return ref
