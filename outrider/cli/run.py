"""`outrider run`: execute a pipeline and follow it to its end."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from outrider.cli._files import read_bytes
from outrider.cli._main import DONE, FAILED, INTERRUPTED, TIMED_OUT, App, say_error
from outrider.cli._output import clean, emit_json, note, output_option, word
from outrider.cli._values import Duration, Ref, pairs
from outrider.errors import InvalidInput, OutriderError

if TYPE_CHECKING:
    from outrider.cli._client import Client
    from outrider.v1 import types_pb2 as types

MAX_PIPELINE_BYTES = 1024 * 1024
LAST_LINES = 20


@click.command(
    "run", help="Run a pipeline on a node and follow it.", short_help="Run a pipeline on a node and follow it."
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--node", help="The node; without it, the context's.")
@click.option("--object", "ref", type=Ref(), metavar="KIND/NAME", help="The object that the run is for.")
@click.option("--arg", "args", multiple=True, metavar="KEY=VALUE", help="An argument, as its type reads; repeatable.")
@click.option("--key", default="", help="The run's key: given again, it is the same run and not another one.")
@click.option("--timeout", type=Duration(), help="Let the run fail after this time, e.g. 10m.")
@click.option("--detach", "-d", is_flag=True, help="Don't follow; print the run's id and leave.")
@click.option("--refuse-if-busy", is_flag=True, help="Refuse instead of queueing behind another run of the object.")
@click.option("--allow-offline", is_flag=True, help="Accept the run although the node is offline now.")
@output_option
@click.pass_obj
def command(
    app: App,
    file: Path,
    node: str | None,
    ref: tuple[str, str] | None,
    args: tuple[str, ...],
    key: str,
    timeout: float | None,
    detach: bool,
    refuse_if_busy: bool,
    allow_offline: bool,
    as_json: bool,
) -> int:
    """Execute the pipeline in FILE (- is stdin). Its steps are shown on stderr, its id goes to stdout."""
    given = pairs(args, "--arg")
    text = read_bytes(file, at_most=MAX_PIPELINE_BYTES)
    from outrider.pipeline import args_from_text, load_pipeline

    try:
        pipeline = load_pipeline(text)
    except InvalidInput as error:
        raise InvalidInput(f"{file}: {error.message}", error.problems, code=error.code, hint=error.hint) from error

    from outrider.cli._client import request_id
    from outrider.v1 import control_service_pb2 as pb
    from outrider.v1.types_pb2 import ObjectRef
    from outrider.wire import duration

    target = app.target()
    node = node or target.node
    if not node:
        raise click.UsageError("which node? Give --node, or OUTRIDER_NODE, or `node` in the context")
    request = pb.ExecutePipelineRequest(
        request_id=request_id(),
        pipeline_yaml=text,
        pipeline_sha256=hashlib.sha256(text).digest(),
        node_id=node,
        object=ObjectRef(kind=ref[0], name=ref[1]) if ref else None,
        args_json=json.dumps(args_from_text(pipeline, given)).encode(),
        key=key,
        refuse_if_busy=refuse_if_busy,
        timeout=duration(timeout),
        allow_offline=allow_offline,
    )
    with app.client() as client:
        return see_through(client, client.call(client.stub.ExecutePipeline, request), detach=detach, as_json=as_json)


def see_through(client: Client, run: types.Run, *, detach: bool, as_json: bool) -> int:
    """Show an accepted run until it is over, unless ``detach``, and how it ended; gives the exit code."""
    if not as_json and (detach or not sys.stdout.isatty()):
        click.echo(run.run_id)
        sys.stdout.flush()
    if not detach:
        from outrider.cli._views import open_view
        from outrider.cli._watch import Left, follow

        try:
            with open_view(run) as view:
                run = follow(client, run, view)
        except Left:
            note(f"the run goes on; see it with: outrider runs show {run.run_id}")
            return INTERRUPTED
    if as_json:
        emit_json(run)
    return DONE if detach else _report(client, run)


def _report(client: Client, run: types.Run) -> int:
    """Say how a terminal run ended, with the last lines of the step that failed; gives the exit code."""
    from outrider.v1 import types_pb2 as types

    if run.state == types.RUN_STATE_SUCCEEDED:
        written = json.loads(run.writeback_json or b"{}")
        for name, value in sorted(written.items()):
            note(f"  {name} = {json.dumps(value, ensure_ascii=False)}")
        return DONE
    failed = [step for step in run.steps if step.state in (types.STEP_STATE_FAILED, types.STEP_STATE_UNKNOWN)]
    say_error(_sentence(run, failed))
    for step in failed:
        _last_lines(client, run.run_id, step)
    timed_out = run.failure.error_class == types.ERROR_CLASS_TIMEOUT or any(
        step.failure.error_class == types.ERROR_CLASS_TIMEOUT for step in failed
    )
    return TIMED_OUT if timed_out and run.state == types.RUN_STATE_FAILED else FAILED


def _sentence(run: types.Run, failed: list[types.StepStatus]) -> str:
    from outrider.v1 import types_pb2 as types

    state = word(types.RunState, run.state)
    sentence = f"run {run.run_id} {'is ' if state == 'unknown' else 'was ' if state == 'cancelled' else ''}{state}"
    causes = []
    for step in failed:
        cause = _cause(step.failure) or f"it ended with exit code {step.exit_code}"
        causes.append(cause if cause.startswith(f"step {step.name} ") else f"step {step.name}: {cause}")
    if run.failure.code == "run_timeout":
        # What its steps say of it sounds as if it were a timeout of their own.
        causes = [f"{_cause(run.failure)} (it was at {', '.join(step.name for step in failed)})"]
    elif not causes and _cause(run.failure):
        causes = [_cause(run.failure)]
    return clean(f"{sentence}: {'; '.join(causes)}" if causes else sentence)


def _cause(failure: types.Failure) -> str:
    return f"{failure.message} ({failure.hint})" if failure.hint else failure.message


def _last_lines(client: Client, run_id: str, step: types.StepStatus) -> None:
    from outrider.cli._logs import payload
    from outrider.v1 import control_service_pb2 as pb

    if not step.attempt:
        return
    # Followed, because the last bytes may come a moment after the end; it ends by itself once they are there.
    request = pb.StreamRunLogsRequest(run_id=run_id, step=step.name, attempt=step.attempt, tail=LAST_LINES, follow=True)
    try:
        data = b"".join(payload(chunk) for chunk in client.stream(client.stub.StreamRunLogs, request))
    except OutriderError as error:
        note(f"  its log can't be shown: {error}")
        return
    lines = data.decode("utf-8", "replace").splitlines()[-LAST_LINES:]
    if lines:
        note(f"  the last lines of its log (all of it: outrider logs run {run_id} {step.name}):")
    for line in lines:
        note(f"  │ {line}")
