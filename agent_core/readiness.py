"""Waits until a managed container is ready: by a connection, an HTTP answer, a program inside it, or its log."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from agent_core.container_spec import ManagedSpec
from agent_core.probes import Readiness, ask
from agent_core.runtimes.base import Runtime
from outrider.errors import Conflict, PermanentError
from outrider.masking import mask_text

_INTERVAL_S = 0.1
_EXEC_INTERVAL_S = 0.5
_LAST_LINES = 20
_READ_BYTES = 64 * 1024  # of the log's end, before it is masked and cut
_LAST_CHARS = 1200  # with what stands before it, that fits into what a step may say about its failure (2,000)
_TOLD_CHARS = 100  # of the text that the log was to have


class NotReady(PermanentError):
    """The container ended, or the time was over, before it was ready. The message has the end of its log, last."""

    default_code = "not_ready"

    def __init__(self, sentence: str, log: str) -> None:
        super().__init__(f"{sentence}; {log}")
        self._sentence, self._log = sentence, log

    def became(self, told: str) -> None:
        """Say what became of others, before the log: its end is what gets lost where a message is cut."""
        self._sentence = f"{self._sentence} ({told})"
        self.message = f"{self._sentence}; {self._log}"


@dataclass
class _Why:
    """What was wrong when it was last asked."""

    text: str


async def wait_ready(
    runtime: Runtime,
    container: str,
    spec: ManagedSpec,
    ports: dict[str, int],
    *,
    secrets: Sequence[str] = (),
    since: datetime | None = None,
    settle_s: float = 0.3,
) -> None:
    """Return when the container is ready (without a probe: when it has run for ``settle_s`` seconds).

    ``since``: the end of its former run, if it had one, whose log says nothing about this one.
    Raises NotReady, with the container's last log lines, if it ends or the time is over before.
    """
    ready = spec.ready
    timeout_s = ready.timeout_s if ready else settle_s
    wrong = _Why("it was not asked yet")
    probe = asyncio.create_task(_probe(runtime, container, spec, ready, ports, wrong, since))
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
            raise NotReady(
                f"the container {spec.name} {how} before it was ready",
                await last_lines(runtime, container, secrets, since),
            )
    finally:
        for task in (probe, ended):
            task.cancel()
        await asyncio.gather(probe, ended, return_exceptions=True)
    if ready is None:
        return
    why = f"its log has no {ready.log[:_TOLD_CHARS]!r}" if ready.log else wrong.text
    raise NotReady(
        f"the container {spec.name} was not ready within {ready.timeout_s:g} s ({why})",
        await last_lines(runtime, container, secrets, since),
    )


async def last_lines(
    runtime: Runtime, container: str, secrets: Sequence[str] = (), since: datetime | None = None
) -> str:
    """The end of the container's log, as the tail of a sentence: whole lines as far as there is room."""
    collected = b""
    async with contextlib.aclosing(runtime.logs(container, tail=_LAST_LINES, since=since)) as chunks:
        async for _, chunk in chunks:
            collected = (collected + chunk)[-_READ_BYTES:]
    # Masked before it is cut: half a secret would not be found.
    text = mask_text(collected.decode("utf-8", "replace"), secrets).strip()
    if len(text) > _LAST_CHARS:
        end = text[-_LAST_CHARS:]
        text = "…" + (end.partition("\n")[2] or end)
    return f"its log ends with:\n{text}" if text else "its log is empty"


async def _probe(
    runtime: Runtime,
    container: str,
    spec: ManagedSpec,
    ready: Readiness | None,
    ports: dict[str, int],
    why: _Why,
    since: datetime | None,
) -> None:
    if ready is None:
        await asyncio.Event().wait()  # only the time counts
    elif ready.log is not None:
        await _log_line(runtime, container, ready.log.encode(), since)
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


async def _log_line(runtime: Runtime, container: str, wanted: bytes, since: datetime | None) -> None:
    # The engine's log is read, never the container attached to: a reader that stops would freeze it.
    window = b""
    async with contextlib.aclosing(runtime.logs(container, follow=True, since=since)) as chunks:
        async for _, chunk in chunks:
            window += chunk
            if wanted in window:
                return
            window = window[-len(wanted) :]
    await asyncio.Event().wait()  # the log has ended: whether the container has, is seen elsewhere
