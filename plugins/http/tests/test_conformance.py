"""The kit that every step plugin can use, on http.download and http.upload, in the sandbox of a node."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from outrider.testing import Attempted, Example, Failing, StepConformance, Wrong

from .conftest import Page, Site, docker

HERE = Path(__file__).resolve()
CONTENT = os.urandom(1024**2)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NETWORK = "outrider-test-http"  # a network of its own: this class may reach the server on this machine
POLICY = {"networks": {"egress": {"network": NETWORK, "warm": 0, "allow": ["private"]}}, "warm_none": 0}
BUILD, READ = {"build": "/build:rw"}, {"build": "/build"}
SENT = {"url": "https://h/", "from": "/build/k"}
TOKEN = {"HTTP_TOKEN": "tok-7f3a9c51d2e8"}


@dataclass(frozen=True)
class Server:
    """A server on this machine, as containers reach it."""

    site: Site
    url: str
    nobody: str
    """Where nobody listens."""


@pytest.fixture(scope="module")
def step_environment() -> Iterator[Server]:
    site = Site("0.0.0.0")
    site.put("/k", CONTENT)
    site.put("/slow", CONTENT * 16, bytes_per_s=4 * 1024**2)
    site.pages["/there"] = Page(status=201, headers={"ETag": '"new"'})
    site.pages["/form"] = Page(status=303, headers={"Location": "/result"})
    site.pages["/near"] = Page(status=302, headers={"Location": "http://169.254.169.254/latest/meta-data"})
    # Some engines don't say it of a bridge that they made themselves.
    host = docker("network", "inspect", "bridge", "--format={{(index .IPAM.Config 0).Gateway}}")
    host = host or socket.gethostbyname(socket.gethostname())
    yield Server(site, f"http://{host}:{site.port}", f"http://{host}:9")
    site.close()
    subprocess.run(["docker", "network", "rm", NETWORK], capture_output=True, check=False)


def fetched(done: Attempted) -> None:
    assert (done.volumes["build"] / "deep/k").read_bytes() == CONTENT
    assert [path.name for path in done.volumes["build"].iterdir()] == ["deep"]


def get(path: str, **more: Any) -> Any:
    return lambda server: {"url": f"{server.url}{path}", "to": "/build/deep/k", **more}


def put(path: str, **more: Any) -> Any:
    return lambda server: {"url": f"{server.url}{path}", "from": "/build/k", **more}


class TestHttpDownload(StepConformance):
    step_type = "http.download"
    folder = HERE.parents[1]
    policy = POLICY
    examples = (
        Example(
            "checked",
            get("/k", sha256=SHA256),
            volumes=BUILD,
            secrets=TOKEN,
            outputs={"path": "/build/deep/k", "bytes": len(CONTENT), "sha256": SHA256},
            check=fetched,
        ),
    )
    failing = (
        Failing("nothing there", get("/none"), volumes=BUILD, code="no_such_address", says="404"),
        Failing("another checksum", get("/k", sha256="0" * 64), volumes=BUILD, code="checksum_mismatch", says=SHA256),
        Failing("led to the metadata", get("/near"), volumes=BUILD, code="address_refused", says="169.254.169.254"),
        Failing(
            "nobody listens",
            lambda server: {"url": f"{server.nobody}/k", "to": "/build/k"},
            volumes=BUILD,
            code="unreachable",
            temporary=True,
        ),
    )
    wrong = (
        Wrong("password in the address", {"url": "https://u:p@h/x", "to": "/build/k"}, "with.url", volumes=BUILD),
        Wrong("target in no volume", {"url": "https://h/x", "to": "/else/k"}, "/else/k", volumes=BUILD),
        Wrong("target that is read-only", {"url": "https://h/x", "to": "/build/k"}, "/build", volumes=READ),
    )
    long = Example("slow", get("/slow"), volumes=BUILD)


class TestHttpUpload(StepConformance):
    step_type = "http.upload"
    folder = HERE.parents[1]
    policy = POLICY
    examples = (
        Example(
            "put",
            put("/there", sha256=SHA256),
            volumes=READ,
            files={"build/k": CONTENT},
            secrets=TOKEN,
            outputs={"bytes": len(CONTENT), "sha256": SHA256, "status": 201, "etag": '"new"'},
        ),
        Example(
            "form",
            put("/form", form={"file": "upload", "fields": {"kind": "map"}}),
            volumes=READ,
            files={"build/k": CONTENT},
            outputs={"status": 303},
        ),
    )
    failing = (
        Failing("no file", put("/there"), volumes=READ, code="not_found", says="/build/k"),
        Failing("nobody there", put("/none"), volumes=READ, files={"build/k": "x"}, code="no_such_address"),
    )
    wrong = (
        Wrong(
            "form by PUT",
            {"url": "https://h/", "from": "/build/k", "method": "PUT", "form": {"file": "f"}},
            "POST",
            READ,
        ),
        Wrong("no method", {"url": "https://h/", "from": "/build/k", "method": "DELETE"}, "with.method", READ),
    )
    long = Example("slow", put("/there", limit_bytes_per_s=1024**2), volumes=READ, files={"build/k": 64 * 1024**2})
