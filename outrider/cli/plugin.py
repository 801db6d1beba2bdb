"""`outrider plugin`: the step plugins of this machine, or of a node."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from outrider.cli._main import DONE, FAILED, App
from outrider.cli._output import emit_json, note, output_option, plain, table


@click.group("plugin", help="Step plugins that are installed here: list.")
def command() -> None:
    """The plugins."""


@command.command("list")
@click.option("--node", help="Those of this node, as it has reported them, instead of this machine's.")
@output_option
@click.pass_obj
def list_(app: App, node: str | None, as_json: bool) -> int:
    """List step plugins with their step types; one that can't be used is listed with the reason and the fix.

    The exit code is 1 if one can't be used.
    """
    plugins = _of_node(app, node) if node else _installed()
    if as_json:
        emit_json(plugins)
    else:
        rows = [
            (
                plugin["name"],
                plugin["distribution"],
                plugin["version"],
                "ok" if plugin["ok"] else "error",
                " ".join(plugin["step_types"]),
            )
            for plugin in plugins
        ]
        empty = "there are no step plugins; install one, for example: pip install outrider-step-container"
        table(("PLUGIN", "DISTRIBUTION", "VERSION", "STATE", "STEP TYPES"), rows, empty=empty)
    broken = [plugin for plugin in plugins if not plugin["ok"]]
    for plugin in broken:
        note(f"{plugin['name']}: {plugin['error']}")
    return FAILED if broken else DONE


def _installed() -> list[dict[str, Any]]:
    from agent_core.plugins import PluginHost

    return [plain(asdict(report)) for report in PluginHost.load().plugins]


def _of_node(app: App, node: str) -> list[dict[str, Any]]:
    from outrider.v1 import control_service_pb2 as pb

    with app.client() as client:
        answer = client.call(client.stub.GetNode, pb.GetNodeRequest(node_id=node))
    return [plain(plugin) for plugin in answer.plugins]
