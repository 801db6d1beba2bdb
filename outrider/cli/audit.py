"""`outrider audit`: who decided what, when and why."""

from __future__ import annotations

import click

from outrider.cli._main import DONE, FAILED, App, say_error
from outrider.cli._output import compact, decoded, emit_json, moment, note, output_option, table


@click.group("audit", help="What operators decided: list, verify.")
def command() -> None:
    """The audit log."""


@command.command("list")
@click.option("--subject", default="", help="Only what was decided about this run, node, object or env set.")
@click.option("--actor", default="", help="Only what this operator decided, e.g. operator:admin.")
@click.option("--verb", default="", help="Only decisions of this kind, e.g. resolve.")
@click.option("--before", type=click.IntRange(0), default=0, help="Only rows with a smaller number.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many, newest first.")
@output_option
@click.pass_obj
def list_(app: App, subject: str, actor: str, verb: str, before: int, limit: int, as_json: bool) -> None:
    """List decisions, newest first."""
    from outrider.v1 import control_service_pb2 as pb

    request = pb.ListAuditRequest(subject=subject, actor=actor, verb=verb, before=before, limit=limit)
    with app.client() as client:
        entries = client.call(client.stub.ListAudit, request).entries
    if as_json:
        emit_json(list(entries))
        return
    rows = [
        (
            str(entry.number),
            moment(entry.time) or "",
            entry.actor,
            f"{entry.verb} {entry.resource}",
            entry.subject,
            entry.reason,
            " ".join(f"{key}={compact(value)}" for key, value in (decoded(entry.data_json) or {}).items()),
        )
        for entry in entries
    ]
    headers = ("NUMBER", "TIME", "WHO", "WHAT", "OF", "REASON", "PARTICULARS")
    table(headers, rows, empty="nothing was decided that fits")


@command.command("verify")
@output_option
@click.pass_obj
def verify(app: App, as_json: bool) -> int:
    """Check that no row was changed, taken out or put in. Prints the hash of the last row, to be noted elsewhere."""
    from outrider.v1 import control_service_pb2 as pb

    with app.client() as client:
        verdict = client.call(client.stub.VerifyAudit, pb.VerifyAuditRequest())
    if as_json:
        emit_json(verdict)
    elif not verdict.problem:
        click.echo(verdict.head.hex())
        note(f"all {verdict.rows} rows are as they were written")
    if verdict.problem:
        say_error(f"the audit log was changed: {verdict.problem}")
    return FAILED if verdict.problem else DONE
