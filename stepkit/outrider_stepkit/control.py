"""Managed containers, over the control socket of an attempt: HTTP with JSON on a Unix socket."""

from __future__ import annotations

import http.client
import json
import socket
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any

from outrider_stepkit.step import StepFailure


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

    def start(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """Start a managed container, or adopt the one that has this name and the same spec."""
        return self.call("POST", "/v1/containers", spec)

    def stop(self, name: str, **options: Any) -> dict[str, Any]:
        return self.call("POST", f"/v1/containers/{_quoted(name)}/stop", options)

    def restart(self, name: str, **options: Any) -> dict[str, Any]:
        return self.call("POST", f"/v1/containers/{_quoted(name)}/restart", options)

    def wait(self, name: str, **options: Any) -> dict[str, Any]:
        """Wait for the container's end. Give ``call`` a longer ``timeout_s`` for what takes long."""
        return self.call("POST", f"/v1/containers/{_quoted(name)}/wait", options)

    def inspect(self, name: str) -> dict[str, Any]:
        return self.call("GET", f"/v1/containers/{_quoted(name)}")

    def list(self) -> dict[str, Any]:
        return self.call("GET", "/v1/containers")

    def remove(self, name: str) -> dict[str, Any]:
        return self.call("DELETE", f"/v1/containers/{_quoted(name)}")

    def logs(self, name: str, **options: Any) -> bytes:
        """What the container has printed."""
        query = urllib.parse.urlencode(options)
        return self._exchange(
            "GET", f"/v1/containers/{_quoted(name)}/logs" + (f"?{query}" if query else ""), None, None
        )

    def call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """Any call of the interface; a JSON object in, a JSON object out. Raises ControlError."""
        data = self._exchange(method, path, body, timeout_s)
        if not data.strip():
            return {}
        try:
            document = json.loads(data)
        except ValueError as error:
            message = f"the control socket answered {method} {path} with something other than JSON"
            raise ControlError(message, code="bad_answer", status=0, temporary=False) from error
        return document if isinstance(document, dict) else {"items": document}

    def _exchange(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float | None) -> bytes:
        give_up = time.monotonic() + self._patience_s
        wait_s = 0.1
        while True:
            try:
                return self._exchange_once(method, path, body, timeout_s)
            except ControlError as error:
                if error.code != "control_unavailable" or time.monotonic() + wait_s > give_up:
                    raise
            time.sleep(wait_s)
            wait_s = min(wait_s * 2, 5.0)

    def _exchange_once(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float | None) -> bytes:
        connection = _UnixConnection(self._path, self._timeout_s if timeout_s is None else timeout_s)
        try:
            payload = None if body is None else json.dumps(body).encode()
            connection.request(method, path, payload, {"Content-Type": "application/json"} if payload else {})
            answer = connection.getresponse()
            data = answer.read()
        except TimeoutError as error:
            message = f"the agent did not answer {method} {path} in time"
            raise ControlError(message, code="timeout", status=0, temporary=True) from error
        except (OSError, http.client.HTTPException) as error:
            message = f"the agent's control socket can't be reached: {error}"
            raise ControlError(message, code="control_unavailable", status=0, temporary=True) from error
        finally:
            connection.close()
        if answer.status >= 400:
            raise _error(answer.status, data, f"{method} {path}")
        return data


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


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
    if document.get("hint"):
        message += f" ({document['hint']})"
    temporary = document.get("temporary", {"temporary": True, "permanent": False}.get(str(document.get("class"))))
    if not isinstance(temporary, bool):
        temporary = status in (429, 502, 503, 504)
    return ControlError(message, code=str(document.get("code") or "refused"), status=status, temporary=temporary)
