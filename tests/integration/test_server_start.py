"""How a server starts, or says in a sentence why it does not; and what a stranger's connection gets."""

from __future__ import annotations

import asyncio
import os
import socket
import sqlite3
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from outrider import tls
from outrider.errors import Conflict, InvalidInput, OutriderError, Unavailable
from outrider.v1 import control_service_pb2 as cpb
from outrider.v1 import control_service_pb2_grpc as cgrpc
from server_core import server as server_module
from server_core.config import ServerConfig
from server_core.security import certs
from server_core.server import Server, init
from tests.integration.server_rig import TIMEOUT, refused, served


async def problem_of_start(config: ServerConfig) -> OutriderError:
    server = Server(config)
    try:
        async with asyncio.timeout(2):
            await server.start()
    except OutriderError as error:
        return error
    await server.stop(0)
    raise AssertionError("the server started")


@pytest.fixture
def config(tmp_path: Path) -> ServerConfig:
    return ServerConfig(data_dir=tmp_path / "server", listen="127.0.0.1:0")


async def test_init_is_done_once_and_a_new_token_replaces_the_old(config: ServerConfig) -> None:
    first = await init(config)
    with pytest.raises(Conflict, match="is a server's data directory already"):
        await init(config)
    second = await init(config, new_token=True)
    assert second.server_id == first.server_id
    server = Server(config)
    await server.start()
    address = f"127.0.0.1:{server.port}"
    for token, known in ((first.admin_token, False), (second.admin_token, True)):
        identity = tls.Identity(token)
        async with tls.open_channel(address, ca=tls.read_ca(config.ca_file), identity=identity) as channel:
            call = cgrpc.ControlServiceStub(channel).GetServerInfo(cpb.GetServerInfoRequest(), timeout=TIMEOUT)
            if known:
                assert (await call).server_id == first.server_id
            else:
                assert (await refused(call)).code == "token_wrong"
    await server.stop(0)


async def test_secret_files_are_the_owners_alone(config: ServerConfig) -> None:
    await init(config)
    for name in ("master.key", "store.db", "tls/ca.key", "tls/server.key"):
        assert stat.S_IMODE((config.data_dir / name).stat().st_mode) == 0o600, name
    assert stat.S_IMODE(config.data_dir.stat().st_mode) == 0o700


async def test_directory_that_is_no_servers_is_told(config: ServerConfig) -> None:
    error = await problem_of_start(config)
    assert error.code == "not_initialised"
    assert "outrider server init" in str(error)
    assert not config.data_dir.exists()


async def test_taken_port_is_told(config: ServerConfig) -> None:
    await init(config)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        error = await problem_of_start(config.model_copy(update={"listen": address}))
    assert isinstance(error, Conflict)
    assert str(error).startswith(f"the address {address} is taken by another program")


async def test_second_server_on_the_same_directory_is_refused(tmp_path: Path) -> None:
    async with served(tmp_path / "server") as rig:
        error = await problem_of_start(rig.config)
    assert error.code == "data_dir_taken"


async def test_damaged_store_is_told_and_left_alone(config: ServerConfig) -> None:
    await init(config)
    config.store_file.write_bytes(b"no database " * 1000)
    before = config.store_file.read_bytes()
    error = await problem_of_start(config)
    assert isinstance(error, InvalidInput)
    assert error.code == "store_damaged"
    assert config.store_file.read_bytes() == before


async def test_store_of_a_newer_version_is_told_and_left_alone(config: ServerConfig) -> None:
    await init(config)
    with sqlite3.connect(config.store_file) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    error = await problem_of_start(config)
    assert error.code == "store_too_new"
    assert "9999" in str(error)


