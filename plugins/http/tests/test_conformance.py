"""Both step types against the kit that every step plugin is tested with."""

from __future__ import annotations

import hashlib
import random
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from outrider.testing import Attempted, Example, Failing, StepConformance, Wrong

from .conftest import Page, Site

BODY = random.Random(5).randbytes(100_000)
LARGE = random.Random(6).randbytes(4 * 1024**2)
OUT = {"out": "/out:rw"}
TOKEN = "tK9-f3qd-77x1-conformance"
# The server of these tests is on this machine, which a network class refuses unless it says otherwise.
POLICY = {"networks": {"egress": {"network": "tests", "allow": ["private"]}}}


@pytest.fixture(scope="module")
def step_environment() -> Iterator[str]:
    """The address of a server that containers reach."""
    show = ["docker", "network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Gateway}}"]
    host = subprocess.run(show, capture_output=True, text=True, check=True).stdout.strip()
    site = Site(host)
    site.put("/maps.zip", BODY)
    site.put("/slow.zip", LARGE, bytes_per_s=256 * 1024)
    site.pages["/in"] = Page(status=201)
    yield f"http://{host}:{site.port}"
    site.close()


def has_the_body(done: Attempted) -> None:
    assert (done.volumes["out"] / "maps.zip").read_bytes() == BODY


def download(path: str, **more: Any) -> Any:
    return lambda url: {"url": f"{url}{path}", "to": "/out/maps.zip", **more}


class TestDownload(StepConformance):
    step_type = "http.download"
    plugin = "outrider_step_http"
    policy = POLICY
    examples = (
        Example(
            "checked",
            download("/maps.zip", sha256=hashlib.sha256(BODY).hexdigest()),
            volumes=OUT,
            secrets={"HTTP_TOKEN": TOKEN},
            outputs={"bytes": len(BODY), "path": "/out/maps.zip", "sha256": hashlib.sha256(BODY).hexdigest()},
            check=has_the_body,
        ),
    )
    failing = (
        Failing("no such page", download("/none"), volumes=OUT, says="404"),
        Failing("another content", download("/maps.zip", sha256="ab" * 32), volumes=OUT, says="SHA-256"),
    )
    wrong = (
        Wrong("another scheme", {"url": "file:///etc/passwd", "to": "/out/x"}, volumes=OUT, says="with.url"),
        Wrong("relative target", {"url": "https://h/x", "to": "x"}, volumes=OUT, says="with.to"),
    )
    long = Example("slow server", download("/slow.zip", connections=1), volumes=OUT)
    grace_s = 5.0


class TestUpload(StepConformance):
    step_type = "http.upload"
    plugin = "outrider_step_http"
    policy = POLICY
    examples = (
        Example(
            "put",
            lambda url: {"url": f"{url}/in", "from": "/in/report"},
            volumes={"in": "/in"},
            files={"in/report": BODY},
            secrets={"HTTP_TOKEN": TOKEN},
            outputs={"bytes": len(BODY), "status": 201},
        ),
    )
    failing = (
        Failing(
            "no such file", lambda url: {"url": f"{url}/in", "from": "/in/none"}, volumes={"in": "/in"}, says="/in/none"
        ),
    )
    wrong = (
        Wrong("unknown method", {"url": "https://h/x", "from": "/in/x", "method": "DELETE"}, volumes={"in": "/in"}),
    )
    quick = "what is sent here is sent in an instant"
