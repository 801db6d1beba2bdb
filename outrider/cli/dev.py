"""`outrider dev`: server and agent in one process, with their own CA and a context that finds them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import click

from outrider.cli._context import ContextFile, locate
from outrider.cli._devdir import default_folder, locked, spare_other_contexts
from outrider.cli._main import App
from outrider.cli._service import check_port, run_until_signal

CONTEXT = "dev"


@click.command("dev", short_help="Start server and agent in one process, for a first try and for tests.")
@click.option(
    "--data-dir", type=click.Path(path_type=Path), help="Where to keep everything.  [~/.local/share/outrider/dev]"
)
@click.option("--listen", default="127.0.0.1:8443", show_default=True, metavar="HOST:PORT", help="Port 0: a free one.")
@click.option("--node-id", default="dev", show_default=True, help="The name of this machine's node.")
@click.option(
    "--context", metavar="NAME|FILE", help="The context to write, or the file to write it to.  [dev, in your own file]"
)
@click.option("--policy-file", type=click.Path(path_type=Path), help="What the node allows.")
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="warning", show_default=True
)
@click.pass_obj
def command(
    app: App,
    /,
    data_dir: Path | None,
    listen: str,
    node_id: str,
    context: str | None,
    policy_file: Path | None,
    log_level: Literal["debug", "info", "warning", "error"],
) -> None:
    """Start a server and an agent in this process, for a first try and for tests.

    They have a CA, a store and a node of their own in the data directory, and keep them for the next time. The
    context that is written lets the other commands find them. Ctrl-C stops both; containers go on.
    """
    path, name = locate(os.environ, context or app.context)
    contexts, name = ContextFile(path), name or CONTEXT
    folder = (data_dir or default_folder()).absolute()
    with locked(folder):
        spare_other_contexts(contexts, name, folder)
        check_port(listen)
        from outrider.cli._dev import Dev

        dev = Dev.prepare(folder, listen, node_id, contexts, name, policy_file, log_level)
        run_until_signal(dev.run)
