"""http.upload, as a process against a server with faults."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Page, Program, Site

MIB = 1024**2
BIG = os.urandom(MIB) * 9


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "report"


@pytest.mark.parametrize("method", ["PUT", "POST"])
@pytest.mark.parametrize("body", [b"", b"x", BIG], ids=["empty", "small", "large"])
def test_file_is_sent_with_outputs_and_progress(
    site: Site, program: Program, source: Path, method: str, body: bytes
) -> None:
    site.pages["/r"] = Page(status=201, headers={"ETag": '"tag"'})
    source.write_bytes(body)
    digest = hashlib.sha256(body).hexdigest()
    params = {"url": f"{site.url}/r", "from": str(source), "method": method, "sha256": digest}
    ended = program.run("upload", params, {"HTTP_TOKEN": "t0ken-0123456789"})
    assert ended.code == 0, ended.text
    assert site.uploads["/r"] == body
    outputs = {"path": str(source), "bytes": len(body), "sha256": digest, "status": 201, "etag": '"tag"'}
    assert ended.outputs == outputs
    assert (ended.progress[-1]["done"], ended.progress[-1]["total"]) == (len(body), len(body))
    (request,) = site.requests
    assert request.method == method
    assert request.headers["authorization"] == "Bearer t0ken-0123456789"
    assert request.headers["content-type"] == "application/octet-stream"
    assert request.headers["content-length"] == str(len(body))


def test_given_content_type_is_used(site: Site, program: Program, source: Path) -> None:
    site.pages["/r"] = Page()
    source.write_bytes(b"{}")
    headers = {"content-type": "application/json"}
    assert program.run("upload", {"url": f"{site.url}/r", "from": str(source), "headers": headers}).code == 0
    assert site.requests[0].headers["content-type"] == "application/json"


def test_form_has_the_file_and_the_fields(site: Site, program: Program, source: Path) -> None:
    site.pages["/r"] = Page(status=200)
    source.write_bytes(BIG)
    form = {
        "file": "upload",
        "filename": 'my "map".bsp',
        "content_type": "text/map",
        "fields": {"kind": "größe"},
    }
    ended = program.run("upload", {"url": f"{site.url}/r", "from": str(source), "form": form})
    assert ended.code == 0, ended.text
    assert ended.outputs == {
        "path": str(source), "bytes": len(BIG), "sha256": hashlib.sha256(BIG).hexdigest(), "status": 200,
    }  # fmt: skip
    (request,) = site.requests
    assert request.method == "POST"
    assert request.headers["content-length"] == str(len(request.body))
    boundary = request.headers["content-type"].removeprefix("multipart/form-data; boundary=").encode()
    _, kind, file, end = (b"\r\n" + request.body).split(b"\r\n--" + boundary)
    assert kind.decode() == '\r\nContent-Disposition: form-data; name="kind"\r\n\r\ngröße'
    head = 'Content-Disposition: form-data; name="upload"; filename="my %22map%22.bsp"\r\nContent-Type: text/map'
    assert file == f"\r\n{head}\r\n\r\n".encode() + BIG
    assert end == b"--\r\n"
    assert (ended.progress[-1]["done"], ended.progress[-1]["total"]) == (len(BIG), len(BIG))


def test_both_checksums_are_compared(site: Site, program: Program, source: Path) -> None:
    site.pages["/r"] = Page()
    source.write_bytes(BIG)
    digests = {name: hashlib.new(name, BIG).hexdigest() for name in ("sha256", "sha512")}
    ended = program.run("upload", {"url": f"{site.url}/r", "from": str(source), **digests})
    assert {name: ended.outputs[name] for name in digests} == digests
    ended = program.run("upload", {"url": f"{site.url}/r", "from": str(source), "sha512": "0" * 128})
    assert (ended.code, ended.cause) == (1, "checksum_mismatch")
    assert "SHA-512" in ended.error
    assert len(site.requests) == 1


def test_file_that_changes_on_its_way_is_noticed(
    site: Site, program: Program, source: Path, wait_for: Callable[[Callable[[], object]], None]
) -> None:
    source.write_bytes(BIG)
    site.pages["/r"] = Page()
    params = {"url": f"{site.url}/r", "from": str(source), "limit_bytes_per_s": 3 * MIB}
    process = program.start("upload", params | {"sha256": hashlib.sha256(BIG).hexdigest()}, {})
    wait_for((program.directory / "outrider-1" / "progress").exists)
    with source.open("r+b") as file:
        file.seek(-10, 2)
        file.write(b"something.")
    ended = program.end(process)
    assert (ended.code, ended.cause) == (1, "changed")
    process = program.start("upload", params, {})
    wait_for((program.directory / "outrider-2" / "progress").exists)
    os.truncate(source, MIB)
    ended = program.end(process)
    assert (ended.code, ended.cause) == (1, "changed")


def test_wrong_checksum_sends_nothing(site: Site, program: Program, source: Path) -> None:
    source.write_bytes(BIG)
    ended = program.run("upload", {"url": f"{site.url}/r", "from": str(source), "sha256": "0" * 64})
    assert (ended.code, ended.cause) == (1, "checksum_mismatch")
    assert site.requests == []


def test_what_can_not_be_sent_is_said(site: Site, program: Program, source: Path) -> None:
    params = {"url": f"{site.url}/r", "from": str(source)}
    ended = program.run("upload", params)
    assert (ended.code, ended.cause) == (1, "not_found")
    assert str(source) in ended.error
    os.mkfifo(source)
    ended = program.run("upload", params)
    assert (ended.code, ended.cause) == (1, "not_a_file")
    ended = program.run("upload", params | {"from": str(source.parent)})
    assert (ended.code, ended.cause) == (1, "not_a_file")
    assert site.requests == []


def test_put_is_sent_again_whole(site: Site, program: Program, source: Path) -> None:
    site.pages["/r"] = Page(faults=["503", "drop", "429"])
    source.write_bytes(BIG)
    ended = program.run("upload", {"url": f"{site.url}/r", "from": str(source)})
    assert ended.code == 0, ended.text
    assert [len(request.body) for request in site.requests] == [len(BIG)] * 4
    assert site.uploads["/r"] == BIG


def test_post_whose_answer_was_lost_is_not_sent_again(site: Site, program: Program, source: Path) -> None:
    source.write_bytes(b"x")
    params = {"url": f"{site.url}/r", "from": str(source), "method": "POST"}
    site.pages["/r"] = Page(faults=["drop"])
    ended = program.run("upload", params)
    assert (ended.code, ended.cause) == (1, "outcome_unknown")
    assert len(site.requests) == 1
    site.requests.clear()
    site.pages["/r"] = Page(faults=["500"])
    ended = program.run("upload", params)
    assert (ended.code, ended.cause) == (75, "server_unavailable")
    assert len(site.requests) == 1
    site.requests.clear()
    site.pages["/r"] = Page(faults=["503"])
    assert program.run("upload", params).code == 0, "a 503 was refused before it was carried out"


def test_redirects_keep_the_body_or_are_refused(site: Site, other_site: Site, program: Program, source: Path) -> None:
    source.write_bytes(BIG)
    params = {"url": f"{site.url}/r", "from": str(source), "headers": {"X-Api-Key": "k"}}
    site.pages["/r"] = Page(status=307, headers={"Location": f"{other_site.url}/there"})
    other_site.pages["/there"] = Page(status=204)
    ended = program.run("upload", params, {"HTTP_TOKEN": "t0ken-0123456789"})
    assert ended.code == 0, ended.text
    assert other_site.uploads["/there"] == BIG
    assert "authorization" not in other_site.requests[0].headers
    assert "x-api-key" not in other_site.requests[0].headers
    site.pages["/r"] = Page(status=302, headers={"Location": "/there"})
    ended = program.run("upload", params)
    assert (ended.code, ended.cause) == (1, "redirect")
    site.pages["/r"] = Page(status=303, headers={"Location": "/result"})
    ended = program.run("upload", params | {"method": "POST"})
    assert (ended.code, ended.outputs.get("status")) == (0, 303)


@pytest.mark.parametrize(("status", "cause"), [(401, "unauthenticated"), (403, "denied"), (413, "refused")])
def test_refusals_are_permanent(site: Site, program: Program, source: Path, status: int, cause: str) -> None:
    site.pages["/r"] = Page(status=status)
    source.write_bytes(b"x")
    ended = program.run("upload", {"url": f"{site.url}/r", "from": str(source)})
    assert (ended.code, ended.cause) == (1, cause)
    assert len(site.requests) == 1
