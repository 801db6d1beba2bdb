"""`outrider agent install` and `outrider server install`: what a service of this machine takes, and its removal."""

from __future__ import annotations

import contextlib
import re
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

import outrider
from outrider import launcher, settings
from outrider.cli._machine import (
    HIDDEN_BY_HOME,
    HIDDEN_BY_TMP,
    UNIT_DIR,
    Plan,
    Unit,
    beneath,
    check_systemd,
    may_read,
    needs_root,
    systemctl,
)
from outrider.cli._output import emit_json, note
from outrider.errors import Conflict, InvalidInput

if TYPE_CHECKING:
    from pydantic import BaseModel

AGENT, SERVER = "outrider-agent.service", "outrider-server.service"
SERVER_USER = "outrider-server"
_HEADER = "# Written by `outrider {part} install`, and left alone from then on: change what you like.\n"


@dataclass(frozen=True, slots=True)
class Places:
    """Where a service's files go, and where none may be; tests have places of their own."""

    etc: Path = Path("/etc/outrider")
    units: Path = UNIT_DIR
    lib: Path = Path("/usr/local/lib/outrider")
    temporary: Sequence[Path] = HIDDEN_BY_TMP


def plan_agent(
    given: Mapping[str, Any], token: str | None, ca: str | None, places: Places, command: Path
) -> tuple[Plan, Unit]:
    """What an agent's service still lacks. ``given``: the settings from flags, None where a flag was not given.

    Raises InvalidInput for settings that can't work, Conflict where they are not those of the file that is there.
    """
    from agent_core.config import AgentConfig
    from agent_core.environment import DIRECTORY

    plan, unit = Plan(), Unit(AGENT, places.units)
    unit.check_ours(_template(AGENT))
    program = places.lib / "launcher.py"
    file, token_path, ca_path = (places.etc / name for name in ("agent.yaml", "token", "ca.pem"))
    there = _read(file, AgentConfig)
    if there is None:
        if not given.get("server"):
            raise InvalidInput(
                f"say which server to dial: there is no {file} yet", code="server_missing", hint="--server HOST:PORT"
            )
        wanted = {"server": given["server"], "node_id": given.get("node_id") or socket.gethostname().lower()}
        if ca is not None:
            wanted["ca_file"] = str(ca_path)
        if given.get("labels"):
            wanted["labels"] = dict(given["labels"])
        config = settings.load(AgentConfig, env_prefix="", environ={}, flags=wanted).value
        plan.file(file, _HEADER.format(part="agent") + yaml.safe_dump(wanted, sort_keys=False), 0o644)
    else:
        config = there
        _same(file, there, given)
    if ca is not None and config.ca_file is None:
        raise Conflict(f"{file} names no ca_file", code="config_differs", hint=f"write `ca_file: {ca_path}` into it")
    if ca is not None:
        plan.file(config.ca_file or ca_path, ca, 0o644)
    source = config.token_file or token_path
    if token is not None:
        if config.token is not None:
            raise Conflict(f"{file} has a token of its own", code="config_differs", hint="remove it from there")
        plan.file(source, token + "\n", 0o600, secret=True)
    elif config.token is None and not _exists(source):
        plan.missing.append(
            f"the token is missing: `outrider node add {config.node_id}` prints it; put it into {source} (mode 0600),"
            " or give it with --token-file"
        )
    paths = [config.state_dir, source, *filter(None, (config.ca_file, config.policy_file, config.engine_socket))]
    command = _initial(command, config.state_dir, unit)
    plan.file(program, Path(launcher.__file__).read_text(encoding="utf-8"), 0o755)
    start = [_plain(_system_python()), "-IS", _plain(program), "--environments", _plain(config.state_dir / DIRECTORY)]
    start += ["--initial", _plain(command), "--", *_run(command, "agent", file).split()[1:]]
    replaced: dict[str, str | None] = {"ExecStart": " ".join(start)}
    replaced["LoadCredential"] = f"token:{_plain(source)}" if config.token is None else None
    if config.state_dir != Path("/var/lib/outrider"):
        plan.directory(config.state_dir, 0o711)
        replaced |= {"StateDirectory": None, "StateDirectoryMode": None}
        replaced["ReadWritePaths"] = _plain(config.state_dir)
    _add_unit(plan, unit, replaced, [*paths, program, *_program(command)], places)
    return plan, unit


