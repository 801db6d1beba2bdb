"""What `agent doctor` looks at: everything that an agent of this machine needs, without starting or changing one."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import ssl
import stat
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from outrider.cli import _plugins
from outrider.cli._output import size
from outrider.errors import OutriderError, Unavailable

if TYPE_CHECKING:
    from agent_core.config import AgentConfig
    from agent_core.policy import NodePolicy

OLDEST_ENGINE = (20, 10)
_ANSWER_S = 10.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. ``warning``: an agent works all the same."""

    what: str
    state: Literal["ok", "warning", "error"]
    says: str
    fix: str = ""


def examine(load: Callable[[], AgentConfig]) -> Iterator[Finding]:
    """Look at one thing after the other; ``load`` gives the settings. Raises nothing for what is wrong."""
    try:
        config = load()
    except OutriderError as error:
        yield _wrong("settings", error)
        return
    yield Finding("settings", "ok", f"node {config.node_id}, server {config.server}")
    yield from _token(config)
    policy = yield from _policy(config)
    yield from _state_dir(config, policy)
    yield _engine(config)
    yield _server(config)
    yield from _step_plugins(config)


def _wrong(what: str, error: OutriderError) -> Finding:
    return Finding(what, "error", error.message, error.hint)


def _token(config: AgentConfig) -> Iterator[Finding]:
    from outrider.tls import check_token

    try:
        check_token(config.read_token())
    except OutriderError as error:
        yield _wrong("token", error)
        return
    path = config.token_file
    if path is not None and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        yield Finding("token", "warning", f"{path} can be read by others than its owner", f"chmod 600 {path}")
        return
    yield Finding("token", "ok", f"in {path}" if path is not None else "there")


def _policy(config: AgentConfig) -> Generator[Finding, None, NodePolicy]:
    """Gives back the policy, or the default one where it can't be read."""
    from agent_core.policy import NodePolicy

    try:
        policy = NodePolicy.load(config.policy_file)
    except OutriderError as error:
        yield _wrong("policy", error)
        return NodePolicy()
    yield Finding("policy", "ok", f"{config.policy_file or 'the default one: no policy_file is set'}")
    return policy


def _state_dir(config: AgentConfig, policy: NodePolicy) -> Iterator[Finding]:
    from agent_core.status import read_status

    directory = config.state_dir
    there = next((each for each in (directory, *directory.parents) if each.exists()), Path("/"))
    if not there.is_dir():
        yield Finding("state", "error", f"{there} is not a directory", "give another state_dir")
        return
    if not os.access(there, os.W_OK | os.X_OK):
        yield Finding("state", "error", f"{there} can't be written by this user", "run the agent as root")
        return
    try:
        status = read_status(directory)
    except Unavailable:
        yield Finding("agent", "warning", f"none runs on {directory}", "outrider agent run, or agent install")
    else:
        server = status["server"]
        if server["connected"]:
            yield Finding("agent", "ok", f"process {status['pid']}, connected to {server['address']}")
        else:
            reason = f": {server['error']}" if server["error"] else ""
            fix = "look at what is said of token and server here"
            yield Finding(
                "agent", "warning", f"process {status['pid']}, not connected to {server['address']}{reason}", fix
            )
    free = shutil.disk_usage(there).free
    says = f"{directory}, {size(free)} free"
    if free < policy.disk_reserve_bytes:
        fix = f"make room: {size(policy.disk_reserve_bytes)} are kept free (disk_reserve_bytes of the policy)"
        yield Finding("disk", "error", f"{says}: no volume would be allotted", fix)
    else:
        yield Finding("disk", "ok", says)


def _engine(config: AgentConfig) -> Finding:
    from agent_core.agent import load_runtime

    async def ask() -> tuple[str, str, str]:
        runtime = load_runtime(config.runtime, config.engine_socket)
        try:
            async with asyncio.timeout(_ANSWER_S):
                info = await runtime.info()
            return info.name, info.version, info.root
        finally:
            await runtime.aclose()

    try:
        name, version, root = asyncio.run(ask())
    except TimeoutError:
        return Finding("engine", "error", f"it does not answer within {_ANSWER_S:g} s", "look at its log")
    except OutriderError as error:
        return Finding("engine", "error", error.message, error.hint or "start it; then the agent goes on by itself")
    numbers = tuple(int(each) for each in re.findall(r"\d+", version)[:2])
    if name == "docker" and numbers < OLDEST_ENGINE:
        return Finding("engine", "error", f"{name} {version} is too old", "upgrade it to 20.10 or newer")
    return Finding("engine", "ok", f"{name} {version}, data in {root}")


def _server(config: AgentConfig) -> Finding:
    """Reach it and check its certificate; not more, because a registration would throw the running agent out."""
    from outrider.tls import parse_server, read_ca

    try:
        host, port = parse_server(config.server)
        authorities = read_ca(config.ca_file).decode("ascii") if config.ca_file is not None else None
    except OutriderError as error:
        return _wrong("server", error)
    context = ssl.create_default_context(cadata=authorities)
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), _ANSWER_S) as connection,
            context.wrap_socket(connection, server_hostname=config.server_name or host) as secured,
        ):
            certificate = secured.getpeercert() or {}
    except ssl.SSLCertVerificationError as error:
        fix = (
            "ca_file is to be the server's CA (tls/ca.pem of its data directory), server_name a name in its certificate"
        )
        return Finding("server", "error", f"{config.server}: its certificate is not good: {error.verify_message}", fix)
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        fix = "is it running, and does this machine's firewall let the agent out? runs go on without it meanwhile"
        return Finding("server", "error", f"{config.server} can't be reached: {reason}", fix)
    return Finding("server", "ok", f"{config.server}, its certificate is good until {certificate.get('notAfter', '?')}")


def _step_plugins(config: AgentConfig) -> Iterator[Finding]:
    chosen = {"enabled": config.plugins, "disabled": config.disabled_plugins, "limit_s": config.plugin_limit_s}
    rows = _plugins.as_rows(_plugins.look(lambda: chosen), closely=True)
    good = [row["name"] for row in rows if row["state"] == "ok"]
    if good:
        yield Finding("plugins", "ok", " ".join(good))
    else:
        fix = "install step plugins into this environment, for example: pip install outrider-step-container"
        yield Finding("plugins", "error", "this node would have no step type", fix)
    for row in rows:
        if row["state"] == "error":
            reason = row["error"].removesuffix(f"; {row['fix']}") if row["fix"] else row["error"]
            yield Finding("plugin", "error", reason, row["fix"])
