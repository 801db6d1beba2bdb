"""`outrider container`: the containers of the nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

from outrider.cli._main import DONE, FAILED, SOME_FAILED, App, print_error
from outrider.cli._output import age, decoded, emit_json, fields, output_option, plain, table
from outrider.cli._values import Duration

if TYPE_CHECKING:
    from outrider.v1 import types_pb2 as types

GRACE_S = 10.0
ANSWER_S = 30.0
"""Beyond the grace of a stop: how long the node may take to answer."""


@click.group("container", help="Containers of nodes: list, inspect, start, stop, restart, rm.")
def command() -> None:
    """The containers."""


@command.command("list")
@click.argument("nodes", metavar="[NODE]...", nargs=-1)
@click.option("-a", "--all", "all_", is_flag=True, help="Also those of steps, and those that Outrider did not start.")
@output_option
@click.pass_obj
def list_(app: App, nodes: tuple[str, ...], all_: bool, as_json: bool) -> int:
    """List the containers of the given nodes, or of all that are online."""
    from outrider.errors import OutriderError
    from outrider.v1 import control_service_pb2 as pb

    found: list[tuple[str, types.Container]] = []
    failed = 0
    with app.client() as client:
        asked = nodes or tuple(
            node.node_id for node in client.call(client.stub.ListNodes, pb.ListNodesRequest()).nodes if node.online
        )
        for node in asked:
            request = pb.ListContainersRequest(node_id=node, all=all_)
            try:
                answer = client.call(client.stub.ListContainers, request, timeout_s=ANSWER_S)
            except OutriderError as error:
                if len(asked) == 1:
                    raise
                failed += 1
                print_error(error)
            else:
                found += [(node, container) for container in answer.containers]
    if as_json:
        emit_json([{"node_id": node} | plain(container) for node, container in found])
    else:
        headers = ("NODE", "CONTAINER", "STATE", "IMAGE", "PORTS", "FOR", "OWNER", "AGE")
        table(headers, [_row(node, container) for node, container in found], empty="there are no containers")
    if failed:
        return FAILED if failed == len(asked) else SOME_FAILED
    return DONE


def _row(node: str, container: types.Container) -> tuple[Any, ...]:
    return (
        node,
        container.name or container.id[:12],
        _state(container),
        container.image,
        _ports(container),
        f"{container.object.kind}/{container.object.name}" if container.object.name else container.run_id,
        container.owner,
        age(container.created_at),
    )


def _state(container: types.Container) -> str:
    state = container.state
    if state == "exited":
        return f"exited ({container.exit_code})"
    return f"{state} ({container.health})" if container.health else state


def _ports(container: types.Container) -> str:
    return " ".join(
        f"{port.name + ':' if port.name else ''}{port.host or '-'}→{port.container}/{port.protocol or 'tcp'}"
        for port in container.ports
    )


@command.command("inspect")
@click.argument("node")
@click.argument("name")
@output_option
@click.pass_obj
def inspect(app: App, node: str, name: str, as_json: bool) -> None:
    """Show a container; with -o json, the engine's whole answer is in it."""
    from outrider.v1 import control_service_pb2 as pb

    with app.client() as client:
        container = client.call(
            client.stub.InspectContainer, pb.InspectContainerRequest(node_id=node, name=name), timeout_s=ANSWER_S
        )
    if as_json:
        emit_json(container)
        return
    limits = ((decoded(container.inspect_json) or {}).get("HostConfig")) or {}
    fields(
        [
            ("container", container.name),
            ("id", container.id),
            ("image", container.image),
            ("state", _state(container)),
            ("owner", container.owner),
            ("run", container.run_id),
            ("step", container.step),
            ("object", f"{container.object.kind}/{container.object.name}" if container.object.name else ""),
            ("created", f"{age(container.created_at)} ago" if container.created_at.seconds else ""),
            ("started", f"{age(container.started_at)} ago" if container.started_at.seconds else ""),
            ("restarts", f"{container.restart_policy or 'no'}, {container.restart_count} so far"),
            ("network", limits.get("NetworkMode")),
            *(("port", f"{port.name or port.container}: {_ports_of(port)}") for port in container.ports),
            *(
                ("mount", f"{mount.target} from {mount.source}{'' if mount.writable else ', read-only'}")
                for mount in container.mounts
            ),
        ]
    )


def _ports_of(port: types.ContainerPort) -> str:
    return f"{port.host_ip or '0.0.0.0'}:{port.host} → {port.container}/{port.protocol or 'tcp'}"


def _action(name: str, method: str, help_text: str, done: str, options: Iterable[Callable[[Any], Any]]) -> None:
    """Make a command that does one thing to containers of a node."""

    @click.argument("node")
    @click.argument("names", metavar="NAME...", nargs=-1, required=True)
    @output_option
    @click.pass_obj
    def act(
        app: App, node: str, names: tuple[str, ...], as_json: bool, grace: float = GRACE_S, force: bool = False
    ) -> int:
        from outrider.cli._client import request_id
        from outrider.cli._many import each
        from outrider.v1 import control_service_pb2 as pb
        from outrider.wire import duration

        def operate(container: str) -> Any:
            request = pb.ContainerRequest(
                request_id=request_id(), node_id=node, name=container, grace=duration(grace), force=force
            )
            return client.call(getattr(client.stub, method), request, timeout_s=grace + ANSWER_S)

        with app.client() as client:
            return each(names, operate, lambda container, _: f"{done} {container} on {node}", as_json)

    act.__doc__ = help_text
    for option in options:
        act = option(act)
    command.command(name)(act)


_GRACE = click.option(
    "--grace", type=Duration(), default=GRACE_S, help="Time between the stop signal and the kill, e.g. 30s."
)
_FORCE = click.option("--force", is_flag=True, help="Also if it runs.")

_action("start", "StartContainer", "Start containers that were stopped.", "started", [])
_action("stop", "StopContainer", "Stop containers; they stay down until they are started.", "stopped", [_GRACE])
_action("restart", "RestartContainer", "Restart containers; they keep their ports.", "restarted", [_GRACE])
_action("rm", "RemoveContainer", "Remove containers; their volumes stay.", "removed", [_FORCE])
