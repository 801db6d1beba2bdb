"""`outrider object`: what the platform manages, its attributes and its status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from outrider.cli._files import read_text
from outrider.cli._main import App
from outrider.cli._output import age, compact, decoded, emit_json, fields, note, output_option, table
from outrider.cli._values import Ref, json_or_string, pairs
from outrider.errors import InvalidInput


@click.group("object", help="Objects, their attributes and status: set, get, list, rm.")
def command() -> None:
    """The objects."""


@command.command("set")
@click.argument("ref", type=Ref())
@click.argument("attributes", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--json", "text", metavar="JSON", help="Attributes as a JSON object.")
@click.option("--from-file", "file", type=click.Path(path_type=Path), help="A JSON object in a file; - is stdin.")
@click.option("--unset", multiple=True, metavar="KEY", help="Remove an attribute; repeatable.")
@click.option("--replace", is_flag=True, help="Replace all attributes instead of merging.")
@click.option("--version", type=int, help="Refuse if the object has another version than this; 0: it must be new.")
@output_option
@click.pass_obj
def set_(
    app: App,
    ref: tuple[str, str],
    attributes: tuple[str, ...],
    text: str | None,
    file: Path | None,
    unset: tuple[str, ...],
    replace: bool,
    version: int | None,
    as_json: bool,
) -> None:
    """Set attributes of an object; it is made if there is none of that name.

    VALUE is JSON (16, true, [1,2]) or else a string; quote it twice ('v="16"') to keep a number a string.
    """
    from outrider.cli._client import request_id
    from outrider.v1 import control_service_pb2 as pb
    from outrider.v1.types_pb2 import ObjectRef

    values: dict[str, Any] = {}
    if file is not None:
        values |= _json_object(read_text(file), str(file))
    if text is not None:
        values |= _json_object(text, "--json")
    values |= {key: json_or_string(value) for key, value in pairs(attributes, "an attribute").items()}
    values |= dict.fromkeys(unset)
    request = pb.SetObjectRequest(
        request_id=request_id(),
        ref=ObjectRef(kind=ref[0], name=ref[1]),
        attributes_json=json.dumps(values).encode(),
        replace=replace,
        expected_version=version,
    )
    with app.client() as client:
        answer = client.call(client.stub.SetObject, request)
    if as_json:
        emit_json(answer)
    else:
        note(f"{'/'.join(ref)} has version {answer.version}")


def _json_object(text: str, source: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{source} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidInput(f"{source} must be a JSON object, not {type(value).__name__}")
    return value


@command.command("get")
@click.argument("ref", type=Ref())
@output_option
@click.pass_obj
def get(app: App, ref: tuple[str, str], as_json: bool) -> None:
    """Show an object: what the platform set, and what runs wrote back."""
    from outrider.v1 import control_service_pb2 as pb
    from outrider.v1.types_pb2 import ObjectRef

    with app.client() as client:
        found = client.call(client.stub.GetObject, pb.GetObjectRequest(ref=ObjectRef(kind=ref[0], name=ref[1])))
    if as_json:
        emit_json(found)
        return
    attributes: dict[str, Any] = decoded(found.attributes_json) or {}
    status: dict[str, Any] = decoded(found.status_json) or {}
    written = {item.name: item for item in found.status}
    updated = f"{age(found.updated_at)} ago" if found.updated_at.seconds else ""
    fields([("object", "/".join(ref)), ("version", str(found.version)), ("updated", updated)])
    click.echo()
    table(
        ("ATTRIBUTE", "VALUE"),
        [(name, compact(value)) for name, value in sorted(attributes.items())],
        empty="it has no attributes",
    )
    if status:
        click.echo()
        rows = [
            (name, compact(value), written[name].run_id, age(written[name].written_at))
            if name in written
            else (name, compact(value), "", "")
            for name, value in sorted(status.items())
        ]
        table(("STATUS", "VALUE", "WRITTEN BY", "AGE"), rows, empty="")


@command.command("list")
@click.argument("kind", required=False, default="")
@output_option
@click.pass_obj
def list_(app: App, kind: str, as_json: bool) -> None:
    """List objects, all or those of a KIND."""
    from outrider.v1 import control_service_pb2 as pb

    with app.client() as client:
        objects = client.call(client.stub.ListObjects, pb.ListObjectsRequest(kind=kind)).objects
    if as_json:
        emit_json(list(objects))
        return
    rows = [
        (
            f"{item.ref.kind}/{item.ref.name}",
            str(item.version),
            age(item.updated_at),
            len(decoded(item.attributes_json) or {}),
            " ".join(f"{name}={compact(value)}" for name, value in sorted((decoded(item.status_json) or {}).items())),
        )
        for item in objects
    ]
    table(("OBJECT", "VERSION", "UPDATED", "ATTRIBUTES", "STATUS"), rows, empty="there are no objects")


@command.command("rm")
@click.argument("refs", metavar="KIND/NAME...", type=Ref(), nargs=-1, required=True)
@output_option
@click.pass_obj
def rm(app: App, refs: tuple[tuple[str, str], ...], as_json: bool) -> int:
    """Remove objects. Their volumes go from their nodes, but for those with `keep`."""
    from outrider.cli._client import request_id
    from outrider.cli._many import each
    from outrider.v1 import control_service_pb2 as pb
    from outrider.v1.types_pb2 import ObjectRef

    def remove(ref: str) -> pb.RemoveObjectResponse:
        kind, _, name = ref.partition("/")
        request = pb.RemoveObjectRequest(request_id=request_id(), ref=ObjectRef(kind=kind, name=name))
        return client.call(client.stub.RemoveObject, request)

    with app.client() as client:
        return each(["/".join(ref) for ref in refs], remove, lambda ref, _: f"removed {ref}", as_json)
