"""`outrider env`: sets of environment variables that the server keeps encrypted and never gives back."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from outrider.cli import _dotenv
from outrider.cli._files import read_text
from outrider.cli._main import App
from outrider.cli._output import age, emit_json, note, output_option, table


@click.group("env", help="Env sets, kept encrypted on the server: set, list, rm.")
def command() -> None:
    """The env sets."""


@command.command("set")
@click.argument("name")
@click.argument("values", metavar="[KEY=VALUE | KEY]...", nargs=-1)
@click.option("--from-file", "file", type=click.Path(path_type=Path), help="A dotenv file; - is stdin.")
@click.option("--unset", multiple=True, metavar="KEY", help="Remove a variable; repeatable.")
@click.option("--version", type=int, help="Refuse if the set has another version than this; 0: it must be new.")
@output_option
@click.pass_obj
def set_(
    app: App,
    name: str,
    values: tuple[str, ...],
    file: Path | None,
    unset: tuple[str, ...],
    version: int | None,
    as_json: bool,
) -> None:
    """Set variables of an env set; others stay. It is made if there is none of that name.

    A KEY without a value is asked for without showing it, or read from stdin if that is not a terminal: so, and
    with --from-file, secrets don't stand in the shell's history.
    """
    from outrider.cli._client import request_id
    from outrider.v1 import control_service_pb2 as pb

    given = _dotenv.parse(read_text(file), str(file)) if file else {}
    asked = [value for value in values if "=" not in value]
    if asked and not sys.stdin.isatty() and (len(asked) > 1 or str(file) == "-"):
        raise click.UsageError("stdin can give the value of one KEY only; several go into `--from-file -`")
    for value in values:
        key, equals, text = value.partition("=")
        if not key:
            # Not repeated here: it may hold the secret.
            raise click.UsageError("a variable reads like KEY=VALUE; there is one without a KEY")
        given[key] = text if equals else _ask(key)
    if not given and not unset:
        raise click.UsageError("there is nothing to set; give KEY=VALUE, KEY, --from-file or --unset")
    request = pb.SetEnvSetRequest(
        request_id=request_id(), name=name, values=given, remove=unset, expected_version=version
    )
    with app.client() as client:
        answer = client.call(client.stub.SetEnvSet, request)
    if as_json:
        emit_json(answer)
    else:
        note(f"env set {name} has version {answer.version}: {', '.join(sorted(answer.names)) or 'no variables'}")


def _ask(key: str) -> str:
    if sys.stdin.isatty():
        return str(click.prompt(key, hide_input=True, err=True))
    return sys.stdin.read().removesuffix("\n")


@command.command("list")
@output_option
@click.pass_obj
def list_(app: App, as_json: bool) -> None:
    """List the env sets and the names in them; values are never shown."""
    from outrider.v1 import control_service_pb2 as pb

    with app.client() as client:
        sets = client.call(client.stub.ListEnvSets, pb.ListEnvSetsRequest()).env_sets
    if as_json:
        emit_json(list(sets))
        return
    rows = [(item.name, str(item.version), age(item.updated_at), " ".join(sorted(item.names))) for item in sets]
    table(("ENV SET", "VERSION", "UPDATED", "NAMES"), rows, empty="there are no env sets")


@command.command("rm")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@output_option
@click.pass_obj
def rm(app: App, names: tuple[str, ...], as_json: bool) -> int:
    """Remove env sets."""
    from outrider.cli._client import request_id
    from outrider.cli._many import each
    from outrider.v1 import control_service_pb2 as pb

    with app.client() as client:
        return each(
            names,
            lambda name: client.call(
                client.stub.RemoveEnvSet, pb.RemoveEnvSetRequest(request_id=request_id(), name=name)
            ),
            lambda name, _: f"removed env set {name}",
            as_json,
        )
