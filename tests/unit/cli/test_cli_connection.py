"""Whatever is wrong with the connection is said in a sentence of its own, within a second or so."""

from __future__ import annotations

import http.server
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from outrider.errors import PermissionDenied, Unavailable
from outrider.v1 import control_service_pb2 as pb
from tests.faults.proxy import Proxy
from tests.unit.cli.conftest import OUTRIDER, Cli, Scripted, certificate

SOON_S = 4.0
"""A second is promised on an idle machine; starting the interpreter takes its part and machines are busy."""


def refused(cli: Cli, exit_code: int, *words: str, **env: str) -> str:
    started = time.monotonic()
    done = cli("node", "list", **env)
    assert time.monotonic() - started < SOON_S
    assert done.returncode == exit_code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr
    return done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_server_that_is_not_running(cli: Cli) -> None:
    port = free_port()
    refused(cli, 1, "nothing listens at", str(port), OUTRIDER_SERVER=f"127.0.0.1:{port}")


def test_a_wrong_token_and_where_it_came_from(cli: Cli) -> None:
    refused(cli, 1, "does not accept the token", "OUTRIDER_TOKEN", OUTRIDER_TOKEN="another")


def test_a_wrong_authority(cli: Cli, tmp_path: Path) -> None:
    other, _ = certificate(tmp_path / "other")
    refused(cli, 1, "certificate", "was not issued by the CA", str(other), OUTRIDER_CA=str(other))


def test_a_certificate_for_another_name(cli: Cli, tmp_path: Path) -> None:
    server = Scripted(tmp_path / "elsewhere", name="elsewhere.example")
    try:
        refused(
            cli, 1, "is not for '127.0.0.1'", OUTRIDER_SERVER=f"127.0.0.1:{server.port}", OUTRIDER_CA=str(server.ca)
        )
    finally:
        server.close()


@pytest.fixture
def web(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[int, Path]]:
    """A web server, with TLS if the parameter says so, and the CA to trust."""
    ca, key = certificate(tmp_path / "web")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    if request.param:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(ca, key)
        context.set_alpn_protocols(["http/1.1"])
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port, ca
    server.shutdown()
    server.server_close()
    thread.join(5)


@pytest.mark.parametrize("web", [False], indirect=True)
def test_a_port_that_does_not_speak_tls(cli: Cli, web: tuple[int, Path]) -> None:
    refused(cli, 1, "does not speak TLS", "port", OUTRIDER_SERVER=f"127.0.0.1:{web[0]}")


@pytest.mark.parametrize("web", [True], indirect=True)
def test_a_port_that_speaks_tls_for_something_else(cli: Cli, web: tuple[int, Path]) -> None:
    refused(cli, 1, "not gRPC", OUTRIDER_SERVER=f"127.0.0.1:{web[0]}", OUTRIDER_CA=str(web[1]))


def test_a_port_that_never_answers(cli: Cli) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        refused(cli, 1, "says nothing", OUTRIDER_SERVER=f"127.0.0.1:{silent.getsockname()[1]}")


def test_a_slow_link_is_not_taken_for_a_wrong_port(cli: Cli, scripted: Scripted) -> None:
    with Proxy() as proxy:
        proxy.target = ("127.0.0.1", scripted.port)
        proxy.delay_s = 0.4
        refused(cli, 1, "does not accept the token", OUTRIDER_SERVER=proxy.address, OUTRIDER_TOKEN="another")


def test_a_name_that_does_not_exist(cli: Cli) -> None:
    refused(cli, 1, "no-such-host.invalid", "resolved", OUTRIDER_SERVER="no-such-host.invalid:8443")


def test_an_address_and_a_ca_that_are_none(cli: Cli, tmp_path: Path) -> None:
    refused(cli, 4, "address", OUTRIDER_SERVER="127.0.0.1:port")
    refused(cli, 4, "ca.none", "does not exist", OUTRIDER_CA="ca.none")
    (tmp_path / "empty.pem").touch()
    refused(cli, 4, "empty.pem", "certificate", OUTRIDER_CA=str(tmp_path / "empty.pem"))


def test_no_server_is_known(cli: Cli) -> None:
    refused(cli, 4, "outrider dev", OUTRIDER_SERVER="", OUTRIDER_TOKEN="", OUTRIDER_CA="")


def test_what_the_server_refuses_is_said_in_its_words_and_not_tried_again(cli: Cli) -> None:
    def refuse(_request: pb.ListNodesRequest) -> pb.ListNodesResponse:
        raise Unavailable("the store is locked", hint="wait")

    cli.script["ListNodes"] = refuse
    refused(cli, 1, "the store is locked (wait)")
    assert cli.script.count(pb.ListNodesRequest) == 1

    def deny(_request: pb.ListNodesRequest) -> pb.ListNodesResponse:
        raise PermissionDenied("you may not list nodes")

    cli.script["ListNodes"] = deny
    refused(cli, 1, "you may not list nodes")


def test_an_unexpected_error_is_a_sentence_and_a_private_file(cli: Cli, tmp_path: Path) -> None:
    cli.script["GetObject"] = lambda _request: _broken_object()
    done = cli("object", "get", "game/a", TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: this is a defect of outrider: JSONDecodeError")
    assert done.stderr.count("\n") == 1
    (file,) = tmp_path.glob("outrider-error-*.txt")
    assert str(file) in done.stderr
    assert "Traceback" in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    debug = cli("--debug", "object", "get", "game/a")
    assert "Traceback" in debug.stderr


def _broken_object() -> object:
    from outrider.v1.types_pb2 import Object

    return Object(attributes_json=b"{not json")


def test_a_reader_that_has_read_enough_is_no_error(cli: Cli) -> None:
    done = subprocess.run(
        f"{OUTRIDER} completion bash | true",
        shell=True,
        env=cli.env,
        capture_output=True,
        check=False,
    )
    assert done.stderr == b""
