"""The place where the kit carries steps out: one per policy and set of plugins, in a thread of its own.

The thread has the event loop, so that an author's tests are ordinary functions.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import structlog

from agent_core.onestep import GivenVolume, StepRequest
from agent_core.policy import NodePolicy
from agent_core.trial import StepResult, Trial, TrialRun, trial, user_of

T = TypeVar("T")
_PLENTY_S = 600.0


class Bench:
    """Carries steps out on the local engine, in the sandbox of a node with this policy.

    ``module``: the one plugin that is tested, by its module's name; "": all that are installed.
    """

    def __init__(self, module: str, policy: NodePolicy) -> None:
        self._module = module
        self._policy = policy
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._trial: Trial
        self._ended: Future[None] = Future()
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._serve, name="outrider-testing", daemon=True)

    def start(self) -> None:
        """Bring it up. Raises EngineUnavailable if the engine does not answer."""
        self._thread.start()
        self._ready.result(_PLENTY_S)

    def close(self) -> None:
        """Remove all that was made."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_PLENTY_S)

    def run(self, request: StepRequest) -> StepResult:
        """Carry a step out, to its end."""
        return self._call(self._trial.run(request))

    @contextmanager
    def begun(self, request: StepRequest) -> Iterator[Begun]:
        """A step that runs; whatever happens, it has ended when the context is left."""
        begun = Begun(self._call(self._trial.start(request)), self._call)
        try:
            yield begun
        finally:
            if not begun.over:
                begun.cancel(0)
                begun.end()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_PLENTY_S)

    def _serve(self) -> None:
        if not structlog.is_configured():  # what an agent logs about each run is no matter of a test
            structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._live())
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(error)
            else:
                raise
        finally:
            self._loop.close()

    async def _live(self) -> None:
        async with trial(plugins=[] if self._module else None, policy=self._policy) as place:
            if self._module:
                place.plugins.register(
                    importlib.import_module(self._module), name="tested", distribution=self._module, version=""
                )
            self._trial = place
            self._ready.set_result(None)
            await self._stop.wait()


class Begun:
    """A step that runs."""

    def __init__(self, run: TrialRun, call: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self._run = run
        self._call = call

    @property
    def over(self) -> bool:
        return self._run.over

    def wait_until(self, begun: str, within_s: float) -> bool:
        """Whether it came so far: ``"progress"`` is its first word of how far it is; else a text in its log."""
        log = b""
        until = time.monotonic() + within_s
        while time.monotonic() < until and not self._run.over:
            log += b"".join(data for _, data in self._run.news())
            if (begun == "progress" and self._run.progressed.is_set()) or (
                begun != "progress" and begun.encode() in log
            ):
                return True
            time.sleep(0.02)
        return False

    def cancel(self, grace_s: float) -> None:
        """Stop signal, then kill after the grace."""
        self._call(self._run.cancel(grace_s))

    def kill(self) -> None:
        """End it as a power cut would."""
        self._call(self._run.kill())

    def end(self) -> StepResult:
        """Wait for its end."""
        result: StepResult = self._call(self._run.end())
        return result


def make_volumes(folder: Path, mounts: Mapping[str, str], files: Mapping[str, Any]) -> dict[str, GivenVolume]:
    """Directories for the volumes, with the files in them, owned by the step's user."""
    made = {}
    for name, text in mounts.items():
        path, _, mode = text.partition(":")
        directory = folder / name
        directory.mkdir(parents=True, exist_ok=True)
        made[name] = GivenVolume(directory, path, writable=mode == "rw")
    for name, content in files.items():
        volume = name.partition("/")[0]
        if volume not in made:
            there = ", ".join(made) or "none"
            raise ValueError(f"files: {name!r} begins with no volume of the example; it has {there}")
        file = folder / name
        if name.endswith("/"):
            file.mkdir(parents=True, exist_ok=True)
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            with file.open("wb") as opened:
                opened.truncate(content)
        else:
            file.write_bytes(content.encode() if isinstance(content, str) else bytes(content))
    if os.geteuid() == 0:
        uid, gid = user_of(())
        for each in (folder, *folder.rglob("*")):
            os.chown(each, uid, gid, follow_symlinks=False)
    return made


@contextmanager
def arguments_of_processes(wanted: Sequence[str]) -> Iterator[set[str]]:
    """Which of the ``wanted`` texts stand in the arguments of any process of this machine while the context lasts.

    A step's processes are processes of its node: whoever may list those reads their arguments.
    """
    seen: set[str] = set()
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.02):
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    text = (process / "cmdline").read_bytes()
                except OSError:
                    continue
                seen.update(each for each in wanted if each.encode() in text)

    thread = threading.Thread(target=look, name="outrider-testing-arguments", daemon=True)
    if wanted and Path("/proc/self/cmdline").exists():
        thread.start()
    try:
        yield seen
    finally:
        done.set()
        if thread.is_alive():
            thread.join()
