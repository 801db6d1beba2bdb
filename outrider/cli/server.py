"""`outrider server`: the server as a process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from outrider.cli._machine import How, install_options, this_command
from outrider.cli._main import App, say_error
from outrider.cli._output import emit_json, note, output_option, size
from outrider.cli._service import (
    act_as_owner,
    check_port,
    config_option,
    load_settings,
    run_until_signal,
    show_settings,
)
from outrider.errors import InvalidInput, OutriderError
from outrider.sdnotify import Notifier, serving, starting

if TYPE_CHECKING:
    from outrider.cli._context import ContextFile
    from outrider.settings import Loaded
    from server_core.config import ServerConfig
    from server_core.server import Server

CONFIG_FILE = Path("/etc/outrider/server.yaml")
STOP_GRACE_S = 10.0


@click.group("server", help="The server: init, run, backup, restore, config, install.")
def command() -> None:
    """The server."""


def _options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        [
            config_option("OUTRIDER_SERVER_CONFIG", CONFIG_FILE),
            click.option("--data-dir", type=click.Path(path_type=Path), help="Where the server keeps everything."),
            click.option("--listen", metavar="HOST:PORT", help="Where to listen; port 0 takes a free one."),
            click.option("--name", "names", multiple=True, help="A further name or address for the certificate."),
            click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"])),
        ]
    ):
        function = option(function)
    return function


def _load(file: Path | None, names: tuple[str, ...], **flags: Any) -> Loaded[ServerConfig]:
    from server_core.config import ENV_PREFIX, ServerConfig

    return load_settings(ServerConfig, ENV_PREFIX, file, CONFIG_FILE, flags | {"names": names or None})


@command.command("init")
@_options
@click.option("--write-context", metavar="NAME", help="Write a context of this name, so that `outrider` finds it.")
@click.option("--new-token", is_flag=True, help="Replace the first operator's token of a server that is there.")
@output_option
@click.pass_obj
def init(app: App, /, write_context: str | None, new_token: bool, as_json: bool, **flags: Any) -> None:
    """Make the store, the keys and the CA, and print the first operator's token, which is shown only this once."""
    from server_core.server import init as make

    config = _load(**flags).value
    contexts = _context_file(app, write_context, config) if write_context else None
    with act_as_owner(config.data_dir):
        made = asyncio.run(make(config, new_token=new_token))
    if contexts is not None and write_context:
        entry = {"server": _address(config), "ca": str(made.ca_path.resolve()), "token": made.admin_token}
        contexts.put(write_context, entry, make_current=False)
        note(f"context {write_context!r} is in {contexts.path}")
    if as_json:
        emit_json({"data_dir": str(config.data_dir), "ca": str(made.ca_path), "token": made.admin_token})
        return
    click.echo(made.admin_token)
    note(f"the server in {config.data_dir} is ready; its CA is {made.ca_path}, the operator's token stands above")
    note(f"start it with: {_start_command(config, **flags)}")


def _start_command(config: ServerConfig, file: Path | None, names: tuple[str, ...], **flags: Any) -> str:
    """`outrider server run` with what was given here, and where the data lies in any case."""
    given: list[tuple[str, object]] = [("--config", file)]
    given += [("--data-dir", config.data_dir), ("--listen", flags["listen"]), *(("--name", each) for each in names)]
    words = [str(word) for option, value in given if value is not None for word in (option, value)]
    return shlex.join(["outrider", "server", "run", *words])


def _context_file(app: App, name: str, config: ServerConfig) -> ContextFile:
    """The file that gets the context. Raises Conflict if it has one of this name for another server."""
    from outrider.cli._context import ContextFile, locate
    from outrider.errors import Conflict

    path, _ = locate(os.environ, app.context)
    contexts = ContextFile(path)
    there = contexts.contexts.get(name)
    if there is not None and there.get("server") != _address(config):
        raise Conflict(f"the context {name!r} in {path} is for {there.get('server')}", hint="choose another name")
    return contexts


def _address(config: ServerConfig) -> str:
    host, _, port = config.listen.rpartition(":")
    return f"{'localhost' if host in ('0.0.0.0', '[::]', '') else host}:{port}"


@command.command("run")
@_options
def run(**flags: Any) -> None:
    """Run the server until SIGTERM or SIGINT; SIGHUP lets it read its certificate anew."""
    config = _load(**flags).value
    check_port(config.listen)
    from agent_core.telemetry.logs import configure_logging
    from server_core.server import Server

    configure_logging(config.log_level)
    notifier = Notifier.from_environment(os.environ)

    async def main(stop: asyncio.Event) -> None:
        server = Server(config)
        async with starting(notifier, "opening the store"):
            await server.start()
        try:
            note(f"the server listens on port {server.port}")
            async with serving(notifier, server.status_line), _renewing(server, notifier):
                await stop.wait()
            note("stopping")
        finally:
            await server.stop(STOP_GRACE_S)

    run_until_signal(main)


