"""Managed containers, over the control socket of an attempt: HTTP with JSON on a Unix socket."""

from __future__ import annotations

import http.client
import json
import secrets
import socket
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, TypeVar

from outrider_stepkit.step import StepFailure

T = TypeVar("T")

_FOREVER_S = 7 * 24 * 3600.0  # the step's own timeout ends it before
_MARGIN_S = 30.0
_PIECE = 1024 * 1024
_LINES = "application/x-ndjson"


class ControlError(StepFailure):
    """The agent refused, or could not do, what was asked. ``status`` is HTTP's; 0 where no answer came."""

    def __init__(self, message: str, *, code: str, status: int, temporary: bool) -> None:
        super().__init__(message, code=code, temporary=temporary)
        self.status = status


class ControlClient:
    """Calls of the control interface. All of them are safe to repeat.

    While the agent restarts its socket is away: a call is repeated for ``patience_s`` until it answers again.
    """

    def __init__(self, path: str, timeout_s: float = 120.0, patience_s: float = 60.0) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._patience_s = patience_s

    def start(
        self, spec: Mapping[str, Any], *, on_pull: Callable[[int, int | None, str], None] | None = None
    ) -> dict[str, Any]:
        """Start a managed container, or adopt the one that has this name and the same spec.

        ``on_pull`` is told how much of the image has been fetched: bytes, bytes in all as far as that is known, and a
        sentence with the rate.
        Gives id, name, image, ports, address, host_paths, adopted, replaced. What it takes is for the spec's readiness
        and the image to say: there is no other limit to it.
        """

        def heard(document: dict[str, Any]) -> None:
            if on_pull is not None and isinstance(document.get("pull"), dict):
                on_pull(document["pull"]["done"], document["pull"]["total"], document["pull"]["message"])

        return self._lines("POST", "/v1/containers", spec, heard)

    def exec(
        self,
        name: str,
        args: Sequence[str],
        *,
        on_output: Callable[[str, str], None] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Run a program inside a container that runs; ``options``: env, workdir, user, timeout_s, id.

        ``on_output`` gets what it prints as it comes: "stdout" or "stderr", and the text. Gives exit_code, and
        truncated: whether some of the output is missing, because the agent was restarted meanwhile. With an ``id``
        the call may be repeated within the attempt, also after an error that is temporary: the program is run once. The
        next attempt's ids are its own.
        """

        def heard(document: dict[str, Any]) -> None:
            for stream in ("stdout", "stderr"):
                if on_output is not None and isinstance(document.get(stream), str):
                    on_output(stream, document[stream])

        body = {"args": list(args), "id": secrets.token_hex(8), **options}
        return self._lines("POST", f"/v1/containers/{_quoted(name)}/exec", body, heard)

    def stop(self, name: str, **options: Any) -> dict[str, Any]:
        """Stop signal, then kill after ``grace_s``; it stays, with its ports."""
        return self.call("POST", f"/v1/containers/{_quoted(name)}/stop", options)

    def restart(self, name: str, **options: Any) -> dict[str, Any]:
        """Restart in place, with the same ports; ``grace_s`` as for `stop`."""
        return self.call("POST", f"/v1/containers/{_quoted(name)}/restart", options)

    def wait(self, name: str, *, timeout_s: float | None = None) -> dict[str, Any]:
        """Wait for the container's end: exit_code, oom_killed, engine_stopped. ControlError "wait_timeout" if it does
        not come within ``timeout_s``."""
        body = {} if timeout_s is None else {"timeout_s": timeout_s}
        path = f"/v1/containers/{_quoted(name)}/wait"
        return self.call("POST", path, body, timeout_s=_FOREVER_S if timeout_s is None else timeout_s + _MARGIN_S)

    def inspect(self, name: str) -> dict[str, Any]:
        """How one is: id, name, image, state, exit_code, restart_count, health, ports, started_at."""
        return self.call("GET", f"/v1/containers/{_quoted(name)}")

    def list(self) -> dict[str, Any]:
        """Those of this run or object, under ``containers``."""
        return self.call("GET", "/v1/containers")

    def remove(self, name: str, *, force: bool = False) -> dict[str, Any]:
        """Remove it and give its ports back; ``force``: also one that runs."""
        return self.call("DELETE", f"/v1/containers/{_quoted(name)}" + ("?force=1" if force else ""))

    def logs(self, name: str, **options: Any) -> bytes:
        """The last lines that the container has printed (``tail``; 4 MiB at most)."""
        query = urllib.parse.urlencode(options)
        return self._exchange(
            "GET", f"/v1/containers/{_quoted(name)}/logs" + (f"?{query}" if query else ""), None, None
        )

    def all_logs(self, name: str, *, follow: bool = False) -> Iterator[bytes]:
        """The whole log, piece by piece; with ``follow`` also what comes, until the container ends.

        ControlError with the code "control_unavailable" if it is cut off before its end; then it is read from its
        beginning again.
        """
        path = f"/v1/containers/{_quoted(name)}/logs?all=1" + ("&follow=1" if follow else "")
        with self._answer("GET", path, None, _FOREVER_S if follow else self._timeout_s) as answer:
            while piece := self._read(answer, f"GET {path}"):
                yield piece

    def call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """Any call of the interface; a JSON object in, a JSON object out. Raises ControlError."""
        data = self._exchange(method, path, body, timeout_s)
        return _object(data, f"{method} {path}")

    def _lines(
        self, method: str, path: str, body: Mapping[str, Any], heard: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        """A call that tells how it goes on, line by line; repeated for as long as no answer came to its end."""

        def once() -> dict[str, Any]:
            with self._answer(method, path, body, _FOREVER_S, {"Accept": _LINES}) as answer:
                if _LINES not in (answer.getheader("Content-Type") or ""):
                    return _object(self._whole(answer, f"{method} {path}"), f"{method} {path}")
                rest = b""
                while piece := self._read(answer, f"{method} {path}"):
                    *lines, rest = (rest + piece).split(b"\n")
                    for line in lines:
                        document = json.loads(line)
                        if isinstance(document.get("result"), dict):
                            result: dict[str, Any] = document["result"]
                            return result
                        if "error" in document:
                            status = int(document.get("status") or 422)
                            raise _error(status, json.dumps(document["error"]).encode(), f"{method} {path}")
                        heard(document)
            raise _unavailable("its answer was cut off")

        return self._patiently(once)

    def _exchange(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float | None) -> bytes:
        def once() -> bytes:
            limit_s = self._timeout_s if timeout_s is None else timeout_s
            with self._answer(method, path, body, limit_s) as answer:
                return self._whole(answer, f"{method} {path}")

        return self._patiently(once)

    def _whole(self, answer: http.client.HTTPResponse, what: str) -> bytes:
        data = bytearray()
        while piece := self._read(answer, what):
            data += piece
        return bytes(data)

    def _patiently(self, once: Callable[[], T]) -> T:
        give_up = time.monotonic() + self._patience_s
        wait_s = 0.1
        while True:
            begun = time.monotonic()
            try:
                return once()
            except ControlError as error:
                if time.monotonic() - begun > self._patience_s:
                    give_up = time.monotonic() + self._patience_s  # it did answer, until just now
                if error.code != "control_unavailable" or time.monotonic() + wait_s > give_up:
                    raise
            time.sleep(wait_s)
            wait_s = min(wait_s * 2, 5.0)

    @contextmanager
    def _answer(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        timeout_s: float,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> Iterator[http.client.HTTPResponse]:
        """An answer that can be read; refusals are raised."""
        connection = _UnixConnection(self._path, timeout_s)
        answer: http.client.HTTPResponse | None = None
        try:
            payload = None if body is None else json.dumps(body).encode()
            try:
                kind = {"Content-Type": "application/json"} if payload else {}
                connection.request(method, path, payload, {**kind, **headers})
                answer = connection.getresponse()
            except TimeoutError as error:
                raise _timeout(method, path) from error
            except (OSError, http.client.HTTPException) as error:
                raise _unavailable(error) from error
            if answer.status >= 400:
                raise _error(answer.status, self._read(answer, f"{method} {path}"), f"{method} {path}")
            yield answer
        finally:
            if answer is not None:
                answer.close()  # it has the socket to itself where the agent closes the connection
            connection.close()

    def _read(self, answer: http.client.HTTPResponse, what: str) -> bytes:
        """The next piece, "" at the end of a whole answer."""
        try:
            piece = answer.read1(_PIECE)
            if not piece and answer.length:
                raise _unavailable("its answer was cut off")
            return piece
        except TimeoutError as error:
            raise _timeout(*what.split(" ", 1)) from error
        except (OSError, http.client.HTTPException) as error:
            raise _unavailable(error) from error


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _object(data: bytes, what: str) -> dict[str, Any]:
    if not data.strip():
        return {}
    try:
        document = json.loads(data)
    except ValueError as error:
        message = f"the control socket answered {what} with something other than JSON"
        raise ControlError(message, code="bad_answer", status=0, temporary=False) from error
    return document if isinstance(document, dict) else {"items": document}


def _timeout(method: str, path: str) -> ControlError:
    message = f"the agent did not answer {method} {path} in time"
    return ControlError(message, code="timeout", status=0, temporary=True)


def _unavailable(why: object) -> ControlError:
    message = f"the agent's control socket can't be reached: {why}"
    return ControlError(message, code="control_unavailable", status=0, temporary=True)


def _quoted(name: str) -> str:
    return urllib.parse.quote(name, safe="")


def _error(status: int, data: bytes, what: str) -> ControlError:
    """An error's body: ``{"error": "sentence", "code": "snake_case", "hint": "…", "temporary": bool}``, or the same
    within ``error``, the sentence as ``message``, and ``class`` for the class of the error."""
    try:
        document = json.loads(data)
    except ValueError:
        document = {}
    if not isinstance(document, dict):
        document = {}
    if isinstance(document.get("error"), dict):
        document = {"error": document["error"].get("message"), **document["error"]}
    message = str(document.get("error") or document.get("message") or f"{what} was refused with status {status}")
    message = " | ".join(message.splitlines())  # of a log, say: a failure is told on one line
    if document.get("hint"):
        message += f" ({document['hint']})"
    temporary = document.get("temporary", {"temporary": True, "permanent": False}.get(str(document.get("class"))))
    if not isinstance(temporary, bool):
        temporary = status in (429, 502, 503, 504)
    return ControlError(message, code=str(document.get("code") or "refused"), status=status, temporary=temporary)
