"""Whether a managed container is ready: by a connection, an HTTP answer, or a line of its log.

Probes go to the container's own address: the engine's port proxy accepts connections on a published port
before anything listens behind it.
"""

from __future__ import annotations

import asyncio
import contextlib

from agent_core.container_spec import HttpReady, ManagedSpec, Readiness
from agent_core.runtimes.base import Runtime
from outrider.errors import PermanentError

_INTERVAL_S = 0.1
_PROBE_TIMEOUT_S = 2.0
_LAST_LINES = 20
_LAST_BYTES = 4096


async def wait_ready(
    runtime: Runtime, container: str, spec: ManagedSpec, ports: dict[str, int], *, settle_s: float = 0.3
) -> None:
    """Return when the container is ready (without a probe: when it has run for ``settle_s`` seconds).

    Raises PermanentError, with the container's last log lines, if it ends or the time is over before.
    """
    ready = spec.ready
    timeout_s = ready.timeout_s if ready else settle_s
    probe = asyncio.create_task(_probe(runtime, container, spec, ready, ports))
    ended = asyncio.create_task(runtime.exited(container))
    try:
        done, _ = await asyncio.wait({probe, ended}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if probe in done:
            probe.result()
            return
        if ended in done:
            end = ended.result()
            if ready is None and end.exit_code == 0 and spec.restart in ("no", "on-failure"):
                return  # a container without a probe may be short
            why = "was killed for want of memory" if end.oom_killed else f"ended with exit code {end.exit_code}"
            raise PermanentError(
                f"the container {spec.name} {why} before it was ready{await last_lines(runtime, container)}",
                code="not_ready",
            )
    finally:
        for task in (probe, ended):
            task.cancel()
        await asyncio.gather(probe, ended, return_exceptions=True)
    if ready is None:
        return
    raise PermanentError(
        f"the container {spec.name} was not ready within {ready.timeout_s:g} s "
        f"({_describe(ready)}){await last_lines(runtime, container)}",
        code="not_ready",
    )


async def last_lines(runtime: Runtime, container: str, lines: int = _LAST_LINES) -> str:
    """The end of the container's log, as the tail of a sentence; at most 4 KiB."""
    collected = b""
    async with contextlib.aclosing(runtime.logs(container, tail=lines)) as chunks:
        async for _, chunk in chunks:
            collected = (collected + chunk)[-_LAST_BYTES:]
    text = collected.decode("utf-8", "replace").strip()
    return f"; its log ends with:\n{text}" if text else "; its log is empty"


async def _probe(
    runtime: Runtime, container: str, spec: ManagedSpec, ready: Readiness | None, ports: dict[str, int]
) -> None:
    if ready is None:
        await asyncio.Event().wait()  # only the time counts
    elif ready.log is not None:
        await _log_line(runtime, container, ready.log.encode())
    else:
        name = (ready.tcp or ready.http).port  # type: ignore[union-attr]  # one of them, by Readiness._one
        inside = next(port.container for port in spec.ports if port.name == name) or ports[name]
        while True:
            info = await runtime.inspect(container)
            address = info.ip_address or "127.0.0.1"
            number = ports[name] if spec.network == "host" else inside
            if await (_http(address, number, ready.http) if ready.http else _tcp(address, number)):
                return
            await asyncio.sleep(_INTERVAL_S)


async def _log_line(runtime: Runtime, container: str, wanted: bytes) -> None:
    # The engine's log is read, never the container attached to: a reader that stops would freeze it.
    window = b""
    async with contextlib.aclosing(runtime.logs(container, follow=True)) as chunks:
        async for _, chunk in chunks:
            window += chunk
            if wanted in window:
                return
            window = window[-len(wanted) :]
    await asyncio.Event().wait()  # the log has ended: whether the container has, is seen elsewhere


async def _tcp(address: str, port: int) -> bool:
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            _, writer = await asyncio.open_connection(address, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


async def _http(address: str, port: int, probe: HttpReady) -> bool:
    """One GET over HTTP/1.0: only the status line counts."""
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(address, port)
            try:
                writer.write(f"GET {probe.path} HTTP/1.0\r\nHost: {address}:{port}\r\n\r\n".encode())
                await writer.drain()
                line = await reader.readline()
            finally:
                writer.close()
        status = int(line.split()[1])
    except (OSError, TimeoutError, ValueError, IndexError):
        return False
    return status == probe.status if probe.status else 200 <= status < 400


def _describe(ready: Readiness) -> str:
    if ready.tcp:
        return f"nothing accepted a connection on its port {ready.tcp.port}"
    if ready.http:
        return f"port {ready.http.port} did not answer GET {ready.http.path} as it should"
    return f"its log has no {ready.log!r}"
