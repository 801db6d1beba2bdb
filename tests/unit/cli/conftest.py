"""The command line as a process, against a ControlService whose answers each test writes itself. TLS as ever."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from outrider import tls, wire
from outrider.errors import OutriderError, Unauthenticated
from outrider.v1 import control_service_pb2 as pb
from outrider.v1 import control_service_pb2_grpc as rpc

OUTRIDER = Path(sys.executable).with_name("outrider")
TOKEN = "operator-token"


def certificate(folder: Path, name: str = "localhost") -> tuple[Path, Path]:
    """A self-signed certificate for this machine, which is its own CA; the files of certificate and key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    names: list[x509.GeneralName] = [x509.DNSName(name)]
    if name == "localhost":
        names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ca.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "ca.pem", folder / "key.pem"


@dataclass
class Script:
    """What the server answers: a callable by method name, that gives or raises; a generator for a stream."""

    answers: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    requests: list[Any] = field(default_factory=list)

    def __setitem__(self, method: str, answer: Callable[[Any], Any]) -> None:
        self.answers[method] = answer

    def last(self, kind: type) -> Any:
        return [request for request in self.requests if isinstance(request, kind)][-1]

    def count(self, kind: type) -> int:
        return sum(isinstance(request, kind) for request in self.requests)


class Scripted:
    """A ControlService over TLS, in a thread of its own."""

    def __init__(self, folder: Path, name: str = "localhost") -> None:
        self.ca, self._key = certificate(folder, name)
        self.script = Script()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.port: int = asyncio.run_coroutine_threadsafe(self._start(), self.loop).result(10)

    async def _start(self) -> int:
        self._server = grpc.aio.server(options=tls.SERVER_OPTIONS)
        service = rpc.ControlServiceServicer()
        for method in pb.DESCRIPTOR.services_by_name["ControlService"].methods:
            setattr(service, method.name, self._handler(method.name, method.client_streaming, method.server_streaming))
        rpc.add_ControlServiceServicer_to_server(service, self._server)
        credentials = grpc.ssl_server_credentials([(self._key.read_bytes(), self.ca.read_bytes())])
        port = self._server.add_secure_port("127.0.0.1:0", credentials)
        await self._server.start()
        return port

    def _handler(self, name: str, takes_stream: bool, gives_stream: bool) -> Any:
        async def check(context: Any) -> None:
            if dict(context.invocation_metadata()).get("authorization") != f"Bearer {TOKEN}":
                await wire.abort(context, Unauthenticated("the token is not known"))

        async def unary(request: Any, context: Any) -> Any:
            await check(context)
            self.script.requests.append(request)
            try:
                return await asyncio.to_thread(self.script.answers[name], request)
            except OutriderError as error:
                await wire.abort(context, error)

        async def stream(request: Any, context: Any) -> Any:
            await check(context)
            if takes_stream:
                request = [await anext(aiter(request))]
                self.script.requests.append(request[0])
            else:
                self.script.requests.append(request)
            answers = iter(self.script.answers[name](request[0] if takes_stream else request))
            done = object()
            while True:
                try:
                    item = await asyncio.to_thread(next, answers, done)
                except OutriderError as error:
                    await wire.abort(context, error)
                if item is done:
                    return
                yield item

        return stream if gives_stream else unary

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._server.stop(0), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


@dataclass
class Cli:
    """The `outrider` command with an environment of its own."""

    env: dict[str, str]
    script: Script
    folder: Path

    def start(self, *args: object, **env: str) -> subprocess.Popen[str]:
        # Whoever runs the tests in the background has it ignored, and children inherit that. Not by preexec_fn: gRPC
        # has threads in this process, and a child that ran Python between fork and exec was aborted at times.
        former = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return subprocess.Popen(
                [str(OUTRIDER), *map(str, args)],
                env=self.env | env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        finally:
            signal.signal(signal.SIGINT, former)

    def __call__(self, *args: object, stdin: str | bytes = "", **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(OUTRIDER), *map(str, args)],
            env=self.env | env,
            input=stdin if isinstance(stdin, bytes) else stdin.encode(),
            capture_output=True,
            timeout=30,
            check=False,
        )
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode("utf-8", "surrogateescape"), done.stderr.decode()
        )


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    server = Scripted(tmp_path_factory.mktemp("scripted"))
    yield server
    server.close()


@pytest.fixture
def cli(scripted: Scripted, tmp_path: Path) -> Cli:
    """The command, pointed at the scripted server by the environment alone."""
    scripted.script.answers.clear()
    scripted.script.requests.clear()
    env = {name: value for name, value in os.environ.items() if not name.startswith("OUTRIDER_")}
    env |= {
        "HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "OUTRIDER_SERVER": f"127.0.0.1:{scripted.port}",
        "OUTRIDER_CA": str(scripted.ca),
        "OUTRIDER_TOKEN": TOKEN,
    }
    return Cli(env, scripted.script, tmp_path)