@contextlib.asynccontextmanager
async def _renewing(server: Server, notifier: Notifier) -> AsyncIterator[None]:
    """Serve with the certificate that is on the disk whenever SIGHUP comes."""
    asked = asyncio.Event()

    async def renew() -> None:
        while True:
            await asked.wait()
            asked.clear()
            notifier.reloading()
            try:
                if not await server.renew_certificate():
                    note("the certificate is the one that is served already")
            except OutriderError as error:
                # What was served before still is: a wrong file must not end a server that works.
                say_error(f"the certificate is not read anew: {error}")
            notifier.ready()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, asked.set)
    task = asyncio.create_task(renew(), name="renewal")
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@command.command("config")
@_options
@output_option
def config(as_json: bool, **flags: Any) -> None:
    """Print the effective settings and where each came from."""
    show_settings(_load(**flags), as_json)


_passphrase_option = click.option(
    "--passphrase-file",
    type=click.Path(path_type=Path),
    help="A file with the passphrase that guards the keys in the backup; - for stdin.",
)


@command.command("backup")
@click.argument("target", metavar="FILE", type=click.Path(path_type=Path))
@_options
@_passphrase_option
@output_option
def backup(target: Path, passphrase_file: Path | None, as_json: bool, **flags: Any) -> None:
    """Write a backup to FILE; the server may be running.

    With a passphrase it holds everything that another machine needs to take over. Without one it holds neither the
    master key nor the key of the CA, and is of use only together with them.
    """
    from server_core import backup as backups

    config = _load(**flags).value
    made = backups.make(
        config,
        target,
        passphrase=_passphrase(passphrase_file),
        as_owner=lambda: act_as_owner(config.data_dir),
    )
    if as_json:
        emit_json({"file": str(target), "bytes": target.stat().st_size, "schema": made.schema, "keys": bool(made.kdf)})
        return
    click.echo(str(target))
    note(f"the backup has {size(target.stat().st_size)}; it was checked and is whole")
    if made.kdf is None:
        keys = f"{config.key_file} and {config.ca_file.with_name('ca.key')}"
        note(f"it holds no keys: keep {keys} elsewhere, or give --passphrase-file and they are in it, encrypted")


@command.command("restore")
@click.argument("target", metavar="FILE", type=click.Path(path_type=Path))
@_options
@_passphrase_option
@click.option("--replace", is_flag=True, help="Put the server that is there aside.")
@output_option
def restore(target: Path, passphrase_file: Path | None, replace: bool, as_json: bool, **flags: Any) -> None:
    """Make the data directory the server of the backup FILE. No server may run on it."""
    from server_core.restore import restore as make

    config = _load(**flags).value
    passphrase = _passphrase(passphrase_file)
    try:
        source = target.open("rb")
    except OSError as error:
        raise InvalidInput(f"{target} can't be read: {error.strerror}", code="file_unreadable") from error
    with source, act_as_owner(config.data_dir):
        made = make(config, source, passphrase=passphrase, replace=replace)
    taken = made.manifest.made_at.strftime("%Y-%m-%d %H:%M:%S UTC")
    if as_json:
        replaced = None if made.replaced is None else str(made.replaced)
        unknown = list(made.unknown_runs)
        emit_json({"data_dir": str(config.data_dir), "made_at": taken, "replaced": replaced, "unknown_runs": unknown})
        return
    note(f"the server in {config.data_dir} is as it was at {taken}; agents register anew and say what they hold")
    if made.replaced is not None:
        note(f"what was there before is in {made.replaced}")
    if made.unknown_runs:
        note(f"{len(made.unknown_runs)} runs are unknown now, because the backup is too old to send them again")


def _passphrase(file: Path | None) -> bytes | None:
    """The first line of the file. Raises InvalidInput if it can't be read."""
    if file is None:
        return None
    from outrider.cli._files import read_bytes

    lines = read_bytes(file, at_most=1024 * 1024).splitlines()
    return lines[0] if lines else b""


@command.command("install")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where the server keeps everything.")
@click.option("--listen", metavar="HOST:PORT", help="Where to listen.")
@click.option("--name", "names", multiple=True, help="A further name or address for the certificate.")
@install_options
def install(how: How, as_json: bool, **given: Any) -> None:
    """Make the server a service of this machine: its files in /etc/outrider, a user, a unit of systemd, and its start.

    What is as it should be is left alone. The server starts once `outrider server init` has been run.
    """
    from outrider.cli import _install

    if how.uninstall:
        keeps = [f"/etc/outrider, the data directory and the user {_install.SERVER_USER} stay"]
        _install.uninstall(_install.SERVER, keeps, dry_run=how.dry_run, as_json=as_json)
        return
    _install.install(
        lambda: _install.plan_server(given, _install.Places(), how.command or this_command()),
        dry_run=how.dry_run,
        start=how.start,
        as_json=as_json,
    )