def plan_server(given: Mapping[str, Any], places: Places, command: Path) -> tuple[Plan, Unit]:
    """What a server's service still lacks. Raises as `plan_agent`."""
    from server_core.config import ServerConfig

    plan, unit = Plan(), Unit(SERVER, places.units)
    unit.check_ours(_template(SERVER))
    file = places.etc / "server.yaml"
    there = _read(file, ServerConfig)
    if there is None:
        wanted = {name: list(value) if name == "names" else str(value) for name, value in given.items() if value}
        config = settings.load(ServerConfig, env_prefix="", environ={}, flags=wanted).value
        body = yaml.safe_dump(wanted, sort_keys=False) if wanted else ""
        plan.file(file, _HEADER.format(part="server") + body, 0o644)
    else:
        config = there
        _same(file, there, given)
    plan.user(SERVER_USER, config.data_dir)
    plan.directory(config.data_dir, 0o700, SERVER_USER)
    if not _exists(config.store_file):
        plan.missing.append(
            "the server is not initialised: `outrider server init --write-context NAME` does that and prints the"
            f" operator's token; then `systemctl start {SERVER}`"
        )
    for path in filter(None, (config.tls_cert_file, config.tls_key_file, config.master_key_file)):
        if not may_read(path, SERVER_USER):
            raise InvalidInput(
                f"the server runs as the user {SERVER_USER}, which can't read {path}",
                code="not_readable",
                hint=f"let {SERVER_USER} own it, or put it where that user may read",
            )
    program = _program(command)
    for path in program:
        if not may_read(path, SERVER_USER):
            raise InvalidInput(
                f"the server runs as the user {SERVER_USER}, which can't reach {path}",
                code="not_readable",
                hint="install Outrider where everybody may read, into /opt/outrider for instance",
            )
    replaced: dict[str, str | None] = {"ExecStart": _run(command, "server", file)}
    if config.data_dir != Path("/var/lib/outrider-server"):
        replaced |= {"StateDirectory": None, "StateDirectoryMode": None}
        replaced["ReadWritePaths"] = _plain(config.data_dir)
    if int(config.listen.rpartition(":")[2]) in range(1, 1024):
        replaced |= dict.fromkeys(("AmbientCapabilities", "CapabilityBoundingSet"), "CAP_NET_BIND_SERVICE")
        replaced["PrivateUsers"] = None  # a capability in a user namespace of its own opens no port of the machine
    paths = [config.data_dir, *filter(None, (config.tls_cert_file, config.tls_key_file, config.master_key_file))]
    _add_unit(plan, unit, replaced, [*paths, *program], places)
    return plan, unit


def install(make: Callable[[], tuple[Plan, Unit]], *, dry_run: bool, start: bool, as_json: bool) -> None:
    """Make a plan and carry it out, or only show it."""
    if not dry_run:
        check_systemd()
    plan, unit = make()
    plan.service(unit, start=start)
    if not dry_run:
        plan.carry_out()
    _tell(plan, unit, as_json, dry_run=dry_run)


def uninstall(name: str, keeps: Sequence[str], *, dry_run: bool, as_json: bool, units: Path = UNIT_DIR) -> None:
    """Stop the service and remove its unit. What it wrote, and what it was given, stays."""
    plan, unit = Plan(), Unit(name, units)
    unit.check_ours(_template(name))
    if not dry_run:
        check_systemd()
    if unit.path.exists():
        plan.add(f"stop and disable {name}", lambda: systemctl("disable", "--now", name))
        plan.add(f"remove {unit.path}", unit.path.unlink)
        plan.add("let systemd know", lambda: systemctl("daemon-reload"))
        plan.notes += keeps
    if not dry_run:
        plan.carry_out()
    _tell(plan, unit, as_json, dry_run=dry_run)


def read_secret(path: Path | None) -> str | None:
    """A node's token from a file, or from stdin ("-"). Raises InvalidInput if it can't be one."""
    if path is None:
        return None
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the token can't be read from {path}: {error}", code="token_unreadable") from error
    token = text.strip()
    if token.startswith("oro_"):
        raise InvalidInput(
            "this is an operator's token", code="wrong_token", hint="`outrider node add` prints a node's"
        )
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise InvalidInput(
            f"{path} holds no token", code="wrong_token", hint="it is one word, as `outrider node add` prints"
        )
    return token


