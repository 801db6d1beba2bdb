"""The agent's step plugins: loaded and called as everywhere (`outrider.plugin_host`), and what fails is logged."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from outrider.plugin_host import PluginError, PluginReport, RegisteredStepType, StepPlugins, guarded
from outrider.plugin_probe import probe

__all__ = ["PluginError", "PluginHost", "PluginReport", "RegisteredStepType", "guarded"]

log = structlog.get_logger(__name__)


@dataclass
class PluginHost(StepPlugins):
    """The plugins of this node. Build it with `load_surviving`."""

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
        mark.unlink(missing_ok=True)
        if found is not None:
            blamed = {(each.name, each.distribution): each for each in found.plugins if each.name in fatal}
            host.plugins = [blamed.get((each.name, each.distribution), each) for each in host.plugins]
        return host

    def _failed(self, plugin: str, hook: str, error: str) -> None:
        super()._failed(plugin, hook, error)
        log.warning("a plugin's hook failed", plugin=plugin, hook=hook, error=error)
