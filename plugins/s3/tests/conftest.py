"""A store to test against, a proxy that damages what passes through it, and the program as a process.

The store is moto's server; every test that takes ``store`` runs a second time against the endpoint in
OUTRIDER_TEST_S3_ENDPOINT, where that is set.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import outrider_step_s3 as plugin
import pytest
from botocore.config import Config
from moto.server import ThreadedMotoServer

from server_core.security import certs

PROGRAM = Path(__file__).parents[1] / "program"
SMALL_PARTS = Path(__file__).with_name("small_parts.py")
MIB = 1024**2
KEY_ID, SECRET = "AKIDOUTRIDERTEST", "s3cr3t/Outrider+Test0123456789"


@dataclass
class Store:
    """A store with a bucket that this test has to itself."""

    endpoint: str
    key_id: str
    secret: str
    client: Any
    bucket: str

    @property
    def env(self) -> dict[str, str]:
        return {
            "S3_ENDPOINT": self.endpoint,
            "S3_ACCESS_KEY_ID": self.key_id,
            "S3_SECRET_ACCESS_KEY": self.secret,
        }

    def put(self, key: str, body: bytes) -> str:
        """Put an object; its SHA-256."""
        self.client.put_object(Bucket=self.bucket, Key=key, Body=body)
        return hashlib.sha256(body).hexdigest()

    def get(self, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read())

    def listed(self) -> list[str]:
        answer = self.client.list_objects_v2(Bucket=self.bucket)
        return sorted(item["Key"] for item in answer.get("Contents", ()))

    def unfinished(self) -> list[str]:
        return [item["Key"] for item in self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", ())]


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        # By default it writes every object and every part of 5 MiB to a file; here, only those of the largest tests.
        patch.setenv("MOTO_S3_DEFAULT_KEY_BUFFER_SIZE", str(16 * MIB))
        server = ThreadedMotoServer(ip_address="0.0.0.0", port=0, verbose=False)
        server.start()
        _, port = server.get_host_and_port()
        yield f"http://127.0.0.1:{port}"
        server.stop()


@pytest.fixture(params=["moto", *(["given"] if os.environ.get("OUTRIDER_TEST_S3_ENDPOINT") else [])])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    if request.param == "moto":
        endpoint, key_id, secret = request.getfixturevalue("moto_endpoint"), KEY_ID, SECRET
    else:
        endpoint = os.environ["OUTRIDER_TEST_S3_ENDPOINT"]
        key_id = os.environ["OUTRIDER_TEST_S3_ACCESS_KEY_ID"]
        secret = os.environ["OUTRIDER_TEST_S3_SECRET_ACCESS_KEY"]
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=key_id,
        aws_secret_access_key=secret,
        config=Config(
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )
    bucket = f"outrider-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=bucket)
    made = Store(endpoint, key_id, secret, client, bucket)
    yield made
    for upload in client.list_multipart_uploads(Bucket=bucket).get("Uploads", ()):
        client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for item in page.get("Contents", ()):
            client.delete_object(Bucket=bucket, Key=item["Key"])
    client.delete_bucket(Bucket=bucket)
    client.close()


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
    """The program of the step, started as the agent would start it but outside of a container, and with small parts."""

    directory: Path
    runs: int = 0
    run_id: str = "rtest"

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
            "OUTRIDER_RUN_ID": self.run_id,
            "OUTRIDER_STEP": "transfer",
            "OUTRIDER_ATTEMPT": "1",
        }
        return subprocess.Popen(
            [sys.executable, "-W", "error", str(SMALL_PARTS), str(PROGRAM), action],
            env=environment | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self, process: subprocess.Popen[str]) -> Ended:
        text, _ = process.communicate(timeout=60)
        return read_contract(self.directory / f"outrider-{self.runs}", process.returncode, text)

    def run(self, action: str, params: dict[str, Any], env: dict[str, str]) -> Ended:
        return self.end(self.start(action, params, env))


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
        command += ["--user=23456:23456", "--tmpfs=/tmp:size=64m", "--memory=80m", "--memory-swap=80m"]
        command += [f"--network={self.network}"]
        command += ["--pids-limit=64", "--label=outrider.test=transfer", f"--volume={self.contract}:/outrider"]
        build = "--tmpfs=/build:size=2m,mode=777" if mount == "tiny" else f"--volume={self.volume}:/build:{mount}"
        command += [build]
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


@dataclass
class Proxy:
    """A proxy in front of the store. ``fault`` is asked about every request and says what to do with it."""

    endpoint: str
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range
    headers: list[dict[str, str]] = field(default_factory=list)  # of each request, names in lower case
    domain: str = ""  # buckets stand before it in the name of the host, and not in the path
    dropped: str = ""  # headers of requests that begin with this do not reach the store
    echoed: str = ""  # headers of PUT that begin with this are said back, as by a store that knows them
    said: dict[str, str] = field(default_factory=dict)  # what is said instead
    ca: str = ""  # the authority behind its certificate, where it speaks TLS
    fault: Callable[[str, str, int], str | None] = lambda method, path, number: None

    def count(self, method: str) -> int:
        return sum(1 for request in self.requests if request[0] == method)


@pytest.fixture
def proxy(store: Store) -> Iterator[Proxy]:
    with a_proxy(store) as made:
        yield made


@pytest.fixture
def tls_proxy(store: Store, tmp_path: Path) -> Iterator[Proxy]:
    """With a certificate that only its own authority vouches for."""
    certificate = certs.ensure(tmp_path / "tls", ["127.0.0.1"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls" / "server.pem", tmp_path / "tls" / "server.key")
    del certificate
    with a_proxy(store, context) as made:
        made.ca = (tmp_path / "tls" / "ca.pem").read_text()
        yield made


@contextmanager
def a_proxy(store: Store, tls: ssl.SSLContext | None = None) -> Iterator[Proxy]:
    """Faults: a status and a code ("503 SlowDown"), "cut" (after half of the body), "stall" (half of the body, then
    silence), "hang" (no answer), "flip" (one bit of the body is another), "flip-sent" (the same of what is sent)."""
    upstream = urlsplit(store.endpoint)
    connect = http.client.HTTPSConnection if upstream.scheme == "https" else http.client.HTTPConnection
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do(self) -> None:
            announced = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(announced)
            if len(body) < announced:
                # The program was killed meanwhile. The store would wait for the rest, and the proxy for the store.
                self.close_connection = True
                return
            made.headers.append({name.lower(): value for name, value in self.headers.items()})
            made.requests.append((self.command, self.path, self.headers.get("Range", "")))
            number = sum(1 for request in made.requests if request[:2] == (self.command, self.path))
            fault = made.fault(self.command, self.path, number)
            if fault and fault[0].isdigit():
                status, code = fault.split()
                answer = f"<Error><Code>{code}</Code><Message>It was ordered.</Message></Error>".encode()
                self.send_response(int(status))
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)
                return
            if fault == "hang":
                over.wait(30)
                self.close_connection = True
                return
            connection = connect(upstream.hostname or "", upstream.port, timeout=30)
            bucket, _, domain = self.headers["Host"].partition(".")
            path = f"/{bucket}{self.path}" if made.domain and domain.split(":")[0] == made.domain else self.path
            connection.putrequest(self.command, path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() != "expect" and not (made.dropped and name.lower().startswith(made.dropped)):
                    itself = name.lower() == "host" and made.domain  # it need not know what it is called here
                    connection.putheader(name, upstream.netloc if itself else value)
            if fault == "flip-sent" and body:
                body = body[:-1] + bytes([body[-1] ^ 1])
            connection.endheaders(body)
            response = connection.getresponse()
            content = response.read()
            connection.close()
            self.send_response(response.status)
            for name, value in response.getheaders():
                if name.lower() not in {"connection", "transfer-encoding", "content-length", "server", "date"}:
                    self.send_header(name, value)
            length = response.getheader("Content-Length") or "0"
            if self.command == "PUT" and made.echoed:
                for name, value in self.headers.items():
                    if name.lower().startswith(made.echoed):
                        self.send_header(name, made.said.get(name.lower(), value))
            if customer := self.headers.get("x-amz-server-side-encryption-customer-algorithm"):
                # The store that stands here takes no notice of it; others confirm it.
                self.send_header("x-amz-server-side-encryption-customer-algorithm", customer)
            self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault == "flip":
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.wfile.write(content[: len(content) // 2] if fault in {"cut", "stall"} else content)
            if fault == "stall":
                over.wait(30)
            if fault in {"cut", "stall"}:
                self.close_connection = True

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that goes away is what these tests are about."""

    server = Server(("127.0.0.1", 0), Handler)
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    made = Proxy(f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield made
    over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def wait_for() -> Callable[[Callable[[], object]], None]:
    def wait(condition: Callable[[], object]) -> None:
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end, "what was waited for did not happen within 20 s"
            time.sleep(0.02)

    return wait
