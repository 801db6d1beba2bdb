"""Waits until a managed container is ready: by a connection, an HTTP answer, a program inside it, or its log."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from agent_core.container_spec import ManagedSpec
from agent_core.probes import Readiness, ask
from agent_core.runtimes.base import Runtime
from outrider.errors import Conflict, PermanentError

_INTERVAL_S = 0.1
_EXEC_INTERVAL_S = 0.5
_LAST_LINES = 20
_LAST_BYTES = 4096


@dataclass
class _Why:
    """What was wrong when it was last asked."""

    text: str


async def wait_ready(
    runtime: Runtime, container: str, spec: ManagedSpec, ports: dict[str, int], *, settle_s: float = 0.3
) -> None:
    """Return when the container is ready (without a probe: when it has run for ``settle_s`` seconds).

    Raises PermanentError, with the container's last log lines, if it ends or the time is over before.
    """
    ready = spec.ready
    timeout_s = ready.timeout_s if ready else settle_s
    wrong = _Why("it was not asked yet")
    probe = asyncio.create_task(_probe(runtime, container, spec, ready, ports, wrong))
    ended = asyncio.create_task(runtime.exited(container))
    try:
        done, _ = await asyncio.wait({probe, ended}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if probe in done:
            probe.result()
            return
        if ended in done:
            end = ended.result()
            if ready is None and end.exit_code == 0 and spec.restart.policy in ("no", "on-failure"):
                return  # a container without a probe may be short
            how = "was killed for want of memory" if end.oom_killed else f"ended with exit code {end.exit_code}"
            raise PermanentError(
                f"the container {spec.name} {how} before it was ready{await last_lines(runtime, container)}",
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
        f"({f'its log has no {ready.log!r}' if ready.log else wrong.text}){await last_lines(runtime, container)}",
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
    runtime: Runtime, container: str, spec: ManagedSpec, ready: Readiness | None, ports: dict[str, int], why: _Why
) -> None:
    if ready is None:
        await asyncio.Event().wait()  # only the time counts
    elif ready.log is not None:
        await _log_line(runtime, container, ready.log.encode())
    else:
        numbers = spec.numbers(ports)
        while True:
            info = await runtime.inspect(container)
            try:
                why.text = await ask(runtime, container, info.ip_address or "127.0.0.1", numbers, ready)
            except Conflict as error:
                why.text = str(error)  # it does not run (yet, or any more): whether it has ended is seen elsewhere
            if not why.text:
                return
            await asyncio.sleep(_EXEC_INTERVAL_S if ready.exec else _INTERVAL_S)


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
