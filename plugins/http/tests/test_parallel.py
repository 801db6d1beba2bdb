"""Ranges side by side, and going on after a kill: as a process against a server that takes its time."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from .conftest import Ended, Program, Site

MIB = 1024**2
BIG = os.urandom(MIB) * 24
Wait = Callable[[Callable[[], object]], None]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    directory = tmp_path / "build"
    directory.mkdir()
    return directory


def left_in(target: Path) -> list[str]:
    return sorted(path.name for path in target.iterdir())


@pytest.mark.parametrize("headers", [{}, {"ETag": "", "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}])
def test_slow_server_is_asked_for_ranges_side_by_side(
    site: Site, program: Program, target: Path, headers: dict[str, str]
) -> None:
    digest = site.put("/k", BIG, bytes_per_s=4 * MIB, headers=headers)
    ended = program.run("download", {"url": f"{site.url}/k", "to": f"{target}/k", "sha256": digest})
    assert ended.code == 0, ended.text
    assert (target / "k").read_bytes() == BIG
    ranges = [request.headers["range"] for request in site.requests[1:]]
    assert len(ranges) >= 2, "one connection did it all"
    assert all(request.headers["if-range"] for request in site.requests[1:])
    assert len(ranges) == len(set(ranges)), "something was fetched twice"
    assert left_in(target) == ["k"]
    assert any("MiB/s" in line["message"] for line in ended.progress)


def test_one_connection_where_only_one_is_wanted_or_possible(site: Site, program: Program, target: Path) -> None:
    ends: list[Ended] = []
    cases: dict[str, tuple[dict[str, int], dict[str, str]]] = {
        "wanted": ({"connections": 1}, {}),
        "no-validator": ({}, {"ETag": ""}),
        "no-ranges": ({}, {"Accept-Ranges": "none"}),
    }
    with ExitStack() as stack:
        for name, (more, headers) in cases.items():
            digest = site.put(f"/{name}", BIG[: 12 * MIB], bytes_per_s=4 * MIB, headers=headers)
            params = {"url": f"{site.url}/{name}", "to": f"{target}/{name}", "sha256": digest} | more
            process = program.start("download", params, {})
            stack.callback(lambda run=program.runs, process=process: ends.append(program.end(process, run)))
    assert [ended.code for ended in ends] == [0, 0, 0]
    assert sorted(request.path for request in site.requests) == sorted(f"/{name}" for name in cases)


LONG = (pytest.param(fault, marks=pytest.mark.long) for fault in ("403", "drop"))


@pytest.mark.parametrize("fault", ["429", "shifted", *LONG])
def test_helpers_that_are_turned_away_harm_nothing(site: Site, program: Program, target: Path, fault: str) -> None:
    digest = site.put("/k", BIG, bytes_per_s=6 * MIB, faults=["none"] + [fault] * 3)
    ended = program.run("download", {"url": f"{site.url}/k", "to": f"{target}/k", "sha256": digest})
    assert ended.code == 0, ended.text
    assert len(site.requests) >= 4


def test_content_that_is_replaced_under_the_helpers_is_never_mixed(
    site: Site, program: Program, target: Path, wait_for: Wait
) -> None:
    # Larger than what four connections ask for at first: somebody has to ask again.
    former = site.put("/k", BIG * 2, bytes_per_s=6 * MIB)
    process = program.start("download", {"url": f"{site.url}/k", "to": f"{target}/k"}, {})
    wait_for(lambda: len(site.requests) > 1)
    digest = site.put("/k", BIG[::-1])
    ended = program.end(process)
    assert ended.code == 0, ended.text
    assert ended.outputs["sha256"] in (former, digest)  # the whole of either
    assert hashlib.sha256((target / "k").read_bytes()).hexdigest() == ended.outputs["sha256"]


def killed_halfway(site: Site, program: Program, target: Path, wait_for: Wait, **params: object) -> None:
    """An attempt that was killed after it had written down how far it was."""
    note = target / ".outrider-stage.k.resume-note"
    process = program.start("download", {"url": f"{site.url}/k", "to": f"{target}/k", "connections": 1, **params}, {})

    def noted() -> bool:
        return note.exists() and json.loads(note.read_text())["missing"][0][0] > MIB

    wait_for(noted)
    process.kill()
    program.end(process)
    assert left_in(target) == [".outrider-stage.k.resume", note.name]
    site.requests.clear()
    site.pages["/k"].bytes_per_s = 0


def test_killed_download_is_gone_on_with(site: Site, program: Program, target: Path, wait_for: Wait) -> None:
    site.put("/k", BIG, bytes_per_s=2 * MIB)
    killed_halfway(site, program, target, wait_for)
    ended = program.run("download", {"url": f"{site.url}/k", "to": f"{target}/k"})
    assert ended.code == 0, ended.text
    assert (target / "k").read_bytes() == BIG
    assert left_in(target) == ["k"]
    (request,) = site.requests
    assert int(request.headers["range"][6:-1]) > MIB
    assert request.headers["if-range"] == site.pages["/k"].headers["ETag"]


def test_killed_download_of_something_else_is_not(site: Site, program: Program, target: Path, wait_for: Wait) -> None:
    """The same validator at another address says nothing; the same checksum does."""
    digest = site.put("/k", BIG, bytes_per_s=2 * MIB, headers={"ETag": '"1"'})
    killed_halfway(site, program, target, wait_for)
    other = site.put("/other", BIG[::-1], headers={"ETag": '"1"'})
    ended = program.run("download", {"url": f"{site.url}/other", "to": f"{target}/k"})
    assert (ended.code, ended.outputs["sha256"]) == (0, other)
    assert "range" not in site.requests[0].headers
    (target / "k").unlink()
    site.pages["/k"].bytes_per_s = 2 * MIB
    killed_halfway(site, program, target, wait_for, sha256=digest)
    site.pages["/moved"] = site.pages["/k"]
    ended = program.run("download", {"url": f"{site.url}/moved?signed=again", "to": f"{target}/k", "sha256": digest})
    assert ended.code == 0, ended.text
    assert "range" in site.requests[0].headers


def test_damaged_leftovers_are_found_out_by_the_checksum(
    site: Site, program: Program, target: Path, wait_for: Wait
) -> None:
    digest = site.put("/k", BIG, bytes_per_s=2 * MIB)
    killed_halfway(site, program, target, wait_for, sha256=digest)
    with (target / ".outrider-stage.k.resume").open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    ended = program.run("download", {"url": f"{site.url}/k", "to": f"{target}/k", "sha256": digest})
    assert ended.code == 0, ended.text
    assert (target / "k").read_bytes() == BIG
    assert ["range" in request.headers for request in site.requests] == [True, False]


def test_what_failed_for_now_is_gone_on_with_and_what_failed_for_good_is_not(
    site: Site, program: Program, target: Path
) -> None:
    site.put("/k", BIG, faults=["cut"] + ["503"] * 6)
    params = {"url": f"{site.url}/k", "to": f"{target}/k"}
    ended = program.run("download", params)
    assert (ended.code, ended.cause) == (75, "server_unavailable")
    assert len(left_in(target)) == 2
    site.requests.clear()
    assert program.run("download", params).code == 0
    assert site.requests[0].headers["range"] == f"bytes={len(BIG) // 2}-"
    site.put("/k", BIG, faults=["cut", "404"])
    ended = program.run("download", params | {"to": f"{target}/l"})
    assert (ended.code, ended.cause) == (1, "no_such_address")
    assert left_in(target) == ["k"]


def test_cancel_while_helpers_are_at_work_leaves_nothing(
    site: Site, program: Program, target: Path, wait_for: Wait
) -> None:
    site.put("/k", BIG, bytes_per_s=MIB)
    (target / "k").write_bytes(b"before")
    process = program.start("download", {"url": f"{site.url}/k", "to": f"{target}/k"}, {})
    wait_for(lambda: len(site.requests) == 3)  # 24 MiB are three ranges
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 128 + signal.SIGTERM
    program.end(process)
    assert left_in(target) == ["k"]
    assert (target / "k").read_bytes() == b"before"


def test_it_is_no_faster_than_allowed(site: Site, program: Program, target: Path, tmp_path: Path) -> None:
    body = BIG[: 2 * MIB]
    digest = site.put("/k", body)
    params = {"url": f"{site.url}/k", "to": f"{target}/k", "limit_bytes_per_s": MIB, "sha256": digest}
    ended = program.run("download", params)
    assert ended.code == 0, ended.text
    # Two seconds' worth with a tenth of a second's burst: what is said at least every half second shows it.
    assert len(ended.progress) >= 4
    assert len(site.requests) == 1, "slow by wish is no reason for more connections"
    (target / "r").write_bytes(body)
    site.put("/r", b"")
    ended = program.run("upload", {"url": f"{site.url}/r", "from": f"{target}/r", "limit_bytes_per_s": MIB})
    assert ended.code == 0, ended.text
    assert len(ended.progress) >= 4
    assert site.uploads["/r"] == body
