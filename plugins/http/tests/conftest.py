"""A web server with faults to order, and the program as a process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import outrider_step_http as plugin
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

PROGRAM = Path(__file__).parents[1] / "program"
sys.path.append(str(PROGRAM))  # its parts are tested in this process, too


@dataclass
class Request:
    """What a client asked."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""


@dataclass
class Page:
    """What a path answers with. ``faults`` are used up one per request; see Site."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    ranges: bool = True
    chunked: bool = False
    bytes_per_s: int = 0  # of one connection; 0: as fast as it goes


class Site:
    """A server of pages.

    Faults: "503", "429" (with Retry-After: 1), "cut" (after half of what is asked for), "drop" (no answer at all),
    "stall" (half, then silence), "hang" (no answer, in silence), "shifted" (another range than was asked for), "none".
    """

    def __init__(self, address: str = "127.0.0.1", *, tls: ssl.SSLContext | None = None) -> None:
        self.pages: dict[str, Page] = {}
        self.requests: list[Request] = []
        self.uploads: dict[str, bytes] = {}
        self._over = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do(self) -> None:
                site.answer(self)

            do_GET = do_PUT = do_POST = do

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that goes away is what these tests are about."""

        self._server = Server((address, 0), Handler)
        self.port = self._server.server_port
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def put(self, path: str, body: bytes, **more: Any) -> str:
        """Offer a page with a strong tag; its SHA-256."""
        digest = hashlib.sha256(body).hexdigest()
        headers = {"ETag": f'"{digest[:16]}"'} | more.pop("headers", {})
        self.pages[path] = Page(body, headers={k: v for k, v in headers.items() if v}, **more)
        return digest

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in handler.headers.items()}
        self.requests.append(Request(handler.command, handler.path, headers, body))
        page = self.pages.get(handler.path.partition("?")[0])
        if page is None:
            return _send(handler, 404, {}, b"no such page")
        fault = page.faults.pop(0) if page.faults else "none"
        if fault == "drop":
            handler.close_connection = True
            return None
        if fault == "hang":
            self._over.wait(30)
            handler.close_connection = True
            return None
        if fault.isdigit():
            return _send(handler, int(fault), {"Retry-After": "1"} if fault == "429" else {}, b"fault")
        if handler.command != "GET":
            if page.status < 300:
                self.uploads[handler.path] = body
            return _send(handler, page.status, page.headers, b"")
        return self._offer(handler, page, headers, fault)

    def _offer(self, handler: BaseHTTPRequestHandler, page: Page, headers: dict[str, str], fault: str) -> None:
        status, body, more = page.status, page.body, dict(page.headers)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", ""))
        unchanged = headers.get("if-range") in {None, page.headers.get("ETag"), page.headers.get("Last-Modified")}
        if asked and page.ranges and unchanged:
            start = int(asked[1]) + (7 if fault == "shifted" else 0)
            end = min(int(asked[2]) + 1 if asked[2] else len(page.body), len(page.body))
            status, body = 206, page.body[start:end]
            more["Content-Range"] = f"bytes {start}-{end - 1}/{len(page.body)}"
        part = body[: len(body) // 2] if fault in {"cut", "stall"} else body
        handler.send_response(status)
        for name, value in more.items():
            handler.send_header(name, value)
        if page.chunked:
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            handler.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n" if part else b"")
            handler.wfile.write(b"0\r\n\r\n" if part == body else b"")
        else:
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            self._write(handler, part, page.bytes_per_s)
        if fault == "stall":
            handler.wfile.flush()
            self._over.wait(30)
        handler.close_connection = handler.close_connection or fault in {"cut", "stall"}

    def _write(self, handler: BaseHTTPRequestHandler, body: bytes, bytes_per_s: int) -> None:
        step = bytes_per_s // 20 or len(body)
        for at in range(0, len(body), step or 1):
            handler.wfile.write(body[at : at + step])
            if bytes_per_s and self._over.wait(0.05):
                return

    def close(self) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()


def _send(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes) -> None:
    handler.send_response_only(status)
    handler.send_header("Date", formatdate(usegmt=True))
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


class Proxy:
    """A proxy of one's own: connects where CONNECT says, or fetches what a whole address names. Counts what it did."""

    def __init__(self, credentials: str = "") -> None:
        self.asked: list[str] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_CONNECT(self) -> None:
                if proxy.refuses(self):
                    return
                host, _, port = self.path.rpartition(":")
                with socket.create_connection((host, int(port))) as far:
                    self.send_response(200)
                    self.end_headers()
                    proxy.join(self.connection, far)

            def do_GET(self) -> None:
                if proxy.refuses(self):
                    return
                with urllib.request.urlopen(self.path) as answer:
                    body = answer.read()
                _send(self, 200, {}, body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._credentials = credentials
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def refuses(self, handler: BaseHTTPRequestHandler) -> bool:
        self.asked.append(f"{handler.command} {handler.path}")
        if self._credentials and handler.headers.get("Proxy-Authorization") != self._credentials:
            _send(handler, 407, {}, b"")
            return True
        return False

    @staticmethod
    def join(near: socket.socket, far: socket.socket) -> None:
        """Carry bytes both ways until one side ends."""

        def carry(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(65536):
                    sink.sendall(data)
                sink.shutdown(socket.SHUT_RDWR)

        there = threading.Thread(target=carry, args=(near, far), daemon=True)
        there.start()
        carry(far, near)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@dataclass(frozen=True)
class Authority:
    """A certificate authority of the test's own, and the server that it vouches for."""

    pem: str
    server: ssl.SSLContext


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """For 127.0.0.1, and for nothing else."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = made.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = tmp_path_factory.mktemp("authority") / "both.pem"
    path.write_bytes(private + pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return Authority(pem.decode(), context)


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.close()


@pytest.fixture
def other_site() -> Iterator[Site]:
    """Another origin: the same host, another port."""
    made = Site()
    yield made
    made.close()


@dataclass
class Ended:
    """How a run of the program ended."""

    code: int
    outputs: dict[str, Any]
    progress: list[dict[str, Any]]
    error: str
    cause: str
    text: str


@dataclass
class Program:
    """The program of the step, started as the agent would start it but outside of a container."""

    directory: Path
    runs: int = 0

    def start(self, action: str, params: dict[str, Any], env: dict[str, str]) -> subprocess.Popen[str]:
        self.runs += 1
        contract = self.directory / f"outrider-{self.runs}"
        contract.mkdir()
        (contract / "inputs.json").write_text(json.dumps(params))
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.directory),
            "OUTRIDER_DIRECTORY": str(contract),
            "OUTRIDER_CONTRACT": "1",
            "OUTRIDER_RUN_ID": "rtest",
            "OUTRIDER_STEP": "transfer",
            "OUTRIDER_ATTEMPT": "1",
            "OUTRIDER_NETWORK": "egress",
            "OUTRIDER_NETWORK_ALLOW": "127.0.0.0/8",  # where the tests' servers are
        }
        return subprocess.Popen(
            [sys.executable, "-W", "error", str(PROGRAM), action],
            env=environment | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self, process: subprocess.Popen[str], run: int | None = None) -> Ended:
        """Wait for it. ``run``: which one it was, counted from 1; the last one if nothing is said."""
        text, _ = process.communicate(timeout=60)
        return read_contract(self.directory / f"outrider-{run or self.runs}", process.returncode, text)

    def run(self, action: str, params: dict[str, Any], env: dict[str, str] | None = None) -> Ended:
        return self.end(self.start(action, params, env or {}))


class Container:
    """The step's image, run with the options that the agent gives a step. ``host`` is this machine, seen from it."""

    def __init__(self, image: str, directory: Path, network: str, host: str) -> None:
        self.image, self.network, self.host = image, network, host
        self.contract, self.volume = directory / "contract", directory / "volume"
        for made in (self.contract, self.volume):
            made.mkdir()
            made.chmod(0o777)  # whatever uid the step gets; the test has no say in it

    def run(self, action: str, params: dict[str, Any], env: dict[str, str], *, mount: str = "rw") -> Ended:
        """``mount`` is how /build is mounted: rw, ro, or tiny (room for 2 MiB)."""
        (self.contract / "inputs.json").write_text(json.dumps(params))
        for name in ("outputs", "progress"):
            (self.contract / name).unlink(missing_ok=True)
        command = ["docker", "run", "--rm", "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
        command += ["--user=23456:23456", "--tmpfs=/tmp:size=64m", "--memory=150m", "--memory-swap=150m"]
        command += [f"--network={self.network}"]
        command += ["--pids-limit=64", "--label=outrider.test=transfer", f"--volume={self.contract}:/outrider"]
        build = "--tmpfs=/build:size=2m,mode=777" if mount == "tiny" else f"--volume={self.volume}:/build:{mount}"
        command += [build]
        command += ["--env=OUTRIDER_NETWORK_ALLOW=172.16.0.0/12,192.168.0.0/16,10.0.0.0/8"]
        command += ["--env=OUTRIDER_CONTRACT=1", "--env=OUTRIDER_RUN_ID=rtest", "--env=OUTRIDER_STEP=transfer"]
        command += [part for name in env for part in ("--env", name)]  # values don't belong into arguments
        ended = subprocess.run(
            [*command, self.image, action], env=os.environ | env, capture_output=True, text=True, timeout=100
        )
        return read_contract(self.contract, ended.returncode, ended.stdout + ended.stderr)


def docker(*args: str) -> str:
    return subprocess.run(["docker", *args], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="session")
def egress() -> Iterator[tuple[str, str]]:
    """A network like that of the class "egress", and this machine's address in it."""
    name = f"outrider-test-{uuid.uuid4().hex[:12]}"
    docker("network", "create", "--opt=com.docker.network.bridge.enable_icc=false", "--label=outrider.test", name)
    yield name, docker("network", "inspect", name, "--format={{(index .IPAM.Config 0).Gateway}}")
    docker("network", "rm", name)


@pytest.fixture
def container(egress: tuple[str, str]) -> Iterator[Container]:
    # On the disk: where /tmp is memory, what the step writes there would count as memory that it uses.
    with tempfile.TemporaryDirectory(prefix="outrider-test-", dir="/var/tmp") as folder:
        yield Container(plugin.IMAGE, Path(folder), *egress)


def read_contract(contract: Path, code: int, text: str) -> Ended:
    def lines(name: str) -> list[dict[str, Any]]:
        path = contract / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    outputs: dict[str, Any] = {}
    for line in lines("outputs"):
        outputs |= line
    reported = lines("progress")
    error = next((line for line in reported if "error" in line), {})
    progress = [line for line in reported if "done" in line]
    return Ended(code, outputs, progress, error.get("error", ""), error.get("code", ""), text)


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path)


@pytest.fixture
def wait_for() -> Callable[[Callable[[], object]], None]:
    def wait(condition: Callable[[], object]) -> None:
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end, "what was waited for did not happen within 20 s"
            time.sleep(0.02)

    return wait
