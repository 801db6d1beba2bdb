"""The server: startup, what it does while it serves, shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import secrets
import socket
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio  # type: ignore[attr-defined]  # the stubs leave it out
from grpc_reflection.v1alpha import reflection, reflection_pb2
from sqlalchemy import Connection

from outrider import tls
from outrider.errors import Conflict, InvalidInput, OutriderError, TemporaryError, Unavailable
from outrider.retry import FOREVER
from outrider.v1 import (
    control_service_pb2,
    control_service_pb2_grpc,
    node_service_pb2,
    node_service_pb2_grpc,
)
from server_core import access
from server_core.admission import Admission
from server_core.bus.local import LocalBus
from server_core.config import ServerConfig
from server_core.control.service import ControlService
from server_core.datadir import DataDirLock
from server_core.dispatch import Dispatcher
from server_core.drains import Drains
from server_core.fleet import Fleet
from server_core.housekeeping import Housekeeping
from server_core.node_service import NodeService
from server_core.security import certs, tokens, vault
from server_core.services import Services
from server_core.store import tokens as token_rows
from server_core.store.commits import Commit
from server_core.store.common import get_meta, now_us, set_meta
from server_core.store.sqlite import SqliteDatabase
from server_core.streams import Pipes

log = structlog.get_logger(__name__)

_SERVICES = (
    (control_service_pb2.DESCRIPTOR.services_by_name["ControlService"], access.CONTROL),
    (node_service_pb2.DESCRIPTOR.services_by_name["NodeService"], access.NODE),
    (health_pb2.DESCRIPTOR.services_by_name["Health"], access.HEALTH),
    (reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"], access.REFLECTION),
)
_FAREWELL_S = 0.5
"""How long agents have to hear that the server stops, also when there is no grace for calls."""
_STUCK_S = 2.0
_RESTART_TAKES_S = 2.0
"""How long a server that stops is away, if it is restarted: before that no agent needs to look for it."""
_HOUSEKEEPING_FIRST_S = 60.0
"""Not at once: a fleet that comes back needs the store."""
_RENEWAL_GRACE_S = 2.0


@dataclass(frozen=True, slots=True)
class InitResult:
    """What the operator of a new server needs. ``admin_token`` is shown once; the store has only its hash."""

    admin_token: str
    ca_path: Path
    server_id: str


async def init(config: ServerConfig, *, new_token: bool = False) -> InitResult:
    """Make store, keys, CA and the first operator's token in ``config.data_dir``.

    Raises Conflict if that was done before; ``new_token`` then revokes the admin's token and makes another.
    """
    return await asyncio.to_thread(_init, config, new_token)


def _init(config: ServerConfig, new_token: bool) -> InitResult:
    with DataDirLock(config.data_dir, make=True):
        if config.store_file.exists() and not config.key_file.exists():
            vault.read_master_key(config.key_file)  # says what is wrong: a new key would open nothing of this store
        vault.make_master_key(config.key_file)
        certs.ensure(config.ca_file.parent, config.names)
        db = SqliteDatabase(config.store_file)
        try:
            token = tokens.mint(tokens.OPERATOR_PREFIX)
            admin = token_rows.Caller(token_rows.OPERATOR, "admin", "admin", tokens.digest(token))

            def work(connection: Connection) -> str:
                if token_rows.count(connection, token_rows.OPERATOR) and not new_token:
                    raise Conflict(
                        f"{config.data_dir} is a server's data directory already",
                        code="already_initialised",
                        hint="`outrider server run` serves it; `outrider server init --new-token` replaces the token",
                    )
                vault.open_vault(connection, vault.read_master_key(config.key_file), now_us())
                token_rows.remove(connection, token_rows.OPERATOR, admin.name)
                token_rows.add(connection, admin)
                return _server_id(connection)

            return InitResult(token, config.ca_file, db.write_now(Commit.SERVER_INIT, work))
        finally:
            db.close()


class Server:
    """One server. ``start`` returns when it serves, ``stop`` when it no longer does.

    ``start`` raises InvalidInput if the data directory is not one, is damaged or is newer than this program, and
    Conflict if the port or the data directory is taken.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.port = 0
        self._stack = contextlib.AsyncExitStack()
        self._started = False

    async def start(self) -> None:
        """Open the store, read the keys, listen."""
        config = self.config
        if not config.store_file.exists():
            raise InvalidInput(
                f"{config.data_dir} is not a server's data directory",
                code="not_initialised",
                hint="make one with `outrider server init`",
            )
        table = access.permission_table(_SERVICES)
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(DataDirLock(config.data_dir))
            master_key = vault.read_master_key(config.key_file)
            certificate = await asyncio.to_thread(_certificate, config)
            db = await asyncio.to_thread(SqliteDatabase, config.store_file, reserve_bytes=config.disk_reserve_bytes)
            stack.push_async_callback(asyncio.to_thread, db.close)
            vault_, server_id = await db.write(
                Commit.SERVER_START, lambda c: (vault.open_vault(c, master_key, now_us()), _server_id(c))
            )
            bus = LocalBus()
            returns = config.registrations_per_second
            fleet = Fleet(db, bus, config.heartbeat_interval_s, config.missed_heartbeats, returns)
            await fleet.load()
            dispatcher = Dispatcher(db, bus, fleet)
            drains = Drains(db, bus, fleet, dispatcher)
            await drains.load()
            guard = access.Access(table, db, fleet)
            services = Services(
                config,
                db,
                bus,
                fleet,
                dispatcher,
                drains,
                vault_,
                Pipes(),
                guard,
                Admission(returns),
                server_id,
                now_us(),
            )
            self._services = services
            await self._open(certificate, config.listen)
            stack.push_async_callback(fleet.flush)
            stack.push_async_callback(dispatcher.stop)
            for work in (fleet.run(), drains.run(), self._housekeeping()):
                task = asyncio.get_running_loop().create_task(work)
                stack.push_async_callback(_end, task)
            self._stack = stack.pop_all()
        self._started = True
        log.info("server listens", address=config.listen, port=self.port, server_id=server_id)

    async def stop(self, grace: float = 5.0) -> None:
        """Refuse new calls, end streams, give other calls ``grace`` seconds; says what was cut off. Idempotent."""
        if not self._started:
            return
        self._started = False
        self._services.bus.close()
        await self._close("the server is stopping", grace, absent_s=_RESTART_TAKES_S)
        await self._stack.aclose()
        log.info("server stopped")

    def status_line(self) -> str:
        """How the server is, in one line, for the service manager. Only once it is started."""
        nodes = self._services.fleet.online_count()
        return f"serving on port {self.port}; {nodes} {'node' if nodes == 1 else 'nodes'} online"

    async def renew_certificate(self) -> bool:
        """Serve with the certificate on disk, made anew if it is due; returns whether it is another one.

        The listener is opened anew for it: agents and watchers are cut off for a moment and come back. gRPC could ask
        for the certificate at every handshake instead, but then its threads call into the interpreter while they hold
        what a stopping server needs; a test run under load hung once with that, and the cause was not proven.
        """
        certificate = await asyncio.to_thread(_certificate, self.config)
        if certificate == self._certificate:
            return False
        log.info("the certificate is renewed, and the listener opened anew")
        await self._close("the server renews its certificate", _RENEWAL_GRACE_S, absent_s=_RENEWAL_GRACE_S)
        host = self.config.listen.rpartition(":")[0]
        # A server without a listener is of no use to anybody: whatever holds the port, it is tried again.
        await FOREVER.run(lambda: self._reopen(certificate, f"{host}:{self.port}"))
        return True

    async def _reopen(self, certificate: certs.Certificate, listen: str) -> None:
        try:
            await self._open(certificate, listen)
        except Conflict as error:
            log.error("the listener can't be opened again yet", error=str(error))
            raise TemporaryError(error.message, code=error.code) from error

    async def _open(self, certificate: certs.Certificate, listen: str) -> None:
        server = grpc.aio.server(interceptors=[self._services.access], options=tls.SERVER_OPTIONS)
        self._health = _add_services(server, self._services)
        self.port = _listen(server, listen, grpc.ssl_server_credentials([(certificate.key, certificate.chain)]))
        await server.start()
        self._server, self._certificate = server, certificate

    async def _close(self, why: str, grace: float, *, absent_s: float) -> None:
        def farewell(wait_s: float) -> OutriderError:
            return Unavailable(why, code="server_stopping", retry_after_s=wait_s)

        await self._health.enter_graceful_shutdown()
        await self._services.fleet.close_channels(farewell, max(grace, _FAREWELL_S), absent_s=absent_s)
        began = time.monotonic()
        try:
            # Seen: gRPC's own stop waiting for ever, long after its grace, with no call left.
            await asyncio.wait_for(self._server.stop(grace), grace + _STUCK_S)
        except TimeoutError:
            log.warning("gRPC did not finish stopping; it is left behind", waited_s=grace + _STUCK_S)
        if time.monotonic() - began >= grace > 0:
            log.warning("calls were cut off, because they took longer than the grace", grace_s=grace)

    async def _housekeeping(self) -> None:
        """Now and then: renew the certificate, remove what is too old."""
        housekeeping = Housekeeping(self._services.db, self._services.bus, self.config)
        every = self.config.housekeeping_interval_s
        await asyncio.sleep(min(every, _HOUSEKEEPING_FIRST_S))
        while True:
            for work in (self.renew_certificate, housekeeping.once):
                try:
                    await work()
                except (OutriderError, OSError) as error:
                    log.error("housekeeping failed", error=str(error))
            await asyncio.sleep(every)


