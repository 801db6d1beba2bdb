"""The control client, against a server on a Unix socket."""

from __future__ import annotations

import json
import socketserver
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

import pytest
from outrider_stepkit import ControlClient, ControlError


class Handler(BaseHTTPRequestHandler):
    answers: ClassVar[dict[str, tuple[int, Any]]] = {}
    seen: ClassVar[list[tuple[str, str, Any]]] = []

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.seen.append((self.command, self.path, json.loads(body) if body else None))
        status, document = self.answers.get(self.path, (200, {}))
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_DELETE = _answer

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def socket_path(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "control.sock"
    Handler.answers, Handler.seen = {}, []
    with socketserver.ThreadingUnixStreamServer(str(path), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield path
        server.shutdown()
        thread.join()


def test_calls_go_where_they_belong(socket_path: Path) -> None:
    Handler.answers["/v1/containers"] = (200, {"name": "a", "ports": {"game": 30000}})
    Handler.answers["/v1/containers/a%2Fb/logs?tail=5"] = (200, b"raw \xff log")
    client = ControlClient(str(socket_path))
    assert client.start({"name": "a"})["ports"] == {"game": 30000}
    client.stop("a", grace_s=5)
    client.remove("a")
    assert client.logs("a/b", tail=5) == b"raw \xff log"
    assert Handler.seen == [
        ("POST", "/v1/containers", {"name": "a"}),
        ("POST", "/v1/containers/a/stop", {"grace_s": 5}),
        ("DELETE", "/v1/containers/a", None),
        ("GET", "/v1/containers/a%2Fb/logs?tail=5", None),
    ]


@pytest.mark.parametrize(
    ("status", "body", "code", "temporary"),
    [
        (409, {"error": "the name is taken", "code": "conflict", "hint": "choose another"}, "conflict", False),
        (503, {"error": "the engine is away", "code": "engine_unavailable"}, "engine_unavailable", True),
        (500, {"error": {"message": "m", "code": "c", "class": "temporary"}}, "c", True),
        (500, b"<html>", "refused", False),
        (422, {"error": "not ready; its log ends with:\nno map\nbye", "code": "not_ready"}, "not_ready", False),
    ],
)
def test_refusals_carry_what_the_agent_said(
    socket_path: Path, status: int, body: Any, code: str, temporary: bool
) -> None:
    Handler.answers["/v1/containers/a"] = (status, body)
    with pytest.raises(ControlError) as caught:
        ControlClient(str(socket_path)).inspect("a")
    assert (caught.value.status, caught.value.code, caught.value.temporary) == (status, code, temporary)
    if isinstance(body, dict) and "hint" in body:
        assert str(caught.value) == "the name is taken (choose another)"
    if code == "not_ready":
        assert str(caught.value) == "not ready; its log ends with: | no map | bye"


def test_agent_that_is_away_is_waited_for_and_then_temporary(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ControlError, match="can't be reached") as caught:
        ControlClient(str(tmp_path / "none.sock"), patience_s=0.5).list()
    assert caught.value.temporary
    assert 0.2 < time.monotonic() - started < 2
