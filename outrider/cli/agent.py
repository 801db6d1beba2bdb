"""`outrider agent`: the agent of this machine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from outrider.cli._agent_plugins import plugins
from outrider.cli._machine import How, install_options, this_command
from outrider.cli._main import DONE, FAILED
from outrider.cli._output import emit_json, fields, note, output_option, table
from outrider.cli._plugins import plugin_options
from outrider.cli._service import config_option, load_settings, run_until_signal, show_settings
from outrider.cli._values import pairs
from outrider.sdnotify import Notifier, serving, starting

if TYPE_CHECKING:
    from agent_core.config import AgentConfig
    from outrider.settings import Loaded

CONFIG_FILE = Path("/etc/outrider/agent.yaml")


@click.group("agent", help="The agent of a node: run, status, doctor, config, install, plugins.")
def command() -> None:
    """The agent."""


command.add_command(plugins)


def _options(function: Callable[..., Any]) -> Callable[..., Any]:
    path = click.Path(path_type=Path)
    for option in reversed(
        [
            config_option("OUTRIDER_AGENT_CONFIG", CONFIG_FILE),
            click.option("--server", metavar="HOST:PORT", help="The server to dial."),
            click.option("--node-id", help="Who this node is, as `outrider node add` was told."),
            click.option("--token-file", type=path, help="The file with the node's token."),
            click.option("--ca-file", type=path, help="The server's CA; without it, the system's."),
            click.option("--state-dir", type=path, help="Where the agent keeps journal, volumes and spool."),
            click.option("--policy-file", type=path, help="What this node allows; no server can change it."),
            click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label; repeatable."),
            *plugin_options,
            click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"])),
        ]
    ):
        function = option(function)
    return function


def _load(
    file: Path | None, labels: tuple[str, ...], plugins: tuple[str, ...], disabled: tuple[str, ...], **flags: Any
) -> Loaded[AgentConfig]:
    from agent_core.config import ENV_PREFIX, AgentConfig

    given = flags | {
        "labels": pairs(labels, "--label") or None,
        "plugins": list(plugins) or None,
        "disabled_plugins": list(disabled) or None,
    }
    return load_settings(AgentConfig, ENV_PREFIX, file, CONFIG_FILE, given)


@command.command("run")
@_options
def run(**flags: Any) -> None:
    """Run the agent until SIGTERM or SIGINT. Containers go on without it."""
    from agent_core.agent import Agent
    from agent_core.telemetry.logs import configure_logging

    config = _load(**flags).value
    configure_logging(config.log_level, config.log_format)
    notifier = Notifier.from_environment(os.environ)

    async def tell_when_connected(agent: Agent) -> None:
        await agent.connected.wait()
        notifier.connected(config.server)

    async def main(stop: asyncio.Event) -> None:
        agent = Agent(config)
        running = asyncio.create_task(agent.run())
        asked = asyncio.create_task(stop.wait())
        ready = asyncio.create_task(agent.ready.wait())
        async with starting(notifier, "opening the journal"):
            await asyncio.wait({running, asked, ready}, return_when=asyncio.FIRST_COMPLETED)
        if ready.done() and not running.done():
            notifier.connected("")
            telling = asyncio.create_task(tell_when_connected(agent))
            async with serving(notifier, agent.status_line):
                await asyncio.wait({running, asked}, return_when=asyncio.FIRST_COMPLETED)
            telling.cancel()
        asked.cancel()
        ready.cancel()
        agent.stop()
        await running

    run_until_signal(main)


@command.command("config")
@_options
@output_option
def config(as_json: bool, **flags: Any) -> None:
    """Print the effective settings and where each came from; secrets are not shown."""
    show_settings(_load(**flags), as_json)


@command.command("install")
@click.option("--server", metavar="HOST:PORT", help="The server to dial; needed once.")
@click.option("--node-id", help="Who this node is; by default, the machine's name.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label; repeatable.")
@click.option("--token-file", type=click.Path(path_type=Path), help="The node's token; `-` reads it from stdin.")
@click.option("--ca-file", type=click.Path(path_type=Path), help="The server's CA; without it, the system's.")
@install_options
def install(
    labels: tuple[str, ...],
    token_file: Path | None,
    ca_file: Path | None,
    how: How,
    as_json: bool,
    **given: Any,
) -> None:
    """Make the agent a service of this machine: its files in /etc/outrider, a unit of systemd, and its start.

    What is as it should be is left alone; so it can be repeated, with a new token for instance. A restart of the
    service stops no container.
    """
    from outrider.cli import _install
    from outrider.tls import read_ca

    if how.uninstall:
        keeps = ["/etc/outrider and the state directory stay, and containers go on"]
        _install.uninstall(_install.AGENT, keeps, dry_run=how.dry_run, as_json=as_json)
        return
    token = _install.read_secret(token_file)
    ca = read_ca(ca_file).decode("ascii") if ca_file else None
    given["labels"] = pairs(labels, "--label") or None
    _install.install(
        lambda: _install.plan_agent(given, token, ca, _install.Places(), how.command or this_command()),
        dry_run=how.dry_run,
        start=how.start,
        as_json=as_json,
    )


@command.command("status")
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    envvar="OUTRIDER_AGENT_STATE_DIR",
    default=Path("/var/lib/outrider"),
    show_default=True,
    help="The agent's state directory.",
)
@output_option
def status(state_dir: Path, as_json: bool) -> None:
    """Ask the agent that runs on this machine how it is; no server is needed."""
    from agent_core.status import read_status

    answer = read_status(state_dir)
    if as_json:
        emit_json(answer)
        return
    lists = {name: value for name, value in answer.items() if _is_table(value)}
    fields([(name.replace("_", " "), value) for name, value in _flat(answer) if name not in lists])
    for name, rows in lists.items():
        headers = list(dict.fromkeys(key for row in rows for key in row))
        click.echo()
        click.echo(f"{name.replace('_', ' ')}:")
        table(
            [header.replace("_", " ").upper() for header in headers],
            [[row.get(header) for header in headers] for row in rows],
            empty="",
        )


@command.command("doctor")
@_options
@output_option
def doctor(as_json: bool, **flags: Any) -> int:
    """Look at everything that the agent of this machine needs: settings, token, policy, disk, engine, server, plugins.

    Nothing is started or changed. The exit code is 1 if something is wrong.
    """
    from dataclasses import asdict

    from outrider.cli._agent_doctor import examine

    findings = list(examine(lambda: _load(**flags).value))
    if as_json:
        emit_json([asdict(each) for each in findings])
    else:
        table(("CHECK", "STATE", "WHAT"), [(each.what, each.state, each.says) for each in findings], empty="")
        for each in findings:
            if each.state != "ok" and each.fix:
                note(f"{each.what}: {each.fix}")
    return FAILED if any(each.state == "error" for each in findings) else DONE


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _flat(answer: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as rows of their own: ``engine: {ok: …}`` is ``engine ok``."""
    rows: list[tuple[str, Any]] = []
    for name, value in answer.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name} ")
        else:
            rows.append((f"{prefix}{name}", value))
    return rows
