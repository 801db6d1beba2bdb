"""Carrying out one step for a person: its log and its progress while it runs, Ctrl-C as its cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

from agent_core.onestep import GivenVolume, StepRequest
from agent_core.telemetry.logs import configure_logging
from agent_core.trial import StepResult, TrialRun, trial, user_of
from outrider.cli._output import clean, note, size
from outrider.errors import InvalidInput

if TYPE_CHECKING:
    from agent_core.policy import NodePolicy

_GRACE_S = 10.0
_LOOK_S = 0.1


def carry_out(request: StepRequest, policy: NodePolicy, plugin: str) -> tuple[StepResult, float]:
    """Carry the step of ``plugin`` out; how it ended, and after how many seconds.

    Raises EngineUnavailable, InvalidInput.
    """
    configure_logging("error")
    prepare(request)
    return asyncio.run(_carry_out(request, policy, plugin))


def prepare(request: StepRequest) -> None:
    """Make the directories that are not there yet, and see that the step can write where it has to.

    Raises InvalidInput for what is no directory, and for one of root's that the step, never run as root, is to write.
    """
    uid, gid = user_of(each for each in request.volumes.values() if each.directory.is_dir())
    for name, volume in request.volumes.items():
        directory = volume.directory
        if directory.exists() and not directory.is_dir():
            raise InvalidInput(f"--volume {name}: {directory} is not a directory")
        if not directory.exists():
            _make(name, volume)
            if os.geteuid() == 0:
                os.chown(directory, uid, gid)
        elif volume.writable and os.geteuid() == 0 and directory.stat().st_uid == 0:
            if any(directory.iterdir()):
                raise InvalidInput(
                    f"--volume {name}: {directory} is root's, and a step never runs as root",
                    hint=f"give it away (chown -R {uid}:{gid} {directory}), or name one that does not exist yet",
                )
            os.chown(directory, uid, gid)


def _make(name: str, volume: GivenVolume) -> None:
    if not volume.writable:
        raise InvalidInput(f"--volume {name}: {volume.directory} does not exist, and the step only reads it")
    try:
        volume.directory.mkdir(parents=True)
    except OSError as error:
        raise InvalidInput(f"--volume {name}: {volume.directory} can't be made: {error.strerror}") from error


async def _carry_out(request: StepRequest, policy: NodePolicy, plugin: str) -> tuple[StepResult, float]:
    loop = asyncio.get_running_loop()
    shown = _Progress()
    async with trial(plugins=[plugin], policy=policy) as place:
        began = time.monotonic()
        run = await place.start(request, shown.update)
        cancelling: list[asyncio.Task[None]] = []

        def cancel() -> None:
            # The second one does not wait for the grace.
            grace_s = 0.0 if cancelling else _GRACE_S
            note(f"cancelling the step, which has {grace_s:g} s to end" if grace_s else "killing the step")
            cancelling.append(asyncio.ensure_future(_cancel(run, grace_s)))

        with contextlib.suppress(NotImplementedError, RuntimeError):
            loop.add_signal_handler(signal.SIGINT, cancel)
        telling = asyncio.create_task(_tell(run, shown))
        result = await run.end()
        await telling
        await asyncio.gather(*cancelling)
        return result, time.monotonic() - began


async def _cancel(run: TrialRun, grace_s: float) -> None:
    if grace_s:
        await run.cancel(grace_s)
    else:
        await run.kill()


async def _tell(run: TrialRun, shown: _Progress) -> None:
    """The log, as it comes."""
    while True:
        over = run.over
        for _, data in run.news():
            shown.clear()
            sys.stderr.write("".join(f"{clean(line)}\n" for line in data.decode(errors="replace").splitlines()))
        sys.stderr.flush()
        if over:
            shown.clear()
            return
        await asyncio.sleep(_LOOK_S)


class _Progress:
    """How far the step is, on a line of its own where a person looks on."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._drawn = False
        self._began = time.monotonic()

    def update(self, progress: Any) -> None:
        """Draw it."""
        if not self._terminal:
            return
        measure = size if progress.unit == "bytes" else lambda number: f"{number}"
        total = f" of {measure(progress.total)}" if progress.total else ""
        unit = "" if progress.unit == "bytes" else f" {progress.unit}"
        rate = progress.done / max(0.1, time.monotonic() - self._began)
        speed = f", {size(int(rate))}/s" if progress.unit == "bytes" else ""
        message = f" {clean(progress.message)}" if progress.message else ""
        sys.stderr.write(f"\r\033[K{measure(progress.done)}{total}{clean(unit)}{speed}{message}")
        sys.stderr.flush()
        self._drawn = True

    def clear(self) -> None:
        """Give the line back."""
        if self._drawn:
            sys.stderr.write("\r\033[K")
            self._drawn = False
