"""`outrider version`."""

from __future__ import annotations

import platform

import click

from outrider import __version__
from outrider.cli._main import App
from outrider.cli._output import emit_json, output_option, plain


@click.command("version", help="Print the version.")
@click.option("--server", is_flag=True, help="Ask the server for its version, too.")
@output_option
@click.pass_obj
def command(app: App, server: bool, as_json: bool) -> None:
    answer = None
    if server:
        from outrider.v1 import control_service_pb2 as pb

        with app.client() as client:
            answer = client.call(client.stub.GetServerInfo, pb.GetServerInfoRequest())
    if as_json:
        version = {"version": __version__, "python": platform.python_version()}
        emit_json({**version, "server": plain(answer)} if answer else version)
        return
    click.echo(f"outrider {__version__}")
    if answer:
        click.echo(f"server   {answer.version}, {answer.nodes_online} of {answer.nodes} nodes online")
