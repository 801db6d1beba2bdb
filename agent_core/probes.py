"""Whether a managed container does what it is there for: asked once by a connection, a GET, or a program inside it.

Connections go to the container's own address: the engine's port proxy accepts on a published port before anything
listens behind it. What the engine itself can't answer is an error, never a container's failure.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from agent_core.execs import run_briefly
from agent_core.runtimes.base import Runtime

PortName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]

_PROBE_TIMEOUT_S = 2.0
_EXEC_PROBE_TIMEOUT_S = 10.0
_SAID_BYTES = 200


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TcpProbe(_Model):
    """A connection to this port is accepted."""

    port: PortName


class HttpProbe(_Model):
    """A GET is answered: with this status, or with any of 200 to 399."""

    port: PortName
    path: Annotated[str, StringConstraints(pattern=r"^/[^\s]*$", max_length=2048)] = "/"
    status: Annotated[int, Field(ge=100, le=599)] | None = None


class ExecProbe(_Model):
    """A program that is run inside the container ends with exit code 0."""

    args: Annotated[tuple[str, ...], Field(min_length=1, max_length=64)]


class _Probe(_Model):
    tcp: TcpProbe | None = None
    http: HttpProbe | None = None
    exec: ExecProbe | None = None
    log: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(probe is not None for probe in (self.tcp, self.http, self.exec, self.log)) != 1:
            raise ValueError("give exactly one of tcp, http, log, exec")
        return self

    @property
    def port(self) -> str | None:
        """The name of the port that it connects to."""
        probe = self.tcp or self.http
        return probe.port if probe else None


class Readiness(_Probe):
    """When the container counts as started: exactly one of the four, within ``timeout_s`` seconds. ``log``: a text
    that appears in its log."""

    timeout_s: Annotated[float, Field(gt=0, le=3600)] = 30.0


class Liveness(_Probe):
    """Whether the container still works, asked every ``interval_s`` seconds from then on that it was ready.

    ``failures`` in a row, each after ``timeout_s`` at the latest, make it one that has to be restarted; none counts
    within ``grace_s`` of its start unless it has worked before. ``log``: a text in its log that means it is broken, at
    once.
    """

    interval_s: Annotated[float, Field(ge=1, le=3600)] = 10.0
    timeout_s: Annotated[float, Field(gt=0, le=60)] = 5.0
    failures: Annotated[int, Field(ge=1, le=100)] = 3
    grace_s: Annotated[float, Field(ge=0, le=3600)] = 30.0


async def ask(
    runtime: Runtime,
    container: str,
    address: str,
    numbers: Mapping[str, int],
    probe: Readiness | Liveness,
    *,
    timeout_s: float | None = None,
) -> str:
    """Ask once: "" if it works, else what is wrong. ``numbers``: the ports to connect to, by name, at ``address``.

    Not for a probe of the log. Raises what the engine raises about a program that is to be run.
    """
    if probe.exec is not None:
        limit_s = timeout_s or _EXEC_PROBE_TIMEOUT_S
        code, said = await run_briefly(runtime, container, probe.exec.args, timeout_s=limit_s)
        if code == 0:
            return ""
        told = said[-_SAID_BYTES:].decode("utf-8", "replace").strip()
        what = f"did not end within {limit_s:g} s" if code is None else f"ended with exit code {code}"
        return f"{probe.exec.args[0]} {what}{f': {told}' if told else ''}"
    assert probe.port is not None
    number, limit_s = numbers[probe.port], timeout_s or _PROBE_TIMEOUT_S
    if probe.http is not None:
        return await _http(address, number, probe.http, limit_s)
    return await _tcp(address, number, probe.port, limit_s)


async def _tcp(address: str, port: int, name: str, timeout_s: float) -> str:
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(address, port)
    except (OSError, TimeoutError):
        return f"nothing accepted a connection on its port {name}"
    writer.close()
    return ""


async def _http(address: str, port: int, probe: HttpProbe, timeout_s: float) -> str:
    """One GET over HTTP/1.0: only the status line counts."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(address, port)
            try:
                writer.write(f"GET {probe.path} HTTP/1.0\r\nHost: {address}:{port}\r\n\r\n".encode())
                await writer.drain()
                line = await reader.readline()
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
        status = int(line.split()[1])
    except (OSError, TimeoutError, ValueError, IndexError):
        return f"port {probe.port} did not answer GET {probe.path}"
    if status == probe.status if probe.status else 200 <= status < 400:
        return ""
    return f"port {probe.port} answered GET {probe.path} with status {status}"
