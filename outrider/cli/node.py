"""`outrider node`: the machines that have an agent."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from outrider.cli._main import DONE, INTERRUPTED, App
from outrider.cli._node_roles import role
from outrider.cli._output import age, decoded, emit_json, fields, note, output_option, plain, size, table, word
from outrider.cli._values import Duration, pairs

if TYPE_CHECKING:
    from outrider.cli._client import Client
    from outrider.v1 import types_pb2 as types

DRAIN_POLL_S = 1.0


@click.group("node", help="Nodes and their roles: add, list, show, drain, role, rm.")
def command() -> None:
    """The nodes."""


command.add_command(role)


@command.command("add")
@click.argument("node_id", metavar="NODE")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label of the node; repeatable.")
@click.option("--role", default="", help="A role of nodes; it says which plugins the node should have.")
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
            _state(node),
            age(node.last_seen),
            node.agent_version,
            ("ok" if node.brief.engine_ok else "error") if node.online else "",
            len(node.brief.runs) if node.online else "",
            size(node.brief.disk_free_bytes) if node.brief.disk_total_bytes else "",
            f"{node.role} (drift)" if node.role_state.drift else node.role,
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
    from outrider.v1 import types_pb2 as types

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
            ("state", _state(node)),
            ("drain", _drain(node)),
            ("last seen", f"{age(node.last_seen)} ago" if node.last_seen.seconds else "never"),
            ("role", _role(node)),
            ("environment", _environment(node)),
            ("labels", " ".join(f"{key}={value}" for key, value in sorted(node.labels.items()))),
            ("agent", node.agent_version),
            ("address", node.address),
            ("epoch", str(node.epoch)),
            ("version", str(node.version)),
            ("engine", ("ok" if brief.engine_ok else f"error: {brief.engine_error}") if node.last_seen.seconds else ""),
            ("cpu", f"{brief.cpu_percent:.0f} %" if brief.memory_total_bytes else ""),
            ("memory", _share(brief.memory_used_bytes, brief.memory_total_bytes)),
            ("disk free", _share(brief.disk_free_bytes, brief.disk_total_bytes)),
            ("containers", ", ".join(f"{count} {state}" for state, count in sorted(brief.containers.items()))),
            ("runs", " ".join(brief.runs)),
            ("outbox", str(brief.outbox_depth) if brief.outbox_depth else ""),
            ("logs waiting", f"{brief.log_bytes} bytes" if brief.log_bytes else ""),
            *((f"fact {name}", value) for name, value in sorted(facts.items())),
        ]
    )
    if brief.operations:
        click.echo()
        counts = [
            (each.operation, word(types.ErrorClass, each.error_class), str(each.retries), str(each.failures))
            for each in brief.operations
        ]
        table(("OPERATION", "ERROR CLASS", "RETRIES", "FAILURES"), counts, empty="")
    if node.role_state.plugins:
        click.echo()
        stands = [
            (
                each.distribution,
                (each.wanted or "any") if each.named else "not by the role" if node.role else "",
                each.locked,
                each.actual or "missing",
                _DRIFTS.get(each.drift, each.drift),
            )
            for each in node.role_state.plugins
        ]
        table(("DISTRIBUTION", "WANTED", "LOCKED", "ACTUAL", "DRIFT"), stands, empty="")
    if node.step_types:
        click.echo()
        rows = [(kind.name, kind.distribution, kind.version, kind.description) for kind in node.step_types]
        table(("STEP TYPE", "FROM", "VERSION", "WHAT IT DOES"), rows, empty="")
    broken = [plugin for plugin in node.plugins if not plugin.ok and plugin.state != "disabled"]
    if broken:
        click.echo()
        table(("PLUGIN", "FROM", "ERROR"), [(p.name, p.distribution, p.error) for p in broken], empty="")


_DRIFTS = {"version": "not in range", "lock": "not the locked version"}


def _role(node: Any) -> str:
    """The role, and what is wrong with it."""
    problem = node.role_state.problem
    return f"{node.role}: {problem}" if problem else node.role


def _environment(node: Any) -> str:
    """The environment that the agent runs in, and the last one that it came back from."""
    if not node.HasField("environment"):
        return ""
    given = node.environment
    name = given.name or "the one that it was installed with"
    return f"{name}; {given.refused} was left again: {given.refused_reason}" if given.refused else name


def _state(node: Any) -> str:
    state = "online" if node.online else "offline"
    return f"{state}, {'drained' if node.drain.drained else 'draining'}" if node.HasField("drain") else state


def _drain(node: Any) -> str:
    """Who drains it, why, and what it waits for."""
    if not node.HasField("drain"):
        return ""
    drain = node.drain
    parts = [f"by {drain.by} for {age(drain.since)}", drain.reason, drain.waits_for]
    return "; ".join(part for part in parts if part)


def _share(part: int, whole: int) -> str:
    return f"{size(part)} of {size(whole)}" if whole else ""


@command.command("drain")
@click.argument("node_id", metavar="NODE")
@click.option("--deadline", type=Duration(), help="Cancel what still runs after this time, e.g. 30m.")
@click.option("--reason", default="", help="Why; it is shown to who wants to run something there.")
@click.option("--undo", is_flag=True, help="Let the node take runs again.")
@click.option("--detach", "-d", is_flag=True, help="Don't wait until it is drained.")
@output_option
@click.pass_obj
def drain(app: App, node_id: str, deadline: float | None, reason: str, undo: bool, detach: bool, as_json: bool) -> int:
    """Let a node take no new runs, and wait until those that it has are over. Its managed containers go on."""
    from outrider.cli._client import request_id
    from outrider.errors import Conflict
    from outrider.v1 import control_service_pb2 as pb
    from outrider.wire import duration

    if undo and (deadline or reason):
        raise click.UsageError("--undo takes neither --deadline nor --reason")
    request = pb.DrainNodeRequest(
        request_id=request_id(), node_id=node_id, reason=reason, deadline=duration(deadline), undo=undo
    )
    with app.client() as client:
        node = client.call(client.stub.DrainNode, request)
        if not (undo or detach):
            try:
                node = _until_drained(client, node)
            except KeyboardInterrupt:
                note(f"the drain goes on; `outrider node drain {node_id} --undo` ends it")
                return INTERRUPTED
            if not node.HasField("drain"):
                # Whoever waits for this goes on to switch the machine off.
                raise Conflict(
                    f"node {node_id} is not drained: somebody has undone the drain meanwhile",
                    code="drain_undone",
                    hint="it takes runs again; `outrider audit list` says who it was",
                )
    if as_json:
        emit_json(node)
    elif undo:
        note(f"node {node_id} takes runs again" if not node.HasField("drain") else f"node {node_id} is {_state(node)}")
    else:
        waits_for = f": {node.drain.waits_for}" if node.drain.waits_for else ""
        note(f"node {node_id} is drained" if node.drain.drained else f"node {node_id} is being drained{waits_for}")
    return DONE


def _until_drained(client: Client, node: types.Node) -> types.Node:
    """Look at the node until it is drained, or its drain was undone; says what it waits for whenever that changes."""
    from outrider.v1 import control_service_pb2 as pb

    said = ""
    while node.HasField("drain") and not node.drain.drained:
        if node.drain.waits_for != said:
            said = node.drain.waits_for
            note(f"waiting: {said}")
        time.sleep(DRAIN_POLL_S)
        node = client.call(client.stub.GetNode, pb.GetNodeRequest(node_id=node.node_id))
    return node


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