def render(name: str, replaced: Mapping[str, str | None]) -> str:
    """A unit as shipped, but for these settings of [Service]: None leaves one out, a new one follows ExecStart."""
    lines: list[str] = []
    known = set()
    for line in _template(name).splitlines():
        key = line.partition("=")[0]
        if key not in replaced:
            lines.append(line)
            continue
        known.add(key)
        value = replaced[key]
        if value is not None:
            lines.append(f"{key}={value}")
    new = [f"{key}={value}" for key, value in replaced.items() if key not in known and value is not None]
    at = next(number for number, line in enumerate(lines) if line.startswith("ExecStart=")) + 1
    return "\n".join(lines[:at] + new + lines[at:]) + "\n"


def _add_unit(plan: Plan, unit: Unit, replaced: dict[str, str | None], paths: Sequence[Path], places: Places) -> None:
    """``paths``: all that the service must be able to reach."""
    for path in paths:
        if beneath(path, places.temporary):
            raise InvalidInput(
                f"{path} lies where other programs put what is temporary, and the service has a /tmp of its own",
                code="path_hidden",
                hint="put it beneath /etc, /opt or /var/lib",
            )
    at_home = [path for path in paths if beneath(path, HIDDEN_BY_HOME)]
    if at_home:
        replaced["ProtectHome"] = "read-only"
        plan.notes.append(f"{at_home[0]} lies in somebody's home: the service may therefore read all homes")
    plan.file(unit.path, render(unit.name, replaced), 0o644)


def _template(name: str) -> str:
    return (files("outrider.cli") / "systemd" / name).read_text(encoding="utf-8")


def _read(file: Path, model: type[Any]) -> Any:
    return settings.load(model, env_prefix="", environ={}, file=file).value if _exists(file) else None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError as error:
        raise needs_root() from error


def _same(file: Path, config: BaseModel, given: Mapping[str, Any]) -> None:
    """Raise Conflict where a flag says something else than the file, which is a person's."""
    have = config.model_dump()
    wrong = [name for name, value in given.items() if value and have[name] != value]
    if wrong:
        raise Conflict(
            f"{file} is there and says otherwise: {', '.join(f'{name} is {have[name]!s}' for name in wrong)}",
            code="config_differs",
            hint="change it there, or leave the flag out",
        )


def _program(command: Path) -> list[Path]:
    return [command.resolve(), Path(sys.prefix), Path(sys.base_prefix), Path(outrider.__file__).parent]


def _system_python() -> Path:
    """The interpreter of the launcher: one that outlives every environment, and upgrades of the system."""
    public = Path("/usr/bin/python3")
    return public if public.exists() else Path(getattr(sys, "_base_executable", sys.executable)).resolve()


def _initial(command: Path, state_dir: Path, unit: Unit) -> Path:
    """The program of the installation. Raises Conflict where only one is known that may be removed."""
    from agent_core.environment import DIRECTORY

    home = state_dir / DIRECTORY
    if not beneath(command, [home]):
        return command
    with contextlib.suppress(OSError):
        found = re.search(r" --initial (\S+) ", unit.path.read_text(encoding="utf-8"))
        if found:
            return Path(found[1])
    raise Conflict(
        f"{command} is in an environment that the launcher keeps, and may remove",
        code="command_in_environment",
        hint="give the program that stays with --command",
    )


def _run(command: Path, part: str, file: Path) -> str:
    flag = "" if file == Path(f"/etc/outrider/{part}.yaml") else f" --config {_plain(file)}"
    return f"{_plain(command)} {part} run{flag}"


def _plain(path: Path) -> str:
    """A path that stands in a unit as it is. Raises InvalidInput where systemd would read something else in it."""
    if re.fullmatch(r"[\w./+@:-]+", str(path), re.ASCII):
        return str(path)
    raise InvalidInput(
        f"the path {str(path)!r} can't stand in a unit of systemd",
        code="path_not_plain",
        hint="use letters, digits and . _ - + @ : alone",
    )


def _tell(plan: Plan, unit: Unit, as_json: bool, *, dry_run: bool) -> None:
    if as_json:
        emit_json(
            {
                "unit": unit.name,
                "dry_run": dry_run,
                "changes": [change.words for change in plan.changes],
                "missing": plan.missing,
                "notes": plan.notes,
            }
        )
        return
    for change in plan.changes:
        click.echo(change.words if not dry_run else f"would {change.words}")
        if dry_run and change.content:
            click.echo("".join(f"    {line}\n" for line in change.content.splitlines()), nl=False)
    if not plan.changes:
        click.echo(f"{unit.name}: nothing to do")
    for text in (*plan.missing, *plan.notes):
        note(text)
