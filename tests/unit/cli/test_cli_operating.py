"""`runs resolve`, `runs retry`, `node drain`, `audit`: what is sent, and what is said."""

from __future__ import annotations

import json

from outrider.errors import Conflict
from outrider.v1 import control_service_pb2 as pb
from outrider.v1 import types_pb2 as types
from tests.unit.cli.conftest import Cli


def failed_run(**fields: object) -> types.Run:
    failure = types.Failure(
        error_class=types.ERROR_CLASS_TEMPORARY, code="s3_away", message="the bucket is away", hint="wait"
    )
    error = types.AttemptError(attempt=1, failure=failure, exit_code=75, tried_again=True)
    step = types.StepStatus(name="fetch", state=types.STEP_STATE_FAILED, attempt=2, failure=failure, errors=[error])
    kept = types.StepStatus(name="prepare", state=types.STEP_STATE_SUCCEEDED, from_run="rold")
    return types.Run(
        run_id="r1", pipeline="p", node_id="n1", state=types.RUN_STATE_FAILED, steps=[kept, step], failure=failure,
        **fields,  # type: ignore[arg-type]
    )  # fmt: skip


def test_resolve_sends_the_verdict_and_says_what_the_run_is_now(cli: Cli) -> None:
    cli.script["ResolveRun"] = lambda _request: failed_run(retried_by="r2")
    given = ("--as", "retry", "--reason", "nothing was created")
    done = cli("runs", "resolve", "r1", "fetch", *given)
    assert (done.returncode, done.stdout) == (0, "r2\n")
    assert "run r1 is failed; run r2 goes on from it" in done.stderr
    request = cli.script.last(pb.ResolveRunRequest)
    assert (request.run_id, list(request.steps), request.reason) == ("r1", ["fetch"], "nothing was created")
    assert request.verdict == types.Settlement.VERDICT_RETRY
    assert request.request_id
    cli("runs", "resolve", "r1", "fetch", "--as", "succeeded", "--reason", "it runs", "--gave", 'ports={"http": 80}')
    assert json.loads(cli.script.last(pb.ResolveRunRequest).outputs_json) == {"ports": {"http": 80}}


def test_resolve_needs_a_reason_a_verdict_and_to_know_which_steps(cli: Cli) -> None:
    cli.script["ResolveRun"] = lambda _request: failed_run()
    for arguments in (
        ["r1", "fetch", "--as", "failed"],
        ["r1", "fetch", "--reason", "x"],
        ["r1", "--as", "failed", "--reason", "x"],
        ["r1", "fetch", "--all", "--as", "failed", "--reason", "x"],
    ):
        assert cli("runs", "resolve", *arguments).returncode == 2, arguments
    assert cli.script.count(pb.ResolveRunRequest) == 0
    assert cli("runs", "resolve", "r1", "--all", "--as", "failed", "--reason", "x").returncode == 0


def test_retry_prints_the_new_runs_id_and_a_refusal_is_one_sentence(cli: Cli) -> None:
    cli.script["RetryRun"] = lambda _request: types.Run(run_id="r2", state=types.RUN_STATE_QUEUED)
    done = cli("runs", "retry", "r1", "--from", "fetch", "--detach", "--allow-offline", "--reason", "why")
    assert (done.returncode, done.stdout) == (0, "r2\n")
    request = cli.script.last(pb.RetryRunRequest)
    assert (request.from_step, request.allow_offline, request.reason) == ("fetch", True, "why")

    def refuse(_request: pb.RetryRunRequest) -> types.Run:
        raise Conflict("run r1 was retried already, by run r2", code="already_retried", hint="retry that one")

    cli.script["RetryRun"] = refuse
    done = cli("runs", "retry", "r1", "--detach")
    assert done.returncode == 1
    assert done.stderr == "error: run r1 was retried already, by run r2 (retry that one)\n"


def test_show_tells_each_failed_attempt_with_class_and_cause(cli: Cli) -> None:
    cli.script["GetRun"] = lambda _request: failed_run(retry_of="rold")
    shown = cli("runs", "show", "r1").stdout
    assert "taken over from run rold" in shown
    assert "fetch     1        temporary  tried again  the bucket is away" in shown
    assert "retry of:" in shown


def test_drain_waits_until_it_is_true(cli: Cli) -> None:
    looks = []

    def look(_request: object) -> types.Node:
        looks.append(1)
        drained = len(looks) > 1
        drain = types.Drain(reason="disk", drained=drained, waits_for="" if drained else "it has run r1")
        return types.Node(node_id="n1", online=True, drain=drain)

    cli.script["DrainNode"] = look
    cli.script["GetNode"] = look
    done = cli("node", "drain", "n1", "--deadline", "30m", "--reason", "disk")
    assert done.returncode == 0
    assert done.stderr == "waiting: it has run r1\nnode n1 is drained\n"
    request = cli.script.last(pb.DrainNodeRequest)
    assert (request.deadline.seconds, request.reason, request.undo) == (1800, "disk", False)
    looks.clear()
    done = cli("node", "drain", "n1", "--detach")
    assert done.stderr == "node n1 is being drained: it has run r1\n"
    assert "online, drained" in cli("node", "show", "n1").stdout
    assert cli("node", "drain", "n1", "--undo", "--reason", "x").returncode == 2


def test_a_drain_that_is_undone_meanwhile_is_not_called_done(cli: Cli) -> None:
    waiting = types.Node(node_id="n1", online=True, drain=types.Drain(waits_for="it has run r1"))
    cli.script["DrainNode"] = lambda _request: waiting
    cli.script["GetNode"] = lambda _request: types.Node(node_id="n1", online=True)
    for arguments in ((), ("-o", "json")):
        done = cli("node", "drain", "n1", *arguments)
        assert done.returncode == 1
        assert "error: node n1 is not drained: somebody has undone the drain" in done.stderr


def test_audit_lists_decisions_and_a_broken_chain_is_a_failure(cli: Cli) -> None:
    entry = pb.AuditEntry(
        number=7, actor="operator:admin", verb="resolve", resource="runs", subject="r1", reason="looked",
        data_json=b'{"as":"failed"}',
    )  # fmt: skip
    cli.script["ListAudit"] = lambda _request: pb.ListAuditResponse(entries=[entry])
    done = cli("audit", "list", "--subject", "r1", "--verb", "resolve")
    assert "resolve runs  r1  looked  as=failed" in done.stdout
    request = cli.script.last(pb.ListAuditRequest)
    assert (request.subject, request.verb) == ("r1", "resolve")
    cli.script["VerifyAudit"] = lambda _request: pb.VerifyAuditResponse(rows=7, head=b"\x01\x02")
    assert cli("audit", "verify").stdout == "0102\n"
    cli.script["VerifyAudit"] = lambda _request: pb.VerifyAuditResponse(rows=3, first_bad=4, problem="row 4 is missing")
    done = cli("audit", "verify")
    assert (done.returncode, done.stderr) == (1, "error: the audit log was changed: row 4 is missing\n")
