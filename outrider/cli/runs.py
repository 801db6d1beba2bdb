"""`outrider runs`: what was executed, and what is."""

from __future__ import annotations

import json
from typing import Any

import click

from outrider.cli._main import INTERRUPTED, App
from outrider.cli._output import age, compact, decoded, emit_json, fields, note, output_option, table, word
from outrider.cli._values import Duration, Ref, json_or_string, pairs

STATES = ("queued", "dispatched", "running", "succeeded", "failed", "cancelled", "unknown")


@click.group("runs", help="Runs: list, show, cancel, retry, resolve.")
def command() -> None:
    """The runs."""


@command.command("list")
@click.option("--node", default="", help="Only runs on this node.")
@click.option("--object", "ref", type=Ref(), metavar="KIND/NAME", help="Only runs for this object.")
@click.option("--state", "states", multiple=True, type=click.Choice(STATES), help="Only in this state; repeatable.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True, help="How many, newest first.")
@output_option
@click.pass_obj
def list_(app: App, node: str, ref: tuple[str, str] | None, states: tuple[str, ...], limit: int, as_json: bool) -> None:
    """List runs, newest first."""
    from outrider.cli._views import took
    from outrider.v1 import control_service_pb2 as pb
    from outrider.v1 import types_pb2 as types

    request = pb.ListRunsRequest(
        node_id=node,
        object=types.ObjectRef(kind=ref[0], name=ref[1]) if ref else None,
        states=[types.RunState.Value(f"RUN_STATE_{state.upper()}") for state in states],
        limit=limit,
    )
    with app.client() as client:
        runs = client.call(client.stub.ListRuns, request).runs
    if as_json:
        emit_json(list(runs))
        return
    rows = [
        (
            run.run_id,
            run.pipeline,
            word(types.RunState, run.state),
            run.node_id,
            f"{run.object.kind}/{run.object.name}" if run.object.name else "",
            f"{sum(_over(step) for step in run.steps)}/{len(run.steps)}" if run.steps else "",
            took(run),
            age(run.created_at),
        )
        for run in runs
    ]
    table(("RUN", "PIPELINE", "STATE", "NODE", "OBJECT", "STEPS", "TOOK", "AGE"), rows, empty="there are no runs")


def _over(step: Any) -> bool:
    from outrider.v1 import types_pb2 as types

    return bool(step.state >= types.STEP_STATE_SUCCEEDED)


@command.command("show")
@click.argument("run_id", metavar="RUN")
@output_option
@click.pass_obj
def show(app: App, run_id: str, as_json: bool) -> None:
    """Show a run and its steps. RUN may be the beginning of an id that fits one run."""
    from outrider.cli._views import step_sentence, took
    from outrider.v1 import control_service_pb2 as pb
    from outrider.v1 import types_pb2 as types

    with app.client() as client:
        run = client.call(client.stub.GetRun, pb.GetRunRequest(run_id=run_id))
    if as_json:
        emit_json(run)
        return
    fields(
        [
            ("run", run.run_id),
            ("pipeline", run.pipeline),
            ("state", word(types.RunState, run.state) + (", to be cancelled" if _cancelling(run) else "")),
            ("why", run.failure.message or run.reason),
            ("what now", run.failure.hint),
            ("node", run.node_id),
            ("object", f"{run.object.kind}/{run.object.name}" if run.object.name else ""),
            ("retry of", run.retry_of),
            ("retried by", run.retried_by),
            ("key", run.key),
            ("by", run.created_by),
            ("created", f"{age(run.created_at)} ago" if run.created_at.seconds else ""),
            ("took", took(run)),
            ("args", " ".join(f"{k}={compact(v)}" for k, v in sorted((decoded(run.args_json) or {}).items()))),
        ]
    )
    click.echo()
    rows = [
        (
            step.name,
            step.uses,
            word(types.StepState, step.state),
            str(step.attempt or ""),
            took(step),
            " ".join(filter(None, (step_sentence(step), _outputs(step.outputs_json)))),
        )
        for step in run.steps
    ]
    table(("STEP", "USES", "STATE", "ATTEMPT", "TOOK", "WHAT CAME OF IT"), rows, empty="no step is known yet")
    errors = [
        (
            step.name,
            str(error.attempt or ""),
            word(types.ErrorClass, error.failure.error_class),
            "tried again" if error.tried_again else "",
            error.failure.message,
        )
        for step in run.steps
        for error in step.errors
    ]
    if errors:
        click.echo()
        table(("ERROR IN", "ATTEMPT", "CLASS", "", "CAUSE"), errors, empty="")
    written = decoded(run.writeback_json) or {}
    if written:
        click.echo()
        table(("WRITTEN BACK", "VALUE"), [(k, compact(v)) for k, v in sorted(written.items())], empty="")


def _cancelling(run: Any) -> bool:
    from outrider.cli._watch import TERMINAL

    return bool(run.cancel_requested) and run.state not in TERMINAL


def _outputs(data: bytes) -> str:
    text = " ".join(f"{name}={compact(value)}" for name, value in sorted(json.loads(data or b"{}").items()))
    return text if len(text) <= 100 else text[:99] + "…"


@command.command("cancel")
@click.argument("run_ids", metavar="RUN...", nargs=-1, required=True)
@click.option("--reason", default="", help="Why; it is kept with the run.")
@click.option("--grace", type=Duration(), help="Time between the stop signal and the kill, e.g. 30s.")
@click.option("--wait", is_flag=True, help="Follow the run until it has ended.")
@output_option
@click.pass_obj
def cancel(app: App, run_ids: tuple[str, ...], reason: str, grace: float | None, wait: bool, as_json: bool) -> int:
    """Cancel runs: their steps are stopped. It is remembered also while the node is away."""
    from outrider.cli._client import request_id
    from outrider.cli._many import each
    from outrider.cli._views import open_view
    from outrider.cli._watch import Left, follow
    from outrider.v1 import control_service_pb2 as pb
    from outrider.v1 import types_pb2 as types
    from outrider.wire import duration

    def ask(run_id: str) -> types.Run:
        request = pb.CancelRunRequest(request_id=request_id(), run_id=run_id, reason=reason, grace=duration(grace))
        run = client.call(client.stub.CancelRun, request)
        if not wait:
            return run
        with open_view(run) as view:
            return follow(client, run, view)

    def done(run_id: str, run: types.Run) -> str:
        state = word(types.RunState, run.state)
        return f"run {run_id} is {state}" if wait or run.state >= types.RUN_STATE_SUCCEEDED else f"cancelling {run_id}"

    with app.client() as client:
        try:
            return each(run_ids, ask, done, as_json)
        except Left:
            note("the cancellation goes on")
            return INTERRUPTED


@command.command("retry")
@click.argument("run_id", metavar="RUN")
@click.option("--from", "from_step", default="", metavar="STEP", help="Carry this step and all after it out again.")
@click.option("--reason", default="", help="Why; it stands in the audit log.")
@click.option("--detach", "-d", is_flag=True, help="Don't follow; print the new run's id and leave.")
@click.option("--refuse-if-busy", is_flag=True, help="Refuse instead of queueing behind another run of the object.")
@click.option("--allow-offline", is_flag=True, help="Accept the run although the node is offline now.")
@output_option
@click.pass_obj
def retry(
    app: App,
    run_id: str,
    from_step: str,
    reason: str,
    detach: bool,
    refuse_if_busy: bool,
    allow_offline: bool,
    as_json: bool,
) -> int:
    """Go on with a run that did not succeed: a new run, which takes over the finished steps with their outputs."""
    from outrider.cli._client import request_id
    from outrider.cli.run import see_through
    from outrider.v1 import control_service_pb2 as pb

    request = pb.RetryRunRequest(
        request_id=request_id(),
        run_id=run_id,
        from_step=from_step,
        reason=reason,
        refuse_if_busy=refuse_if_busy,
        allow_offline=allow_offline,
    )
    with app.client() as client:
        return see_through(client, client.call(client.stub.RetryRun, request), detach=detach, as_json=as_json)


@command.command("resolve")
@click.argument("run_id", metavar="RUN")
@click.argument("steps", metavar="[STEP]...", nargs=-1)
@click.option(
    "--as", "verdict", type=click.Choice(["succeeded", "failed", "retry"]), required=True, help="What became of them."
)
@click.option("--reason", required=True, help="How you know; it stands with the step and in the audit log.")
@click.option("--all", "all_", is_flag=True, help="All steps of the run whose outcome is unknown.")
@click.option("--gave", "outputs", multiple=True, metavar="KEY=VALUE", help="An output of the step; JSON or text.")
@output_option
@click.pass_obj
def resolve(
    app: App,
    run_id: str,
    steps: tuple[str, ...],
    verdict: str,
    reason: str,
    all_: bool,
    outputs: tuple[str, ...],
    as_json: bool,
) -> None:
    """Say what became of steps whose outcome is unknown. With `--as retry` the run is then tried again."""
    from outrider.cli._client import request_id
    from outrider.v1 import control_service_pb2 as pb
    from outrider.v1 import types_pb2 as types

    if bool(steps) == all_:
        raise click.UsageError("name the steps, or give --all for all whose outcome is unknown")
    given = {key: json_or_string(value) for key, value in pairs(outputs, "--gave").items()}
    request = pb.ResolveRunRequest(
        request_id=request_id(),
        run_id=run_id,
        steps=steps,
        verdict=types.Settlement.Verdict.Value(f"VERDICT_{verdict.upper()}"),
        reason=reason,
        outputs_json=json.dumps(given).encode() if given else b"",
    )
    with app.client() as client:
        run = client.call(client.stub.ResolveRun, request)
    if as_json:
        emit_json(run)
        return
    if run.retried_by:
        click.echo(run.retried_by)
    note(_settled(run))


def _settled(run: Any) -> str:
    from outrider.v1 import types_pb2 as types

    state = word(types.RunState, run.state)
    unknown = [step.name for step in run.steps if step.state == types.STEP_STATE_UNKNOWN]
    if unknown:
        return f"run {run.run_id} is {state}: {', '.join(unknown)} still to be settled"
    if run.retried_by:
        return f"run {run.run_id} is {state}; run {run.retried_by} goes on from it"
    cause = f": {run.failure.message} ({run.failure.hint})" if run.failure.hint else ""
    return f"run {run.run_id} is {state}{cause}"
