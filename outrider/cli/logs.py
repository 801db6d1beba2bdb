"""`outrider logs`: bytes to stdout, as they were written."""

from __future__ import annotations

import base64
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from outrider.cli._main import App
from outrider.cli._output import emit_json_line, note, output_option, word

if TYPE_CHECKING:
    from outrider.cli._client import Client
    from outrider.v1 import control_service_pb2 as pb
    from outrider.v1 import types_pb2 as types


@click.group("logs", help="Logs of runs and containers.")
def command() -> None:
    """The logs."""


@command.command("run")
@click.argument("run_id", metavar="RUN")
@click.argument("step", required=False, default="")
@click.option("-f", "--follow", is_flag=True, help="Go on until the run has ended.")
@click.option("--tail", type=click.IntRange(0), help="Only so many of the last lines of each step.")
@click.option("--attempt", type=click.IntRange(1), help="Only this attempt.")
@output_option
@click.pass_obj
def run(app: App, run_id: str, step: str, follow: bool, tail: int | None, attempt: int | None, as_json: bool) -> None:
    """Print the log of a run, of all steps or of one STEP.

    Where several steps are printed, each line begins with the name of its step; otherwise the bytes are as the
    program wrote them.
    """
    from outrider.cli._logs import LogWriter, payload
    from outrider.v1 import control_service_pb2 as pb
    from outrider.v1 import types_pb2 as types

    with app.client() as client:
        found = client.call(client.stub.GetRun, pb.GetRunRequest(run_id=run_id))
        if tail == 0 and not follow:
            return
        request = pb.StreamRunLogsRequest(
            run_id=found.run_id, step=step, follow=follow, attempt=attempt or 0, tail=tail or 0
        )
        writer = LogWriter(sys.stdout.buffer, prefixes=not step and len(found.steps) > 1)
        try:
            for chunk in _chunks(client, request):
                if as_json:
                    _emit_chunk(chunk, payload(chunk))
                elif chunk.gap_bytes:
                    missing = f"{chunk.gap_bytes} bytes are" if chunk.gap_bytes > 0 else "an unknown number of bytes is"
                    note(f"{missing} missing here in the {word(types.LogStream, chunk.stream)} of step {chunk.step}")
                else:
                    label = chunk.step if chunk.attempt < 2 else f"{chunk.step}#{chunk.attempt}"
                    writer.write((chunk.step, chunk.attempt, chunk.stream), label, payload(chunk))
        finally:
            writer.close()


def _chunks(client: Client, request: pb.StreamRunLogsRequest) -> Iterator[types.RunLogChunk]:
    """The chunks of a log. While it is followed, a lost connection is made again, and no byte comes twice."""
    from outrider.cli._logs import payload
    from outrider.cli._watch import GIVE_UP_AFTER_S
    from outrider.errors import TemporaryError
    from outrider.retry import RetryPolicy

    ends: dict[tuple[str, int, int], int] = {}
    waits, lost_at = RetryPolicy(max_retries=None).waits(), 0.0
    while True:
        try:
            for chunk in client.stream(client.stub.StreamRunLogs, request):
                lost_at = 0.0
                place = (chunk.step, chunk.attempt, chunk.stream)
                data = payload(chunk)
                end = chunk.offset + (len(data) or max(0, chunk.gap_bytes))
                seen = ends.get(place, 0)
                if place in ends and end <= seen and chunk.gap_bytes >= 0:
                    continue
                if data and chunk.offset < seen:
                    chunk.data, chunk.zstd = data[seen - chunk.offset :], False
                    chunk.offset = seen
                ends[place] = max(seen, end)
                yield chunk
            return
        except TemporaryError as error:
            lost_at = lost_at or time.monotonic()
            if not request.follow or time.monotonic() - lost_at > GIVE_UP_AFTER_S:
                raise
            note(f"{error.message}; trying again")
            # What was begun is asked for from its beginning, and what has been printed of it is left out above.
            request.tail = 0 if ends else request.tail
            time.sleep(next(waits))


def _emit_chunk(chunk: types.RunLogChunk, data: bytes) -> None:
    from outrider.cli._output import moment
    from outrider.v1 import types_pb2 as types

    item: dict[str, Any] = {
        "step": chunk.step,
        "attempt": chunk.attempt,
        "stream": word(types.LogStream, chunk.stream),
        "offset": chunk.offset,
        "time": moment(chunk.time),
        "gap_bytes": chunk.gap_bytes,
    }
    emit_json_line(item | _data(data))


def _data(data: bytes) -> dict[str, str]:
    """The bytes as text if they are UTF-8, else in Base64: JSON has no bytes."""
    try:
        return {"text": data.decode("utf-8")}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode("ascii")}


@command.command("container")
@click.argument("node")
@click.argument("name")
@click.option("-f", "--follow", is_flag=True, help="Go on until it stops, or Ctrl-C.")
@click.option("--tail", type=click.IntRange(1), help="Only so many of the last lines.")
@output_option
@click.pass_obj
def container(app: App, node: str, name: str, follow: bool, tail: int | None, as_json: bool) -> None:
    """Print the log of a container on a node."""
    from outrider.v1 import control_service_pb2 as pb
    from outrider.v1 import types_pb2 as types

    request = pb.ContainerLogsRequest(node_id=node, name=name, follow=follow, tail=tail or 0)
    with app.client() as client:
        for item in client.stream(client.stub.StreamContainerLogs, request):
            if as_json:
                emit_json_line({"stream": word(types.LogStream, item.stream)} | _data(item.data))
            else:
                sys.stdout.buffer.write(item.data)
                sys.stdout.buffer.flush()