def _server_id(connection: Connection) -> str:
    found = get_meta(connection, "server_id")
    if found is None:
        found = "srv" + secrets.token_hex(8)
        set_meta(connection, "server_id", found)
    return found


def _certificate(config: ServerConfig) -> certs.Certificate:
    if config.tls_cert_file is not None and config.tls_key_file is not None:
        certificate = certs.read(config.tls_cert_file, config.tls_key_file)
        left = certs.expires_at(certificate.chain) - datetime.now(UTC)
        if left < timedelta(0):
            raise InvalidInput(f"the certificate {config.tls_cert_file} has expired", code="tls_expired")
        if left < timedelta(days=14):
            log.warning("the certificate expires soon", file=str(config.tls_cert_file), days=left.days)
        return certificate
    return certs.ensure(config.ca_file.parent, config.names)


def _add_services(server: grpc.aio.Server, services: Services) -> health_aio.HealthServicer:
    control_service_pb2_grpc.add_ControlServiceServicer_to_server(ControlService(services), server)
    node_service_pb2_grpc.add_NodeServiceServicer_to_server(NodeService(services), server)
    checker = health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checker, server)
    names = [service.full_name for service, _ in _SERVICES]
    reflection.enable_server_reflection(names, server)
    return checker


def _listen(server: grpc.aio.Server, listen: str, credentials: grpc.ServerCredentials) -> int:
    _refuse_taken(listen)
    try:
        return server.add_secure_port(listen, credentials)
    except RuntimeError as error:
        raise _taken(listen, None) from error


def _refuse_taken(listen: str) -> None:
    """Try the address with a plain socket first: gRPC says only that it failed, not why."""
    host, _, port = listen.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{listen!r} is no address to listen on: {error}", code="bad_address") from error
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            raise _taken(listen, error) from error


def _taken(listen: str, error: OSError | None) -> OutriderError:
    if error is None or error.errno == errno.EADDRINUSE:
        return Conflict(
            f"the address {listen} is taken by another program",
            code="port_taken",
            hint="stop that program, or give another port with `listen`",
        )
    return InvalidInput(f"{listen} can't be listened on: {error.strerror}", code="bad_address")


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
