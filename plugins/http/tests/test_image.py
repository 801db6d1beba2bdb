"""The plugin's image, inside the sandbox of a step. Needs the container engine and the built image."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from .conftest import Container, Page, Site

MIB = 1024**2


@pytest.fixture
def open_site() -> Iterator[Site]:
    """A server that containers reach."""
    made = Site("0.0.0.0")
    yield made
    made.close()


def test_download_and_upload_in_the_sandbox(open_site: Site, container: Container) -> None:
    # Larger than the memory that the container has, and cut on the way.
    body = os.urandom(MIB) * 170
    digest = open_site.put("/k", body, faults=["cut"])
    url = f"http://{container.host}:{open_site.port}"
    ended = container.run("download", {"url": f"{url}/k", "to": "/build/deep/k", "sha256": digest}, {})
    assert ended.code == 0, ended.text
    assert (container.volume / "deep/k").read_bytes() == body
    assert ended.outputs["bytes"] == len(body)
    assert len(open_site.requests) == 2
    open_site.pages["/r"] = Page(status=201)
    params = {"url": f"{url}/r", "from": "/build/deep/k", "sha256": digest}
    ended = container.run("upload", params, {"HTTP_TOKEN": "t0ken-0123456789"}, mount="ro")
    assert ended.code == 0, ended.text
    assert open_site.uploads["/r"] == body
    assert open_site.requests[-1].headers["authorization"] == "Bearer t0ken-0123456789"


def test_read_only_volume_is_said(open_site: Site, container: Container) -> None:
    open_site.put("/k", b"x")
    params = {"url": f"http://{container.host}:{open_site.port}/k", "to": "/build/k"}
    ended = container.run("download", params, {}, mount="ro")
    assert (ended.code, ended.cause) == (1, "read_only")
    assert "/build" in ended.error


def test_full_volume_is_said(open_site: Site, container: Container) -> None:
    for chunked in (False, True):  # foreseen, and found out
        open_site.put("/k", bytes(5 * MIB), chunked=chunked)
        params = {"url": f"http://{container.host}:{open_site.port}/k", "to": "/build/k"}
        ended = container.run("download", params, {}, mount="tiny")
        assert (ended.code, ended.cause) == (1, "volume_full")