async def test_missing_open_and_foreign_master_keys_are_told(config: ServerConfig) -> None:
    await init(config)
    key = config.key_file.read_bytes()
    config.key_file.chmod(0o644)
    assert (await problem_of_start(config)).code == "master_key_open"
    config.key_file.unlink()
    assert (await problem_of_start(config)).code == "master_key_missing"
    config.key_file.touch(0o600)
    config.key_file.write_bytes(os.urandom(32))
    assert (await problem_of_start(config)).code == "master_key_wrong"
    config.key_file.write_bytes(key)
    server = Server(config)
    await server.start()
    await server.stop(0)


async def test_wrong_ca_wrong_name_and_wrong_port_are_sentences(tmp_path: Path) -> None:
    certs.ensure(tmp_path / "other", [])
    async with served(tmp_path / "server") as rig:
        for ca, server, name, code in (
            (tls.read_ca(tmp_path / "other" / "ca.pem"), rig.address, None, "tls_untrusted"),
            (rig.ca, rig.address, "elsewhere.example", "tls_wrong_name"),
            (rig.ca, "localhost:1", None, "connection_refused"),
        ):
            async with (
                asyncio.timeout(1),
                tls.open_channel(server, ca=ca, identity=tls.Identity("x"), server_name=name) as channel,
            ):
                stub = cgrpc.ControlServiceStub(channel)
                error = await refused(stub.ListNodes(cpb.ListNodesRequest(), timeout=TIMEOUT))
            assert isinstance(error, Unavailable)
            assert error.code == code


async def test_plain_text_gets_nothing(tmp_path: Path) -> None:
    async with served(tmp_path / "server") as rig, grpc.aio.insecure_channel(rig.address) as channel:
        error = await refused(cgrpc.ControlServiceStub(channel).ListNodes(cpb.ListNodesRequest(), timeout=TIMEOUT))
    assert isinstance(error, Unavailable)


async def test_health_is_for_everybody_and_reflection_for_operators(tmp_path: Path) -> None:
    async with served(tmp_path / "server") as rig:
        async with tls.open_channel(rig.address, ca=rig.ca) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            wish = reflection_pb2.ServerReflectionRequest(list_services="")
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([wish]), timeout=TIMEOUT)
            assert (await refused(call.read())).code == "token_missing"
        identity = tls.Identity(rig.admin_token)
        async with tls.open_channel(rig.address, ca=rig.ca, identity=identity) as channel:
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([wish]), timeout=TIMEOUT)
            services = [service.name for service in (await call.read()).list_services_response.service]
            assert {"outrider.v1.ControlService", "outrider.v1.NodeService"} <= set(services)


async def test_method_without_a_permission_stops_the_start(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await init(config)
    control, rules = server_module._SERVICES[0]
    fewer = {name: rule for name, rule in rules.items() if name != "CancelRun"}
    monkeypatch.setattr(server_module, "_SERVICES", ((control, fewer), *server_module._SERVICES[1:]))
    with pytest.raises(ValueError, match="ControlService/CancelRun has no entry"):
        await Server(config).start()


async def test_renewed_certificate_is_served_on_the_same_port(tmp_path: Path) -> None:
    async with served(tmp_path / "server") as rig:
        before = await asyncio.to_thread(_served_expiry, rig.address, rig.config.ca_file)
        later = datetime.now(UTC) + timedelta(days=330)
        assert not await rig.server.renew_certificate()
        certs.ensure(rig.config.ca_file.parent, [], now=later)
        assert await rig.server.renew_certificate()
        after = await asyncio.to_thread(_served_expiry, rig.address, rig.config.ca_file)
    assert after > before


def _served_expiry(address: str, ca: Path) -> datetime:
    import ssl

    host, port = tls.parse_server(address)
    context = ssl.create_default_context(cafile=str(ca))
    context.verify_flags &= ~ssl.VERIFY_X509_PARTIAL_CHAIN
    # The renewed one is valid only later; what matters here is which one is shown.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with socket.create_connection((host, port)) as raw, context.wrap_socket(raw) as connection:
        der = connection.getpeercert(binary_form=True)
    assert der is not None
    return certs.expires_at(ssl.DER_cert_to_PEM_cert(der).encode())
