"""`outrider agent plugins`: the environment of this machine's agent, made from the node's role."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from outrider.cli._output import emit_json, note, output_option, table
from outrider.cli._service import config_option, load_settings
from outrider.errors import Conflict, InvalidInput, NotFound

if TYPE_CHECKING:
    from agent_core.config import AgentConfig
    from outrider.cli._environments import Environments, Wanted
    from outrider.v1 import node_service_pb2 as pb

CONFIG_FILE = Path("/etc/outrider/agent.yaml")
_ASK_S = 30.0


@click.group("plugins", help="The plugins of this machine's agent, by the node's role: sync, list, back.")
def plugins() -> None:
    """The agent's plugins."""


def _options(function: Callable[..., Any]) -> Callable[..., Any]:
    path = click.Path(path_type=Path)
    for option in reversed(
        [
            config_option("OUTRIDER_AGENT_CONFIG", CONFIG_FILE),
            click.option("--server", metavar="HOST:PORT", help="The server to ask."),
            click.option("--node-id", help="Who this node is."),
            click.option("--token-file", type=path, help="The file with the node's token."),
            click.option("--ca-file", type=path, help="The server's CA; without it, the system's."),
            click.option("--state-dir", type=path, help="The agent's state directory."),
        ]
    ):
        function = option(function)
    return function


@plugins.command("sync")
@_options
@click.option("--role", help="Refuse if the server gives the node another role than this.")
@click.option(
    "--find-links",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Take packages from this directory of wheels, and ask no index unless --index-url is given.",
)
@click.option("--index-url", metavar="URL", help="Take packages from this index instead of the tool's own.")
@click.option("--dry-run", is_flag=True, help="Only say what would change.")
@click.option("--detach", "-d", is_flag=True, help="Don't wait until the new environment has shown that it is well.")
@output_option
def sync(
    role: str | None,
    find_links: Path | None,
    index_url: str | None,
    dry_run: bool,
    detach: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Make the agent's environment what the node's role says, and restart the agent in it.

    A whole new environment is made from the role's lock and checked; only then the agent is restarted, and adopts what
    runs. If it does not get well in the new environment, the launcher goes back to the former one by itself.
    """
    from outrider.cli._environments import Environments, Source, Wanted, base_python
    from outrider.roles import make_role

    file = flags["file"]
    config = load(file, **{name: value for name, value in flags.items() if name != "file"})
    found = _ask(config, file)
    definition = _chosen(found, role, config.node_id)
    wanted = Wanted(
        make_role(
            {
                "name": definition.name,
                "description": definition.description,
                "agent": definition.agent,
                "plugins": {each.distribution: each.versions for each in definition.plugins},
            }
        ),
        definition.version,
        definition.lock.decode("ascii"),
        base_python(),
    )
    home = _home(config)
    settings = ["--state-dir", str(config.state_dir), "--node-id", config.node_id]
    environments = Environments(home, settings, os.environ, note, file)
    if dry_run:
        _tell_plan(environments, wanted, as_json)
        return
    with environments.held():
        name = environments.make(wanted, Source(find_links, index_url))
        current = environments.switch(name, wait=not detach)
        removed = environments.prune() if current else []
    if as_json:
        emit_json({"environment": name, "current": current, "role": wanted.role.name, "removed": removed})
    elif current:
        note(f"node {config.node_id} runs in {name}")


@plugins.command("list")
@_options
@output_option
def list_(as_json: bool, **flags: Any) -> None:
    """List the environments of this machine's agent: current, former, on trial, refused."""
    from outrider import launcher

    config = load(flags["file"], **{name: value for name, value in flags.items() if name != "file"})
    environments = _environments(config)
    state = environments.state()
    found = environments.home.glob(f"*/{launcher.ABOUT}")
    names = {path.parent.name for path in found if not path.parent.is_symlink()}
    rows = []
    for name in ("", *sorted(names)):
        about = environments.about(name) if name else {}
        rows.append(
            {
                "environment": name or state.get("initial") or "that of the installation",
                "state": _state_of(name, state),
                "role": about.get("role", ""),
                "role_version": about.get("role_version", 0),
                "packages": len(about.get("packages", {})),
                "made_at": _moment(about.get("made_at")),
            }
        )
    if as_json:
        emit_json({"launcher_pid": launcher.running(environments.home), "environments": rows})
        return
    headers = ("ENVIRONMENT", "STATE", "ROLE", "ROLE VERSION", "PACKAGES", "MADE")
    table(headers, [[value or "" for value in row.values()] for row in rows], empty="")
    trial, refused = state.get("trial") or {}, state.get("refused") or {}
    if trial.get("waits"):
        note(f"{launcher.spoken(trial['environment'])} is on trial: {trial['waits']}")
    if refused:
        note(f"{refused['environment']} was tried and left again: {refused['reason']}")


@plugins.command("back")
@_options
@output_option
def back(as_json: bool, **flags: Any) -> None:
    """Restart the agent in the former environment, or end a trial. `sync` goes forward again."""
    from outrider import launcher

    config = load(flags["file"], **{name: value for name, value in flags.items() if name != "file"})
    environments = _environments(config)
    state = environments.state()
    former = state.get("current", "") if state.get("trial") else state.get("former")
    if former is None:
        raise NotFound("there is no former environment to go back to", code="no_former")
    with environments.held():
        current = environments.switch(former)
    if as_json:
        emit_json({"environment": former, "current": current})
    elif current:
        note(f"the agent runs in {launcher.spoken(former)}")


def load(file: Path | None, **flags: Any) -> AgentConfig:
    """The agent's settings, as `outrider agent run` would have them."""
    from agent_core.config import ENV_PREFIX, AgentConfig

    return load_settings(AgentConfig, ENV_PREFIX, file, CONFIG_FILE, flags).value


def _home(config: AgentConfig) -> Path:
    from agent_core.environment import DIRECTORY

    return config.state_dir / DIRECTORY


def _environments(config: AgentConfig) -> Environments:
    from outrider.cli._environments import Environments

    return Environments(_home(config))


def _ask(config: AgentConfig, file: Path | None) -> pb.OwnRole:
    """What the server says of this node's role, asked with the node's own token."""
    from outrider.tls import Identity, open_channel, read_ca
    from outrider.v1 import node_service_pb2 as pb
    from outrider.v1 import node_service_pb2_grpc as pb_grpc

    token = _token(config, file)
    ca = read_ca(config.ca_file) if config.ca_file else None

    async def ask() -> pb.OwnRole:
        import grpc

        from outrider.wire import from_rpc_error

        identity = Identity(token=token, node_id=config.node_id)
        async with open_channel(config.server, ca=ca, identity=identity, server_name=config.server_name) as channel:
            stub: Any = pb_grpc.NodeServiceStub(channel)
            try:
                answer: pb.OwnRole = await stub.GetOwnRole(pb.GetOwnRoleRequest(), timeout=_ASK_S)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error, target=config.server) from error
            return answer

    return asyncio.run(ask())


