"""Settling, turns, drains and the audit log, as the store keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, delete, update

from outrider.errors import Conflict, NotFound
from outrider.v1 import node_service_pb2, types_pb2
from server_core.store import audit, draining, nodes, runs, schema, settling, turns
from server_core.store.commits import Commit
from server_core.store.sqlite import SqliteDatabase
from server_core.store.tokens import Caller

ADMIN = Caller("operator", "admin", "admin", b"")
NEEDS = {"a": [], "b": ["a"], "c": ["b"]}
STEP = {name.removeprefix("STEP_STATE_").lower(): number for name, number in types_pb2.StepState.items()}
RUN = {name.removeprefix("RUN_STATE_").lower(): number for name, number in types_pb2.RunState.items()}


class Store:
    """A store, and short words for what is done with it in these tests."""

    def __init__(self, path: Path) -> None:
        self.db = SqliteDatabase(path)
        self.count = 0

    def do(self, work: Any) -> Any:
        return self.db.write_now(Commit.RUN_RESOLVE, work)

    def accept(self, *, node: str = "n1", arena: str = "", finished: tuple[types_pb2.StepStatus, ...] = ()) -> str:
        self.count += 1
        run_id = f"r{self.count}"
        object_ = None
        if arena:
            object_ = types_pb2.Object(ref=types_pb2.ObjectRef(kind="game", name=arena))
        statuses = [
            types_pb2.StepStatus(name=name, state=types_pb2.STEP_STATE_PENDING, needs=needs)
            for name, needs in NEEDS.items()
        ]
        new = runs.NewRun(
            run_id, f"l-{run_id}", ADMIN.key, run_id, b"", "p", b"", b"", node, object_, {}, [], 0, statuses,
            finished=finished,
        )  # fmt: skip
        self.do(lambda c: runs.accept(c, new))
        return run_id

    def report(self, run_id: str, state: str, **steps: str) -> runs.Applied:
        statuses = [types_pb2.StepStatus(name=name, state=STEP[each], attempt=1) for name, each in steps.items()]
        report = node_service_pb2.RunReport(run_id=run_id, lease_id=f"l-{run_id}", state=RUN[state], steps=statuses)
        applied: runs.Applied = self.do(lambda c: runs.apply_report(c, "n1", report))
        return applied

    def ended(self, state: str, **steps: str) -> str:
        run_id = self.accept()
        self.report(run_id, state, **steps)
        return run_id

    def resolve(self, run_id: str, verdict: str, *steps: str, outputs: bytes = b"") -> types_pb2.Run:
        settlement = types_pb2.Settlement(verdict=f"VERDICT_{verdict.upper()}", by="admin", reason="looked")  # type: ignore[arg-type]

        def work(connection: Connection) -> types_pb2.Run:
            settling.resolve(connection, runs.get(connection, run_id), steps, settlement, outputs)
            return runs.get(connection, run_id)

        run: types_pb2.Run = self.do(work)
        return run


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "store.db")
    yield store
    store.db.close()


def state_of(run: types_pb2.Run) -> str:
    return types_pb2.RunState.Name(run.state).removeprefix("RUN_STATE_").lower()


# -- settling ----------------------------------------------------------------------------------------------


def test_settled_as_failed_the_run_has_failed_and_says_who_said_so(store: Store) -> None:
    run_id = store.ended("unknown", a="succeeded", b="unknown", c="skipped")
    run = store.resolve(run_id, "failed", "b")
    assert state_of(run) == "failed"
    assert run.failure.message == "step b was settled as failed by admin: looked"
    assert (run.steps[1].settlement.by, run.steps[1].settlement.reason) == ("admin", "looked")


def test_settled_as_succeeded_the_run_has_succeeded_if_nothing_was_left_out_for_it(store: Store) -> None:
    run = store.resolve(store.ended("unknown", a="succeeded", b="succeeded", c="unknown"), "succeeded", "c")
    assert state_of(run) == "succeeded"
    run = store.resolve(
        store.ended("unknown", a="succeeded", b="unknown", c="skipped"), "succeeded", "b", outputs=b'{"p":1}'
    )
    assert (state_of(run), run.failure.code) == ("failed", "not_completed")
    assert "step c was not carried out" in run.failure.message
    assert run.steps[1].outputs_json == b'{"p":1}'
    assert not run.steps[1].HasField("failure")


def test_while_another_step_is_unknown_the_run_is_too(store: Store) -> None:
    run_id = store.ended("unknown", a="unknown", b="unknown", c="unknown")
    assert state_of(store.resolve(run_id, "succeeded", "a")) == "unknown"
    assert state_of(store.resolve(run_id, "retry", "b")) == "unknown"
    run = store.resolve(run_id, "succeeded")
    assert (state_of(run), run.failure.code) == ("failed", "settled_as_failed")
    assert settling.wants_retry(run)


@pytest.mark.parametrize(("state", "a"), [("failed", "failed"), ("cancelled", "cancelled")])
def test_a_run_that_failed_or_was_cancelled_stays_so(store: Store, state: str, a: str) -> None:
    run_id = store.ended(state, a=a, b="unknown", c="skipped")
    assert state_of(store.resolve(run_id, "succeeded", "b")) == state


def test_only_what_is_unknown_can_be_settled(store: Store) -> None:
    run_id = store.ended("unknown", a="succeeded", b="unknown", c="skipped")
    with pytest.raises(Conflict, match="step a of run r1 is succeeded") as refused:
        store.resolve(run_id, "failed", "a")
    assert refused.value.hint == "unknown are b"
    with pytest.raises(NotFound, match="no step 'x'"):
        store.resolve(run_id, "failed", "x")
    with pytest.raises(Conflict, match="not over"):
        store.resolve(store.accept(), "failed")
    with pytest.raises(Conflict, match="no step whose outcome is unknown"):
        store.resolve(store.ended("failed", a="failed", b="skipped", c="skipped"), "failed")


def test_a_run_that_was_settled_hears_no_late_report(store: Store) -> None:
    run_id = store.ended("unknown", a="unknown", b="unknown", c="unknown")
    store.resolve(run_id, "failed", "a")
    assert (
        store.report(run_id, "succeeded", a="succeeded", b="succeeded", c="succeeded").refused == "it has another lease"
    )
    run = store.db.write_now(Commit.RUN_RESOLVE, lambda c: runs.get(c, run_id))
    assert [step.state for step in run.steps] == [STEP["failed"], STEP["unknown"], STEP["unknown"]]


def test_of_a_run_that_was_lost_every_open_step_is_unknown(store: Store) -> None:
    run_id = store.accept()
    store.report(run_id, "running", a="running")
    store.do(lambda c: runs.settle(c, run_id, runs.UNKNOWN, None))
    run = store.do(lambda c: runs.get(c, run_id))
    assert [step.state for step in run.steps] == [STEP["unknown"]] * 3


def test_a_run_reported_as_unknown_has_no_step_that_seems_to_go_on(store: Store) -> None:
    run_id = store.ended("unknown", a="succeeded", b="running")
    run = store.do(lambda c: runs.get(c, run_id))
    assert [step.state for step in run.steps] == [STEP["succeeded"], STEP["unknown"], STEP["unknown"]]


@given(
    before=st.sampled_from(["unknown", "failed", "cancelled"]),
    states=st.lists(
        st.sampled_from(["succeeded", "failed", "skipped", "cancelled", "unknown"]), min_size=3, max_size=3
    ),
    verdicts=st.lists(st.sampled_from(["succeeded", "failed", "retry"]), min_size=3, max_size=3),
)
@settings(max_examples=40, deadline=None)
def test_once_everything_is_settled_nothing_is_unknown_and_nothing_is_better_than_its_steps(
    tmp_path_factory: pytest.TempPathFactory, before: str, states: list[str], verdicts: list[str]
) -> None:
    if before == "unknown" and "unknown" not in states:
        states[0] = "unknown"
    store = Store(tmp_path_factory.mktemp("settle") / "store.db")
    try:
        run_id = store.ended(before, **dict(zip("abc", states, strict=True)))
        run = store.do(lambda c: runs.get(c, run_id))
        for name, state, verdict in zip("abc", states, verdicts, strict=True):
            if state == "unknown":
                run = store.resolve(run_id, verdict, name)
        assert all(step.state != STEP["unknown"] for step in run.steps)
        assert state_of(run) != "unknown"
        if state_of(run) == "succeeded":
            assert all(step.state in (STEP["succeeded"], STEP["skipped"]) for step in run.steps)
    finally:
        store.db.close()


# -- turns -------------------------------------------------------------------------------------------------


def test_two_runs_of_an_object_never_have_their_turn_at_once_on_whatever_nodes(store: Store) -> None:
    first, second = store.accept(node="n1", arena="a"), store.accept(node="n2", arena="a")
    assert store.do(lambda c: turns.claim(c, second)) == turns.Turn(False, True)
    assert store.do(lambda c: turns.claim(c, second)) == turns.Turn(False, False)
    assert store.do(lambda c: turns.claim(c, first)).send
    assert store.do(lambda c: turns.claim(c, first)).send  # sent again: its node may not have got it
    assert not store.do(lambda c: turns.claim(c, second)).send
    store.report(first, "succeeded", a="succeeded", b="succeeded", c="succeeded")
    assert store.do(lambda c: turns.claim(c, second)).send


def test_an_older_run_waits_for_a_younger_one_that_its_node_has(store: Store) -> None:
    first, second = store.accept(arena="a"), store.accept(arena="a")
    store.do(lambda c: c.execute(update(schema.runs).where(schema.runs.c.run_id == second).values(sent=True, state=3)))
    assert not store.do(lambda c: turns.claim(c, first)).send
    assert store.do(lambda c: runs.get(c, first)).reason == f"waits for run {second} of game/a"


def test_a_draining_node_is_sent_nothing_but_what_it_may_have(store: Store) -> None:
    store.do(lambda c: nodes.add(c, "n1", {}, ""))
    before, after = store.accept(), store.accept()
    assert store.do(lambda c: turns.claim(c, before)).send
    assert store.do(lambda c: draining.begin(c, "n1", "new disk", "admin", None))
    assert store.do(lambda c: turns.claim(c, before)).send
    assert store.do(lambda c: turns.claim(c, after)) == turns.Turn(False, True)
    assert store.do(lambda c: runs.get(c, after)).reason == "node n1 is being drained (new disk)"
    with pytest.raises(Conflict, match=r"node n1 takes no new runs, because it is being drained \(new disk\)"):
        store.do(lambda c: draining.refuse(c, "n1"))
    assert not store.do(lambda c: draining.mark_drained(c, "n1"))  # it may have `before`
    assert store.do(lambda c: draining.end(c, "n1"))
    assert store.do(lambda c: turns.claim(c, after)).send


def test_a_run_command_says_the_same_each_time_whatever_became_of_its_steps(store: Store) -> None:
    taken = types_pb2.StepStatus(name="a", state=types_pb2.STEP_STATE_SUCCEEDED, from_run="r0", outputs_json=b"{}")
    run_id = store.accept(finished=(taken,))

    def command(connection: Connection) -> node_service_pb2.RunPipeline:
        row = runs.row_of(connection, run_id)
        assert row is not None
        return runs.pipeline_command(row)

    first = store.do(command)
    store.report(run_id, "running", a="succeeded", b="running")
    again = store.do(command)
    assert list(first.finished) == [taken]
    assert first.SerializeToString(deterministic=True) == again.SerializeToString(deterministic=True)


# -- audit -------------------------------------------------------------------------------------------------


def write(store: Store, count: int = 4) -> None:
    for number in range(count):
        store.do(lambda c, number=number: audit.add(c, ADMIN, "cancel", "runs", f"r{number}", reason="ünnötig"))


def test_decisions_are_listed_newest_first_and_by_what_they_are_about(store: Store) -> None:
    write(store)
    entries = store.do(lambda c: audit.listed(c))
    assert [entry.subject for entry in entries] == ["r3", "r2", "r1", "r0"]
    assert (entries[0].actor, entries[0].verb, entries[0].reason) == ("operator:admin", "cancel", "ünnötig")
    assert [each.number for each in store.do(lambda c: audit.listed(c, subject="r1"))] == [2]
    assert [each.number for each in store.do(lambda c: audit.listed(c, before=3, limit=1))] == [2]
    assert not store.do(lambda c: audit.listed(c, actor="operator:somebody"))


def test_an_untouched_log_is_found_to_be_so(store: Store) -> None:
    assert store.do(audit.verify).rows == 0
    write(store)
    verdict = store.do(audit.verify)
    assert (verdict.rows, verdict.first_bad, verdict.problem) == (4, 0, "")
    assert verdict.head == store.do(lambda c: audit.listed(c, limit=1))[0].hash


@pytest.mark.parametrize(
    ("tamper", "bad"),
    [
        (update(schema.audit).where(schema.audit.c.number == 2).values(reason="x"), 2),
        (update(schema.audit).where(schema.audit.c.number == 3).values(actor="operator:eve"), 3),
        (delete(schema.audit).where(schema.audit.c.number == 2), 2),
        (delete(schema.audit).where(schema.audit.c.number == 4), 4),
        (delete(schema.audit), 1),
        (update(schema.audit).where(schema.audit.c.number == 1).values(hash=bytes(32)), 1),
    ],
    ids=["reason", "actor", "taken out", "cut off", "emptied", "hash"],
)
def test_whatever_is_changed_in_the_log_is_noticed(store: Store, tamper: Any, bad: int) -> None:
    write(store)
    store.do(lambda c: c.execute(tamper))
    verdict = store.do(audit.verify)
    assert verdict.first_bad == bad
    assert verdict.problem


def test_what_is_refused_leaves_no_row_in_the_log(store: Store) -> None:
    def work(connection: Connection) -> None:
        audit.add(connection, ADMIN, "cancel", "runs", "r1")
        raise Conflict("no")

    with pytest.raises(Conflict):
        store.do(work)
    assert store.do(audit.verify) == audit.Verdict(0, bytes(32))
