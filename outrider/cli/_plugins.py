"""What `plugin list` and `plugin doctor` share: which plugins are looked at, and how that is shown."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from outrider.cli._output import fields, note, plain, table
from outrider.cli._service import config_option, load_settings

if TYPE_CHECKING:
    from outrider.plugin_probe import Probe

F = TypeVar("F", bound=Callable[..., Any])

CONFIG_FILE = Path("/etc/outrider/agent.yaml")


def selection_options(function: F) -> F:
    """Which plugins: as an agent of this machine would choose. The command gets ``selection``, for `look`."""

    @functools.wraps(function)
    def packed(
        file: Path | None, plugins: tuple[str, ...], disabled: tuple[str, ...], limit_s: float | None, **rest: Any
    ) -> Any:
        flags = {"plugins": plugins or None, "disabled_plugins": disabled or None, "plugin_limit_s": limit_s}
        return function(selection=lambda: _selected(file, flags), **rest)

    for option in reversed(
        [
            config_option("OUTRIDER_AGENT_CONFIG", CONFIG_FILE),
            *plugin_options,
            click.option("--limit", "limit_s", type=float, metavar="SECONDS", help="How long each may take."),
        ]
    ):
        packed = option(packed)
    return cast("F", packed)


plugin_options = (
    click.option("--plugin", "plugins", multiple=True, metavar="NAME", help="Only these plugins; repeatable."),
    click.option(
        "--disable-plugin",
        "disabled",
        multiple=True,
        metavar="NAME",
        help="Not this plugin: it is not even imported; repeatable.",
    ),
)


def look(selection: Callable[[], dict[str, Any]]) -> Probe:
    """The plugins of this environment, looked at in a process of their own, and asked for facts as an agent asks them.

    Raises InvalidInput for bad settings.
    """
    for package in ("stevedore", "pluggy"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    from outrider.plugin_probe import probe

    return probe(**selection(), facts=True)


def as_rows(probe: Probe, *, closely: bool = False) -> list[dict[str, Any]]:
    """A plugin a row, as JSON values. A hook that failed is noted; ``closely``, its plugin is one that is broken."""
    rows = [plain(asdict(report)) for report in probe.plugins]
    failures = {each["plugin"]: each for each in probe.failures}
    for row in rows:
        failure = failures.get(row["name"])
        if failure is not None and row["state"] == "ok" and closely:
            row |= {"state": "error", "ok": False, "error": failure["error"], "fix": f"mend {failure['hook']}"}
        elif failure is not None and row["state"] == "ok":
            row["notes"].append(failure["error"])
        wants = unmet(row["distribution"]) if row["distribution"] else []
        row["notes"] += [f"{row['distribution']} needs {each}" for each in wants]
    return rows


def unmet(distribution: str) -> list[str]:
    """What a distribution requires and this environment does not have, in words: `requests>=3, and 2.31 is here`."""
    from packaging.requirements import InvalidRequirement, Requirement

    missing = []
    try:
        wanted = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    for text in wanted:
        try:
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            here = importlib.metadata.version(requirement.name)
        except InvalidRequirement:
            missing.append(f"{text!r}, which can't be read")
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{requirement}, which is not installed")
        else:
            if not requirement.specifier.contains(here, prereleases=True):
                missing.append(f"{requirement}, and {here} is installed")
    return missing


def show(rows: Iterable[dict[str, Any]], *, contract: bool = False) -> bool:
    """Print plugins, and what is to be known of each on stderr. Returns whether one is broken."""
    rows = list(rows)
    headers = ["PLUGIN", "DISTRIBUTION", "VERSION", "STATE", *(["CONTRACT"] if contract else []), "STEP TYPES"]
    cells = [
        [
            row["name"],
            row["distribution"],
            row["version"],
            state_of(row),
            *([row["contract"]] if contract else []),
            " ".join(row["step_types"]),
        ]
        for row in rows
    ]
    table(
        headers, cells, empty="there are no step plugins; install one, for example: pip install outrider-step-container"
    )
    broken = [row for row in rows if state_of(row) == "error"]
    for row in broken:
        fix = row.get("fix") or ""
        name = row["name"] or row["distribution"] or "?"
        note(f"{name}: {row['error'].removesuffix(f'; {fix}') if fix else row['error']}")
        if fix:
            note(f"  to mend it: {fix}")
    for row in rows:
        for each in row.get("notes") or ():
            note(f"{row['name'] or '?'}: {each}")
    return bool(broken)


def state_of(row: dict[str, Any]) -> str:
    """ok, error or disabled; nodes with an older agent only say whether it is ok."""
    return str(row.get("state") or ("ok" if row["ok"] else "error"))


def environment() -> dict[str, str]:
    """Where these plugins are."""
    from outrider import __version__
    from outrider.steps import CONTRACT

    return {
        "outrider": __version__,
        "contract": CONTRACT,
        "python": platform.python_version(),
        "environment": sys.prefix,
    }


def show_environment(probe: Probe) -> None:
    """Print where these plugins are, and what facts they state of this machine."""
    click.echo()
    fields([*environment().items(), *((f"fact {name}", str(value)) for name, value in sorted(probe.facts.items()))])


def _selected(file: Path | None, flags: dict[str, Any]) -> dict[str, Any]:
    from agent_core.config import ENV_PREFIX, PluginSettings

    settings = load_settings(PluginSettings, ENV_PREFIX, file, CONFIG_FILE, flags).value
    return {
        "enabled": settings.plugins,
        "disabled": settings.disabled_plugins,
        "limit_s": settings.plugin_limit_s,
    }