def _token(config: AgentConfig, file: Path | None) -> str:
    """The node's token; where it is handed to the service by systemd, it stands beside the settings."""
    beside = (file or CONFIG_FILE).with_name("token")
    named = config.token is not None or config.token_file is not None or "CREDENTIALS_DIRECTORY" in os.environ
    if not named and beside.is_file():
        config = config.model_copy(update={"token_file": beside})
    return config.read_token()


def _chosen(found: pb.OwnRole, role: str | None, node_id: str) -> Any:
    """The role's definition. Raises Conflict, InvalidInput, NotFound with what would be right."""
    if role is not None and role != found.role:
        has = f"has the role {found.role}" if found.role else "has no role"
        raise Conflict(
            f"node {node_id} {has} at the server, not {role}",
            code="other_role",
            hint=f"outrider node role assign {node_id} {role}",
        )
    if not found.role:
        raise InvalidInput(
            f"node {node_id} has no role at the server",
            code="no_role",
            hint=f"outrider node role assign {node_id} ROLE",
        )
    if not found.HasField("definition"):
        raise NotFound(
            f"the server has no node role {found.role}", code="unknown_node_role", hint="outrider node role set FILE"
        )
    return found.definition


def _tell_plan(environments: Environments, wanted: Wanted, as_json: bool) -> None:
    from outrider.roles import read_lock

    name, current = wanted.name, environments.state().get("current", "")
    have: dict[str, str] = environments.about(current).get("packages", {}) if current else {}
    want = {package: versions[0] for package, versions in read_lock(wanted.lock).items()}
    changes = [
        {"package": package, "now": have.get(package, ""), "then": want.get(package, "")}
        for package in sorted(have.keys() | want.keys())
        if have.get(package) != want.get(package)
    ]
    if as_json:
        emit_json({"environment": name, "current": current == name, "changes": [] if current == name else changes})
    elif current == name:
        note(f"{name} is the current environment: nothing to do")
    else:
        table(("PACKAGE", "NOW", "THEN"), [tuple(each.values()) for each in changes], empty="no package changes")
        note(f"the environment {name} would be {'tried' if environments.about(name) else 'made'}")


def _state_of(name: str, state: dict[str, Any]) -> str:
    words = [word for word in ("current", "former") if state.get(word, "" if word == "current" else None) == name]
    words += ["on trial"] if (state.get("trial") or {}).get("environment") == name else []
    words += ["refused"] if (state.get("refused") or {}).get("environment") == name else []
    return ", ".join(words)


def _moment(seconds: Any) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S") if isinstance(seconds, int) else ""
