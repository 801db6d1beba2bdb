"""http.download, as a process against a server with faults."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Page, Program, Site

MIB = 1024**2
BIG = os.urandom(MIB) * 9
DATED = {"ETag": "", "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    directory = tmp_path / "build"
    directory.mkdir()
    return directory


@pytest.mark.parametrize("body", [b"", b"x", BIG], ids=["empty", "small", "large"])
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_content_arrives_with_outputs_and_progress(
    site: Site, program: Program, target: Path, body: bytes, chunked: bool
) -> None:
    digest = site.put("/maps.zst", body, chunked=chunked)
    to = target / "deep" / "maps.zst"
    params = {"url": f"{site.url}/maps.zst", "to": str(to), "sha256": digest.upper(), "headers": {"X-Ask": "me"}}
    ended = program.run("download", params)
    assert ended.code == 0, ended.text
    assert to.read_bytes() == body
    assert ended.outputs == {"path": str(to), "bytes": len(body), "sha256": digest, "etag": f'"{digest[:16]}"'}
    assert (ended.progress[-1]["done"], ended.progress[-1]["total"]) == (len(body), len(body))
    assert site.requests[0].headers["x-ask"] == "me"
    assert site.requests[0].headers["accept-encoding"] == "identity"


def test_trailing_slash_keeps_the_name_of_the_address(site: Site, program: Program, target: Path) -> None:
    site.put("/a/my%20map.zst", b"x")
    ended = program.run("download", {"url": f"{site.url}/a/my%20map.zst?x=/y", "to": f"{target}/"})
    assert ended.outputs["path"] == str(target / "my map.zst")
    for path in ("/", "/..", "/%2e%2e", "/a%2fb", "/%00"):
        ended = program.run("download", {"url": f"{site.url}{path}", "to": f"{target}/"})
        assert (ended.code, ended.cause) == (1, "no_file_name"), path
    assert len(site.requests) == 1


def test_checksums_are_those_that_are_wanted(site: Site, program: Program, target: Path) -> None:
    site.put("/k", BIG)
    digests = {name: hashlib.new(name, BIG).hexdigest() for name in ("sha256", "sha512")}
    params = {"url": f"{site.url}/k", "to": f"{target}/k"}
    for more, wanted in (
        ({"digests": []}, set()),
        ({"digests": ["sha512"]}, {"sha512"}),
        ({"digests": [], "sha512": digests["sha512"]}, {"sha512"}),
        ({"sha512": digests["sha512"]}, {"sha256", "sha512"}),
    ):
        ended = program.run("download", params | more)
        assert {name: ended.outputs.get(name) for name in digests if name in ended.outputs} == {
            name: digests[name] for name in wanted
        }
    ended = program.run("download", params | {"sha512": "0" * 128})
    assert (ended.code, ended.cause) == (1, "checksum_mismatch")
    assert "SHA-512" in ended.error


def test_wrong_checksum_publishes_nothing_and_keeps_what_was_there(site: Site, program: Program, target: Path) -> None:
    digest = site.put("/k", BIG)
    (target / "k").write_bytes(b"before")
    ended = program.run("download", {"url": f"{site.url}/k", "to": f"{target}/k", "sha256": "0" * 64})
    assert (ended.code, ended.cause) == (1, "checksum_mismatch")
    assert digest in ended.error
    assert [path.name for path in target.iterdir()] == ["k"]
    assert (target / "k").read_bytes() == b"before"
    assert ended.outputs == {}


@pytest.mark.parametrize("headers", [{}, DATED], ids=["etag", "date"])
def test_cut_download_goes_on_where_it_stopped(
    site: Site, program: Program, target: Path, headers: dict[str, str]
) -> None:
    # Cut more often than a request is tried again without progress.
    digest = site.put("/k", BIG, headers=headers, faults=["cut"] * 8)
    ended = program.run("download", {"url": f"{site.url}/k", "to": f"{target}/k", "sha256": digest})
    assert ended.code == 0, ended.text
    assert (target / "k").read_bytes() == BIG
    starts = [int(request.headers.get("range", "bytes=0-")[6:-1]) for request in site.requests]
    assert len(starts) == 9
    assert starts == sorted(set(starts)), "something was fetched twice"
    assert len(BIG) - starts[-1] <= len(BIG) // 2**8 + 1


def test_cut_download_without_a_validator_starts_over(site: Site, program: Program, target: Path) -> None:
    for headers in ({"ETag": ""}, {"ETag": 'W/"weak"'}):
        site.requests.clear()
        digest = site.put("/k", BIG, headers=headers, faults=["cut", "cut"])
        ended = program.run("download", {"url": f"{site.url}/k", "to": f"{target}/k", "sha256": digest})
        assert ended.code == 0, ended.text
        assert ["range" in request.headers for request in site.requests] == [False, False, False]
    site.put("/k", BIG, headers={"ETag": ""}, faults=["cut"] * 99)
    ended = program.run("download", {"url": f"{site.url}/k", "to": f"{target}/k"})
    assert (ended.code, ended.cause) == (75, "cut"), "starting over is no progress: it must end"


def test_cut_chunked_download_is_noticed(site: Site, program: Program, target: Path) -> None:
    digest = site.put("/k", BIG, chunked=True, faults=["cut"])
    ended = program.run("download", {"url": f"{site.url}/k", "to": f"{target}/k", "sha256": digest})
    assert ended.code == 0, ended.text
    assert (target / "k").read_bytes() == BIG


@pytest.mark.parametrize("fault", ["shifted", "416"])
def test_wrong_range_makes_it_start_over(site: Site, program: Program, target: Path, fault: str) -> None:
    digest = site.put("/k", BIG, faults=["cut", fault])
    ended = program.run("download", {"url": f"{site.url}/k", "to": f"{target}/k", "sha256": digest})
    assert ended.code == 0, ended.text


def test_content_that_changes_meanwhile_is_never_mixed(
    site: Site, program: Program, target: Path, wait_for: Callable[[Callable[[], object]], None]
) -> None:
    site.put("/k", BIG, faults=["stall"])
    params = {"url": f"{site.url}/k", "to": f"{target}/k", "idle_timeout_s": 1}
    process = program.start("download", params, {})
    wait_for(lambda: site.requests)
    digest = site.put("/k", BIG[::-1])
    ended = program.end(process)
    assert ended.code == 0, ended.text
    assert "range" in site.requests[1].headers
    assert (ended.outputs["sha256"], ended.outputs["etag"]) == (digest, f'"{digest[:16]}"')
    assert (target / "k").read_bytes() == BIG[::-1]


def test_overloaded_server_is_asked_again_when_it_wishes(site: Site, program: Program, target: Path) -> None:
    site.put("/k", b"x", faults=["503", "429", "drop"])
    params = {"url": f"{site.url}/k", "to": f"{target}/k"}
    assert program.run("download", params).code == 0
    assert len(site.requests) == 4
    site.put("/k", b"x", faults=["503"] * 99)
    ended = program.run("download", params)
    assert (ended.code, ended.cause) == (75, "server_unavailable")
    assert "503" in ended.error


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 501])
def test_refusals_are_permanent_and_asked_once(site: Site, program: Program, target: Path, status: int) -> None:
    site.put("/k", b"x", faults=[str(status)] * 2)
    ended = program.run("download", {"url": f"{site.url}/k?signature=s1gnature", "to": f"{target}/k"})
    assert ended.code == 1
    assert f"{site.url}/k answered with status {status}" in ended.error
    assert "s1gnature" not in ended.text + ended.error
    assert len(site.requests) == 1
    assert list(target.iterdir()) == []


def test_unreachable_server_is_temporary(program: Program, target: Path) -> None:
    ended = program.run("download", {"url": "http://127.0.0.1:9/k", "to": f"{target}/k"})
    assert (ended.code, ended.cause) == (75, "unreachable")
    assert "http://127.0.0.1:9/k" in ended.error


def test_speaking_tls_to_a_plain_server_is_permanent(site: Site, program: Program, target: Path) -> None:
    url = site.url.replace("http:", "https:")
    ended = program.run("download", {"url": f"{url}/k", "to": f"{target}/k"})
    assert (ended.code, ended.cause) == (1, "tls")


def test_credentials_and_headers_stay_with_their_origin(
    site: Site, other_site: Site, program: Program, target: Path
) -> None:
    site.pages["/k"] = Page(status=302, headers={"Location": "/here"})
    site.pages["/here"] = Page(status=307, headers={"Location": f"{other_site.url}/there"})
    other_site.pages["/there"] = Page(status=301, headers={"Location": f"{site.url}/back"})
    digest = site.put("/back", b"x")
    params = {"url": f"{site.url}/k", "to": f"{target}/k", "sha256": digest, "headers": {"X-Api-Key": "k"}}
    ended = program.run("download", params, {"HTTP_TOKEN": "t0ken-0123456789"})
    assert ended.code == 0, ended.text
    assert [request.path for request in site.requests] == ["/k", "/here", "/back"]
    for request in site.requests[:2]:
        assert request.headers["authorization"] == "Bearer t0ken-0123456789"
        assert request.headers["x-api-key"] == "k"
    for request in (*other_site.requests, site.requests[2]):
        assert "authorization" not in request.headers
        assert "x-api-key" not in request.headers
    assert "t0ken" not in ended.text


def test_redirects_end(site: Site, program: Program, target: Path) -> None:
    site.pages["/loop"] = Page(status=302, headers={"Location": "/loop"})
    ended = program.run("download", {"url": f"{site.url}/loop", "to": f"{target}/k"})
    assert (ended.code, ended.cause) == (1, "redirect")
    assert len(site.requests) == 11
    for location in ("ftp://host/x", "http://user:pass@host/x", "http://host:0/", "//"):
        site.pages["/odd"] = Page(status=302, headers={"Location": location})
        ended = program.run("download", {"url": f"{site.url}/odd", "to": f"{target}/k"})
        assert (ended.code, ended.cause) == (1, "redirect"), location


def test_user_and_password_are_basic_and_must_come_together(site: Site, program: Program, target: Path) -> None:
    site.put("/k", b"x")
    params = {"url": f"{site.url}/k", "to": f"{target}/k"}
    assert program.run("download", params, {"HTTP_USER": "me", "HTTP_PASSWORD": "pässword"}).code == 0
    assert site.requests[0].headers["authorization"] == "Basic bWU6cMOkc3N3b3Jk"
    for env in ({"HTTP_USER": "me"}, {"HTTP_PASSWORD": "p"}, {"HTTP_TOKEN": "t", "HTTP_USER": "me"}):
        ended = program.run("download", params, env)
        assert (ended.code, ended.cause) == (1, "bad_credentials")
    assert len(site.requests) == 1


def test_silent_server_is_given_up(site: Site, program: Program, target: Path) -> None:
    digest = site.put("/k", BIG, faults=["hang", "stall"])
    params = {"url": f"{site.url}/k", "to": f"{target}/k", "sha256": digest, "idle_timeout_s": 0.5}
    ended = program.run("download", params)
    assert ended.code == 0, ended.text
    site.put("/k", BIG, faults=["hang"] * 9)
    ended = program.run("download", params)
    assert (ended.code, ended.cause) == (75, "idle")


def test_cancelled_download_ends_at_once_and_leaves_nothing(
    site: Site, program: Program, target: Path, wait_for: Callable[[Callable[[], object]], None]
) -> None:
    site.put("/k", BIG, faults=["stall"])
    process = program.start("download", {"url": f"{site.url}/k", "to": f"{target}/k"}, {})
    wait_for(lambda: site.requests)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 128 + signal.SIGTERM
    program.end(process)
    assert list(target.iterdir()) == []
