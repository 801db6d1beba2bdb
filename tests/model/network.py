"""gRPC without sockets: real stubs, real handlers, real interceptors, and between them a link that a test can break.

Messages are serialised as on the wire and take a moment each way. The link can be cut (both sides hear of it),
go silent in one direction or both (neither hears; what was sent arrives when it heals, unless it is cut first),
and refuse calls while no server is there.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, Literal

import grpc

from outrider.tls import Identity
from tests.model.virtual import PROCESS, Process, instant

LATENCY_S = 0.002
Direction = Literal["up", "down"]
_END = object()


def _error(code: grpc.StatusCode, details: str, trailers: Any = ()) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailers), details)


class Link:
    """What lies between one client and the server. ``server`` is None while nobody listens."""

    def __init__(self) -> None:
        self.server: MemoryServer | None = None
        self.calls: list[_Call] = []
        self.silent: set[Direction] = set()
        self._last = 0.0
        self._held: deque[tuple[Direction, Callable[[], None]]] = deque()

    def pass_on(self, direction: Direction, deliver: Callable[[], None]) -> None:
        """Have ``deliver`` called on the other side, in order, unless the link is cut before."""
        if direction in self.silent:
            self._held.append((direction, deliver))
            return
        # In no process's context: what was sent arrives though the sender has died.
        loop = asyncio.get_running_loop()
        # Timers of one moment have no order of their own.
        self._last = max(loop.time() + LATENCY_S, self._last + 1e-6)
        loop.call_at(self._last, self._arrive, direction, deliver, context=_nobody())

    def _arrive(self, direction: Direction, deliver: Callable[[], None]) -> None:
        if direction in self.silent:
            self._held.append((direction, deliver))
        else:
            deliver()

    def hush(self, *directions: Direction) -> None:
        self.silent |= set(directions)

    def heal(self) -> None:
        self.silent.clear()
        held, self._held = self._held, deque()
        for direction, deliver in held:
            self.pass_on(direction, deliver)

    def cut(self) -> None:
        """Reset every connection; what was on its way is lost."""
        self._held.clear()
        for call in list(self.calls):
            call.reset()


def _nobody() -> contextvars.Context:
    context = contextvars.copy_context()
    context.run(PROCESS.set, None)
    return context


class MemoryServer:
    """In the place of `grpc.aio.server`. Its handlers run as tasks of the process that made it."""

    def __init__(self, links: list[Link], interceptors: Any = (), **_options: Any) -> None:
        self._links = links
        self._interceptors = list(interceptors or ())
        self._handlers: list[Any] = []
        process = PROCESS.get()
        assert process is not None
        self.process: Process = process
        process.on_death.append(self._vanish)

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        self._handlers.extend(handlers)

    def add_registered_method_handlers(self, _service: str, _handlers: Any) -> None:
        """Only a faster way to the same handlers."""

    def add_secure_port(self, _address: str, _credentials: Any) -> int:
        return 8443

    async def start(self) -> None:
        for link in self._links:
            link.server = self

    async def stop(self, _grace: float | None) -> None:
        self._vanish()

    async def wait_for_termination(self, _timeout: float | None = None) -> bool:
        return True

    def _vanish(self) -> None:
        for link in self._links:
            if link.server is self:
                link.server = None
                link.cut()

    async def handler(self, details: Any) -> Any:
        async def plain(details: Any) -> Any:
            return next((found for each in self._handlers if (found := each.service(details)) is not None), None)

        following = plain
        for interceptor in reversed(self._interceptors):
            following = _bound(interceptor.intercept_service, following)
        return await following(details)


def _bound(intercept: Any, following: Any) -> Any:
    async def call(details: Any) -> Any:
        return await intercept(following, details)

    return call


class _Call:
    """One call. The client's half is used by stubs, the server's by `_serve`."""

    def __init__(self, link: Link, method: str, metadata: Any, encode: Any, decode: Any) -> None:
        instant(f"call {method.rpartition('/')[2]}")
        self._link = link
        self._encode, self._decode = encode, decode
        self._up: asyncio.Queue[Any] = asyncio.Queue()
        self._down: asyncio.Queue[Any] = asyncio.Queue()
        self._over: BaseException | None = None
        self._task: asyncio.Task[None] | None = None
        link.calls.append(self)
        self._caller = PROCESS.get()
        if self._caller is not None:
            self._caller.on_death.append(self.reset_from_client)
        if link.server is None:
            self._end(_error(grpc.StatusCode.UNAVAILABLE, "failed to connect: connection refused"))
            return
        server = link.server
        details = SimpleNamespace(method=method, invocation_metadata=metadata)
        link.pass_on("up", lambda: self._begin(server, details))

    # The client's half.

    def send(self, message: Any) -> None:
        if self._over is not None:
            raise asyncio.InvalidStateError("RPC already finished.")
        instant("wire.sent")
        data = self._encode(message)
        self._link.pass_on("up", lambda: self._up.put_nowait(data))

    def done_writing(self) -> None:
        self._link.pass_on("up", lambda: self._up.put_nowait(_END))

    async def receive(self) -> Any:
        """The next message; _END after the last. Raises what ended the call."""
        if self._over is not None and self._down.empty():
            raise self._over
        item = await self._down.get()
        instant("wire.received")
        if isinstance(item, BaseException):
            self._end(item)
            raise item
        return item if item is _END else self._decode(item)

    def cancel(self) -> None:
        if self in self._link.calls:
            self._link.calls.remove(self)
            self._link.pass_on("up", self._cancel_server)
        self._over = self._over or _error(grpc.StatusCode.CANCELLED, "Locally cancelled by application!")

    def expire(self) -> None:
        """The client's deadline is over."""
        if self._over is None:
            self._down.put_nowait(_error(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"))
            self._link.pass_on("up", self._cancel_server)

    def reset_from_client(self) -> None:
        """The client is dead: its system closes the connection."""
        if self in self._link.calls:
            self._link.calls.remove(self)
            self._link.pass_on("up", self._cancel_server)

    def reset(self) -> None:
        """The connection is gone, for both."""
        if self in self._link.calls:
            self._link.calls.remove(self)
        self._cancel_server()
        if self._over is None:
            self._down.put_nowait(_error(grpc.StatusCode.UNAVAILABLE, "Connection reset by peer"))

    def _end(self, error: BaseException) -> None:
        self._over = self._over or error
        if self in self._link.calls:
            self._link.calls.remove(self)

    def _cancel_server(self) -> None:
        self._up.put_nowait(_error(grpc.StatusCode.CANCELLED, "the client went away"))
        if self._task is not None:
            self._task.cancel()

    # The server's half.

    def _begin(self, server: MemoryServer, details: Any) -> None:
        if server.process.alive and self in self._link.calls:
            self._task = server.process.start(self._serve(server, details))

    async def _serve(self, server: MemoryServer, details: Any) -> None:
        context = _Context(self, details)
        try:
            handler = await server.handler(details)
            if handler is None:
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no such method", ())
            context.encode = handler.response_serializer
            request: Any = self._requests(handler.request_deserializer)
            if not handler.request_streaming:
                request = await anext(request)
            kind = (
                "stream" if handler.request_streaming else "unary",
                "stream" if handler.response_streaming else "unary",
            )
            behaviour = getattr(handler, "_".join(kind))
            if inspect.isasyncgenfunction(behaviour):
                async for answer in behaviour(request, context):
                    await context.write(answer)
            else:
                answer = await behaviour(request, context)
                if not handler.response_streaming:
                    await context.write(answer)
            self._link.pass_on("down", lambda: self._down.put_nowait(_END))
        except grpc.aio.AbortError:
            pass
        finally:
            if self._task is not None and self._task.cancelling() and server.process.alive:
                self._link.pass_on(
                    "down", lambda: self._down.put_nowait(_error(grpc.StatusCode.CANCELLED, "cut off by the server"))
                )

    async def _requests(self, decode: Any) -> AsyncIterator[Any]:
        while (item := await self._up.get()) is not _END:
            if isinstance(item, BaseException):
                raise asyncio.CancelledError
            instant("server.received")
            yield decode(item)


class _Context:
    """A servicer's context: the part of it that our handlers use."""

    def __init__(self, call: _Call, details: Any) -> None:
        self._call = call
        self._details = details
        self.encode: Any = None

    def invocation_metadata(self) -> Any:
        return self._details.invocation_metadata

    def peer(self) -> str:
        return "memory"

    async def write(self, message: Any) -> None:
        instant("server.sends")
        data, call = self.encode(message), self._call
        call._link.pass_on("down", lambda: call._down.put_nowait(data))

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        error, call = _error(code, details, trailing_metadata), self._call
        call._link.pass_on("down", lambda: call._down.put_nowait(error))
        raise grpc.aio.AbortError("Locally aborted.")

    def __getattr__(self, name: str) -> Any:
        if name in ("set_trailing_metadata", "set_code", "set_details"):
            return lambda *_: None
        raise AttributeError(name)


class _StreamCall:
    """What a stub's streaming call gives: written to, read from, awaited, cancelled."""

    def __init__(self, call: _Call, requests: Any, timeout: float | None) -> None:
        self._call = call
        self._feeder: asyncio.Task[None] | None = None
        if timeout is not None:
            asyncio.get_running_loop().call_later(timeout, call.expire)
        if requests is not None:
            self._feeder = asyncio.ensure_future(self._feed(requests))

    async def _feed(self, requests: Any) -> None:
        try:
            async for message in requests:
                self._call.send(message)
            self._call.done_writing()
        except asyncio.InvalidStateError:
            return
        except Exception:
            self._call.cancel()
            raise

    async def write(self, message: Any) -> None:
        if isinstance(self._call._over, grpc.aio.AioRpcError):
            raise self._call._over
        self._call.send(message)

    async def done_writing(self) -> None:
        self._call.done_writing()

    def done(self) -> bool:
        return self._call._over is not None

    def cancel(self) -> bool:
        if self._feeder is not None:
            self._feeder.cancel()
        self._call.cancel()
        return True

    async def initial_metadata(self) -> Any:
        return ()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._messages()

    async def read(self) -> Any:
        item = await self._call.receive()
        return grpc.aio.EOF if item is _END else item

    async def _messages(self) -> AsyncIterator[Any]:
        while (item := await self._call.receive()) is not _END:
            yield item
        self._call._end(asyncio.InvalidStateError("RPC already finished."))

    def __await__(self) -> Any:
        return self._answer().__await__()

    async def _answer(self) -> Any:
        try:
            return await self._call.receive()
        finally:
            if self._feeder is not None:
                self._feeder.cancel()


class MemoryChannel:
    """In the place of a `grpc.aio.Channel` to the server behind ``link``."""

    def __init__(self, link: Link, identity: Identity) -> None:
        self._link = link
        self._identity = identity
        self._calls: list[_Call] = []

    async def __aenter__(self) -> MemoryChannel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        for call in self._calls:
            call.cancel()

    def _call(self, method: str, encode: Any, decode: Any) -> _Call:
        call = _Call(self._link, method, self._identity.metadata(), encode, decode)
        self._calls = [each for each in self._calls if each._over is None]
        self._calls.append(call)
        return call

    def unary_unary(self, method: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        async def invoke(request: Any, *, timeout: float | None = None, metadata: Any = None) -> Any:
            call = self._call(method, request_serializer, response_deserializer)
            try:
                async with asyncio.timeout(timeout):
                    if call._over is not None:
                        raise call._over
                    call.send(request)
                    return await call.receive()
            except TimeoutError:
                raise _error(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded") from None
            finally:
                call.cancel()

        return invoke

    def stream_unary(self, method: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        def invoke(requests: Any = None, *, timeout: float | None = None, metadata: Any = None) -> _StreamCall:
            return _StreamCall(self._call(method, request_serializer, response_deserializer), requests, timeout)

        return invoke

    def stream_stream(self, method: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        def invoke(requests: Any = None, *, timeout: float | None = None, metadata: Any = None) -> _StreamCall:
            return _StreamCall(self._call(method, request_serializer, response_deserializer), requests, timeout)

        return invoke

    def unary_stream(self, method: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        def invoke(request: Any, *, timeout: float | None = None, metadata: Any = None) -> _StreamCall:
            call = self._call(method, request_serializer, response_deserializer)
            if call._over is None:
                call.send(request)
                call.done_writing()
            return _StreamCall(call, None, timeout)

        return invoke
