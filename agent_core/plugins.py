"""The agent's step plugins: loaded and called as everywhere (`outrider.plugin_host`), and what fails is logged."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from outrider.plugin_host import HookFailure, PluginError, PluginReport, RegisteredStepType, StepPlugins, guarded
from outrider.plugin_probe import probe

if TYPE_CHECKING:
    from agent_core.outbox import Outbox
    from agent_core.services import Background

__all__ = ["HookFailure", "PluginError", "PluginHost", "PluginReport", "RegisteredStepType", "guarded"]

log = structlog.get_logger(__name__)


@dataclass
class PluginHost(StepPlugins):
    """The plugins of this node. Build it with `load_surviving`.

    ``on_failure`` is called, in whichever thread, when a hook of a plugin does not work for the first time.
    """

    on_failure: Callable[[HookFailure], object] | None = None

    @classmethod
    def load_surviving(
        cls, state_dir: Path, enabled: Sequence[str] | None, disabled: Sequence[str], *, limit_s: float
    ) -> PluginHost:
        """`load`, but a plugin that ended the agent when it was loaded is left out the next time.

        A mark in ``state_dir`` says that plugins are being loaded. Where it is found, a former agent did not come to
        the end of it: killed by somebody, or by a plugin, which a child process finds out.
        """
        mark = state_dir / "plugins.loading"
        survived = not mark.exists()
        found = None if survived else probe(enabled, disabled, limit_s=limit_s)
        fatal = found.fatal if found is not None else ()
        with contextlib.suppress(OSError):  # on a full disk plugins are loaded without
            mark.touch()
        host = cls.load(enabled, [*disabled, *fatal], limit_s=limit_s)
        if not fatal:  # else it stays, and they are left out the next time, too
            mark.unlink(missing_ok=True)
        if found is not None:
            blamed = {(each.name, each.distribution): each for each in found.plugins if each.name in fatal}
            host.plugins = [blamed.get((each.name, each.distribution), each) for each in host.plugins]
        return host

    def _failed(self, plugin: str, hook: str, error: str) -> None:
        super()._failed(plugin, hook, error)
        log.warning("a plugin's hook failed", plugin=plugin, hook=hook, error=error)
        failure = self.failures[plugin, hook]
        if failure.count == 1 and self.on_failure is not None:
            self.on_failure(failure)

    def report_failures(self, outbox: Outbox, background: Background) -> None:
        """An event `plugin.hook_failed` for each hook of a plugin that does not work, once; from now on, and so far."""
        loop = asyncio.get_running_loop()

        def tell(failure: HookFailure) -> None:
            event = outbox.emit("plugin.hook_failed", failure.plugin, {"hook": failure.hook, "error": failure.error})
            background.start(event, f"event of {failure.hook}")

        for each in self.failures.values():
            tell(each)
        self.on_failure = lambda failure: loop.call_soon_threadsafe(tell, failure)

    def notes_of(self, report: PluginReport) -> tuple[str, ...]:
        """What is to be known of a plugin by now: hooks that did not work among it."""
        if report.state != "ok":
            return report.notes
        failed = (each for each in self.failures.values() if each.plugin == report.name)
        return (*report.notes, *(f"{each.hook} has failed {each.count} times: {each.error}" for each in failed))
