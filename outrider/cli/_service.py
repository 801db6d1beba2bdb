"""What the long-running commands share: their configuration, and running until a signal says stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import faulthandler
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from outrider.cli._output import compact, emit_json, table
from outrider.errors import Conflict, InvalidInput

if TYPE_CHECKING:
    from pydantic import BaseModel

    from outrider.settings import Loaded

M = TypeVar("M", bound="BaseModel")


def load_settings(
    model: type[M], env_prefix: str, file: Path | None, default_file: Path, flags: Mapping[str, Any]
) -> Loaded[M]:
    """A configuration from its file (``default_file`` if there is one), the environment and flags."""
    from outrider import settings

    if file is None and default_file.is_file():
        file = default_file
    return settings.load(model, env_prefix=env_prefix, environ=os.environ, file=file, flags=flags)


def show_settings(loaded: Loaded[Any], as_json: bool) -> None:
    """Print every setting with its value and where it came from. Secrets are not shown."""
    values = loaded.value.model_dump(mode="json")  # pydantic masks SecretStr
    if as_json:
        emit_json({name: {"value": value, "from": loaded.sources[name]} for name, value in values.items()})
        return
    rows = [(name, "" if value is None else compact(value), loaded.sources[name]) for name, value in values.items()]
    table(("SETTING", "VALUE", "FROM"), rows, empty="")


def run_until_signal(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run ``main`` on uvloop. Its event is set by SIGINT or SIGTERM; a second one of these ends the process at once."""
    import uvloop

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def ask(number: signal.Signals) -> None:
            if stop.is_set():
                # Whoever asks twice does not want to wait. What runs on the node goes on; the journal has it.
                click.echo("stopping at once", err=True)
                os._exit(128 + number)
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ask, number)
        await main(stop)

    # The watchdog ends a process that hangs with SIGABRT: its log then says where each thread stood.
    faulthandler.enable()
    uvloop.run(run())


@contextlib.contextmanager
def act_as_owner(directory: Path) -> Iterator[None]:
    """Let root work as the user to whom ``directory`` belongs, if it is there and another's.

    A server that runs as a user of its own must be able to write whatever root's commands leave in its data directory.
    """
    try:
        owner = directory.stat()
    except OSError:
        owner = None
    if owner is None or os.geteuid() != 0 or owner.st_uid == 0:
        yield
        return
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(owner.st_gid)
    os.seteuid(owner.st_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(os.getgid())
        os.setgroups(groups)


def check_port(listen: str) -> None:
    """Raise Conflict at once if ``host:port`` is taken, instead of after everything has been loaded.

    The server finds out for itself in any case; what is not an address is left for its configuration to refuse.
    """
    host, _, port = listen.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 65536:
        return
    try:
        found = socket.getaddrinfo(
            host.strip("[]") or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as error:
        raise InvalidInput(f"{host!r} of {listen!r} is no address of this machine", hint="write host:port") from error
    for family, kind, _protocol, _name, address in found:
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise Conflict(
                        f"the address {listen} is taken by another program",
                        code="port_taken",
                        hint="stop that program, or give another port with --listen",
                    ) from error
                raise InvalidInput(f"this machine can't listen on {listen}: {error.strerror}") from error


def config_option(variable: str, default: Path) -> Callable[[Any], Any]:
    """``--config FILE``."""
    return click.option(
        "--config",
        "file",
        type=click.Path(path_type=Path),
        envvar=variable,
        help=f"The configuration file  [env: {variable}; default: {default} if there is one]",
    )
