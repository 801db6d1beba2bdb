"""What nodes report of runs, as the store takes it: only forwards, and only from whoever has a say in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from outrider.v1 import node_service_pb2, types_pb2
from server_core.store import runs
from server_core.store.commits import Commit
from server_core.store.sqlite import SqliteDatabase

STEP = {name.removeprefix("STEP_STATE_").lower(): number for name, number in types_pb2.StepState.items()}
RUN = {name.removeprefix("RUN_STATE_").lower(): number for name, number in types_pb2.RunState.items()}


class Store:
    """A store with one run, of which reports come."""

    def __init__(self, path: Path) -> None:
        self.db = SqliteDatabase(path)
        steps = [types_pb2.StepStatus(name=name, state=STEP["pending"]) for name in "ab"]
        new = runs.NewRun("r", "l", "operator:a", "r", b"", "p", b"", b"", "n", None, {}, [], 0, steps)
        self._do(lambda c: runs.accept(c, new))

    def _do(self, work: Any) -> Any:
        return self.db.write_now(Commit.RUN_REPORT, work)

    def report(self, state: str, a: str = "", *, attempt: int = 1, outbox: str = "", sequence: int = 0) -> runs.Applied:
        steps = [types_pb2.StepStatus(name="a", state=STEP[a], attempt=attempt)] if a else []
        report = node_service_pb2.RunReport(
            run_id="r", lease_id="l", state=RUN[state], steps=steps, outbox_id=outbox, sequence=sequence
        )
        applied: runs.Applied = self._do(lambda c: runs.apply_report(c, "n", report))
        return applied

    def now(self) -> tuple[str, str, int]:
        """State of the run; state and attempt of step a."""

        def read(connection: Connection) -> types_pb2.Run:
            return runs.get(connection, "r")

        run = self._do(read)
        run_state = next(name for name, number in RUN.items() if number == run.state)
        return run_state, next(name for name, n in STEP.items() if n == run.steps[0].state), run.steps[0].attempt


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "store.db")
    yield made
    made.db.close()


@pytest.mark.parametrize(("first", "then"), [("succeeded", "failed"), ("failed", "succeeded"), ("skipped", "failed")])
def test_the_first_result_of_an_attempt_stays_and_another_one_is_told(store: Store, first: str, then: str) -> None:
    assert not store.report("running", first).refused
    assert store.report("running", then).refused == f"attempt 1 of step a is {first}, and is told to be {then}"
    assert store.now() == ("running", first, 1)
    assert not store.report("running", first).refused


def test_after_success_there_is_no_further_attempt(store: Store) -> None:
    store.report("running", "succeeded")
    refused = store.report("running", "running", attempt=2).refused
    assert refused == "step a succeeded in attempt 1, and is told to be running in attempt 2"
    assert store.now() == ("running", "succeeded", 1)


def test_what_a_report_says_beside_a_contradiction_is_recorded(store: Store) -> None:
    store.report("running", "succeeded")
    applied = store.report("failed", "failed")
    assert (applied.finished, applied.foreign) == (True, False)
    assert "told to be failed" in applied.refused
    assert store.now() == ("failed", "succeeded", 1)


def test_the_end_of_a_run_stays_and_another_one_is_told(store: Store) -> None:
    store.report("succeeded", "succeeded")
    assert store.report("failed", "failed").refused == "the run is over: succeeded"
    assert not store.report("running", "running").refused  # of the past
    assert store.now() == ("succeeded", "succeeded", 1)


def test_a_step_that_failed_may_be_tried_again_and_what_was_unknown_may_turn_out(store: Store) -> None:
    store.report("running", "failed")
    assert not store.report("running", "running", attempt=2).refused
    store.report("unknown", "unknown", attempt=2)
    applied = store.report("succeeded", "succeeded", attempt=2)
    assert (applied.finished, applied.refused) == (False, "")
    assert store.now() == ("succeeded", "succeeded", 2)


def test_reports_that_come_again_take_nothing_back_and_tell_no_end_twice(store: Store) -> None:
    told = []
    for _ in range(2):
        told.append(store.report("running", "running", outbox="o", sequence=5).finished)
        told.append(store.report("unknown", "unknown", outbox="o", sequence=6).finished)
        assert store.now() == ("unknown", "unknown", 1)
    assert told == [False, True, False, False]
    store.report("running", "running", outbox="o", sequence=5)
    assert store.now() == ("unknown", "unknown", 1)


def test_an_agent_that_lost_its_journal_counts_anew_and_is_heard(store: Store) -> None:
    store.report("unknown", "unknown", outbox="o", sequence=900)
    store.report("running", "running", outbox="another", sequence=1)
    assert store.now() == ("running", "running", 1)
    assert store.report("succeeded", "succeeded", outbox="another", sequence=2).finished


def test_the_end_of_a_run_counts_though_the_nodes_disk_was_set_back(store: Store) -> None:
    store.report("running", "running", outbox="o", sequence=900)
    assert store.report("succeeded", "succeeded", outbox="o", sequence=20).finished
    assert store.now() == ("succeeded", "succeeded", 1)


def test_an_agent_of_before_that_names_no_outbox_is_heard_as_ever(store: Store) -> None:
    store.report("running", "running", sequence=5)
    store.report("succeeded", "succeeded", sequence=2)
    assert store.now() == ("succeeded", "succeeded", 1)
