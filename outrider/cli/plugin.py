"""`outrider plugin`: the step plugins of this machine, or of a node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from outrider.cli import _plugin_author, _plugins
from outrider.cli._main import DONE, FAILED, App
from outrider.cli._output import emit_json, output_option, plain
from outrider.cli._plugins import selection_options


@click.group("plugin", help="Step plugins: list, doctor; and for their authors: new, resolve, try, schema.")
def command() -> None:
    """The plugins."""


@command.command("list")
@click.option("--node", help="Those of this node, as it has reported them, instead of this machine's.")
@selection_options
@output_option
@click.pass_obj
def list_(app: App, node: str | None, selection: Callable[[], dict[str, Any]], as_json: bool) -> int:
    """List step plugins with their step types; one that can't be used is listed with the reason and the fix.

    Those of this machine are what an agent here would load, by its settings, with what it would note of them. The exit
    code is 1 if one can't be used.
    """
    rows = _of_node(app, node) if node else _plugins.as_rows(_plugins.look(selection))
    if as_json:
        emit_json(rows)
        return FAILED if any(_plugins.state_of(row) == "error" for row in rows) else DONE
    return FAILED if _plugins.show(rows) else DONE


@command.command("doctor")
@selection_options
@output_option
def doctor(selection: Callable[[], dict[str, Any]], as_json: bool) -> int:
    """Look closer at the step plugins of this environment: contract, requirements, facts, and what could be better.

    Each is imported in a process of its own making, so that one which crashes it is named, too. The exit code is 1 if
    one can't be used, or fails when it is asked for facts: the agent goes on with such a plugin, and only notes it.
    """
    found = _plugins.look(selection)
    rows = _plugins.as_rows(found, closely=True)
    broken = any(row["state"] == "error" for row in rows)
    if as_json:
        emit_json({"ok": not broken, **_plugins.environment(), "plugins": rows, "facts": found.facts})
    else:
        _plugins.show(rows, contract=True)
        _plugins.show_environment(found)
    return FAILED if broken else DONE


def _of_node(app: App, node: str) -> list[dict[str, Any]]:
    from outrider.v1 import control_service_pb2 as pb

    with app.client() as client:
        answer = client.call(client.stub.GetNode, pb.GetNodeRequest(node_id=node))
    return [plain(plugin) for plugin in answer.plugins]


for each in _plugin_author.COMMANDS:
    command.add_command(each)
