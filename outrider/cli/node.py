"""`outrider node`: the machines that have an agent."""

from __future__ import annotations

import os
from pathlib import Path

import click

from outrider.cli._main import App
from outrider.cli._output import age, decoded, emit_json, fields, note, output_option, plain, size, table
from outrider.cli._values import pairs


@click.group("node", help="Nodes: add, list, show, rm.")
def command() -> None:
    """The nodes."""


@command.command("add")
@click.argument("node_id", metavar="NODE")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label of the node; repeatable.")
@click.option("--role", default="", help="What the node is for.")
@click.option("--token-file", type=click.Path(path_type=Path), help="Write the token there (0600) and don't print it.")
@output_option
@click.pass_obj
def add(app: App, node_id: str, labels: tuple[str, ...], role: str, token_file: Path | None, as_json: bool) -> None:
    """Register a node and print its token, which is shown only this once."""
    from outrider.cli._client import request_id
    from outrider.v1 import control_service_pb2 as pb

    request = pb.AddNodeRequest(request_id=request_id(), node_id=node_id, labels=pairs(labels, "--label"), role=role)
    # Opened before the node exists: a token that can't be written down is a node that can't be used.
    file = _create_private(token_file) if token_file else None
    try:
        with app.client() as client:
            answer = client.call(client.stub.AddNode, request)
            server = client.target.server
    except BaseException:
        if token_file and file is not None:
            os.close(file)
            token_file.unlink()
        raise
    if file is not None:
        with os.fdopen(file, "w") as opened:
            opened.write(answer.token + "\n")
    if as_json:
        data = plain(answer)
        if token_file:
            data["token"], data["token_file"] = None, str(token_file)
        emit_json(data)
        return
    if token_file is None:
        click.echo(answer.token)
    where = f"--token-file {token_file}" if token_file else "--token-file FILE"
    note(
        f"node {node_id} is registered; on that machine: outrider agent run --server {server} --node-id {node_id} "
        f"{where} --ca-file CA"
    )


def _create_private(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise click.UsageError(f"--token-file {path} can't be made: {error.strerror}") from error


@command.command("list")
@output_option
@click.pass_obj
def list_(app: App, as_json: bool) -> None:
    """List the nodes."""
    from outrider.v1 import control_service_pb2 as pb

    with app.client() as client:
        nodes = client.call(client.stub.ListNodes, pb.ListNodesRequest()).nodes
    if as_json:
        emit_json(list(nodes))
        return
    rows = [
        (
            node.node_id,
            "online" if node.online else "offline",
            age(node.last_seen),
            node.agent_version,
            ("ok" if node.brief.engine_ok else "error") if node.online else "",
            len(node.brief.runs) if node.online else "",
            size(node.brief.disk_free_bytes) if node.brief.disk_total_bytes else "",
            node.role,
            " ".join(f"{key}={value}" for key, value in sorted(node.labels.items())),
        )
        for node in nodes
    ]
    headers = ("NODE", "STATE", "SEEN", "AGENT", "ENGINE", "RUNS", "DISK FREE", "ROLE", "LABELS")
    table(headers, rows, empty="there are no nodes yet; `outrider node add NAME` makes one")


@command.command("show")
@click.argument("node_id", metavar="NODE")
@output_option
@click.pass_obj
def show(app: App, node_id: str, as_json: bool) -> None:
    """Show a node with its state, step types and plugins."""
    from outrider.v1 import control_service_pb2 as pb

    with app.client() as client:
        node = client.call(client.stub.GetNode, pb.GetNodeRequest(node_id=node_id))
    if as_json:
        emit_json(node)
        return
    brief = node.brief
    facts = decoded(node.facts_json) or {}
    fields(
        [
            ("node", node.node_id),
            ("state", "online" if node.online else "offline"),
            ("last seen", f"{age(node.last_seen)} ago" if node.last_seen.seconds else "never"),
            ("role", node.role),
            ("labels", " ".join(f"{key}={value}" for key, value in sorted(node.labels.items()))),
            ("agent", node.agent_version),
            ("address", node.address),
            ("epoch", str(node.epoch)),
            ("engine", ("ok" if brief.engine_ok else f"error: {brief.engine_error}") if node.last_seen.seconds else ""),
            ("cpu", f"{brief.cpu_percent:.0f} %" if brief.memory_total_bytes else ""),
            ("memory", _share(brief.memory_used_bytes, brief.memory_total_bytes)),
            ("disk free", _share(brief.disk_free_bytes, brief.disk_total_bytes)),
            ("containers", ", ".join(f"{count} {state}" for state, count in sorted(brief.containers.items()))),
            ("runs", " ".join(brief.runs)),
            ("outbox", str(brief.outbox_depth) if brief.outbox_depth else ""),
            *((f"fact {name}", value) for name, value in sorted(facts.items())),
        ]
    )
    if node.step_types:
        click.echo()
        rows = [(kind.name, kind.distribution, kind.version, kind.description) for kind in node.step_types]
        table(("STEP TYPE", "FROM", "VERSION", "WHAT IT DOES"), rows, empty="")
    broken = [plugin for plugin in node.plugins if not plugin.ok]
    if broken:
        click.echo()
        table(("PLUGIN", "FROM", "ERROR"), [(p.name, p.distribution, p.error) for p in broken], empty="")


def _share(part: int, whole: int) -> str:
    return f"{size(part)} of {size(whole)}" if whole else ""


@command.command("rm")
@click.argument("node_ids", metavar="NODE...", nargs=-1, required=True)
@output_option
@click.pass_obj
def rm(app: App, node_ids: tuple[str, ...], as_json: bool) -> int:
    """Remove nodes: their credentials are refused from now on. Their containers go on."""
    from outrider.cli._client import request_id
    from outrider.cli._many import each
    from outrider.v1 import control_service_pb2 as pb

    with app.client() as client:
        return each(
            node_ids,
            lambda node: client.call(
                client.stub.RemoveNode, pb.RemoveNodeRequest(request_id=request_id(), node_id=node)
            ),
            lambda node, _answer: f"removed node {node}",
            as_json,
        )
