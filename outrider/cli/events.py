"""`outrider events`: what happens on the nodes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from outrider.cli._main import App
from outrider.cli._output import clean, compact, decoded, emit_json_line, output_option

if TYPE_CHECKING:
    from outrider.v1 import control_service_pb2 as pb
    from outrider.v1 import types_pb2 as types


@click.command("events", short_help="Show what happens on the nodes.")
@click.option("-f", "--follow", is_flag=True, help="Go on until Ctrl-C; without it, those that are stored are shown.")
@click.option("--type", "kinds", multiple=True, metavar="PREFIX", help="Only such types, e.g. run.; repeatable.")
@click.option("--node", default="", help="Only events of this node.")
@click.option("--subject", default="", help="Only events about this run, container, …")
@click.option("--after", type=click.IntRange(-1), help="Only events with a greater number; -1: all that are stored.")
@output_option
@click.pass_obj
def command(
    app: App, follow: bool, kinds: tuple[str, ...], node: str, subject: str, after: int | None, as_json: bool
) -> None:
    """Show events: with -f those to come, without it those that are stored."""
    from outrider.v1 import control_service_pb2 as pb

    first = pb.SubscribeEventsRequest(
        filter=pb.EventFilter(types=kinds, node_id=node, subject=subject),
        after=after if after is not None else 0 if follow else -1,
    )
    # A caller that has closed its side gets what there is, and the end.
    over = threading.Event()
    if not follow:
        over.set()

    def requests() -> Iterator[pb.SubscribeEventsRequest]:
        yield first
        over.wait()

    with app.client() as client:
        try:
            for event in client.stream(client.stub.SubscribeEvents, requests()):
                if as_json:
                    emit_json_line(event)
                else:
                    click.echo(_line(event))
        finally:
            over.set()


def _line(event: types.Event) -> str:
    time = event.time.ToDatetime().strftime("%Y-%m-%d %H:%M:%SZ")
    data = decoded(event.data_json)
    details = " ".join(f"{k}={compact(v)}" for k, v in data.items()) if isinstance(data, dict) else compact(data or "")
    return clean(f"{time}  {event.node_id:<12}  {event.type:<22}  {event.subject}  {details}").rstrip()
