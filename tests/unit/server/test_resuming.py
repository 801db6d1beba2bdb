"""What a retried run takes over, and what it carries out again."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.errors import Conflict, NotFound
from outrider.pipeline import Pipeline, ancestors, load_pipeline
from outrider.v1 import types_pb2 as types
from server_core import resuming

STATES = {
    "ok": types.STEP_STATE_SUCCEEDED,
    "failed": types.STEP_STATE_FAILED,
    "skipped": types.STEP_STATE_SKIPPED,
    "cancelled": types.STEP_STATE_CANCELLED,
    "unknown": types.STEP_STATE_UNKNOWN,
}


def pipeline(*steps: dict[str, Any], volumes: dict[str, Any] | None = None) -> Pipeline:
    items = [{"uses": "test.shell", **step} for step in steps]
    return load_pipeline(json.dumps({"name": "p", "volumes": volumes or {}, "steps": items}))


def plan(
    document: Pipeline, states: dict[str, str], *, from_step: str = "", idempotent: bool = True, settled: str = ""
) -> resuming.Resumption:
    statuses = {}
    for name, state in states.items():
        statuses[name] = types.StepStatus(name=name, state=STATES[state], outputs_json=b'{"x":1}')
        if name == settled:
            statuses[name].settlement.verdict = types.Settlement.VERDICT_SUCCEEDED
    return resuming.plan(document, "rold", statuses, lambda _step: idempotent, from_step)


def taken(resumption: resuming.Resumption) -> list[str]:
    return [status.name for status in resumption.taken_over]


def step(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, **more}


def test_what_succeeded_is_taken_over_with_its_outputs_and_where_they_are_from() -> None:
    document = pipeline(step("a"), step("b"), step("c"))
    [status] = plan(document, {"a": "ok", "b": "failed", "c": "skipped"}).taken_over
    assert (status.name, status.outputs_json, status.from_run) == ("a", b'{"x":1}', "rold")


def test_clean_up_after_a_failed_step_is_carried_out_again() -> None:
    document = pipeline(step("a"), step("b"), step("tidy", **{"if": "always()"}))
    assert taken(plan(document, {"a": "ok", "b": "failed", "tidy": "ok"})) == ["a"]


def test_steps_beside_the_failed_one_are_taken_over() -> None:
    document = pipeline(step("a", needs=[]), step("b", needs=[]), step("both", needs=["a", "b"]))
    assert taken(plan(document, {"a": "failed", "b": "ok", "both": "skipped"})) == ["b"]


def test_a_skipped_step_does_not_hold_up_what_succeeded_after_it() -> None:
    document = pipeline(step("a"), step("b", **{"if": "false"}), step("c"), step("d"))
    assert taken(plan(document, {"a": "ok", "b": "skipped", "c": "ok", "d": "failed"})) == ["a", "c"]


def test_a_volume_of_the_run_is_filled_again_for_a_step_that_needs_it() -> None:
    document = pipeline(
        step("fetch", volumes={"build": "/build:rw"}),
        step("note"),
        step("unpack", volumes={"build": "/build"}),
        volumes={"build": {}},
    )
    resumption = plan(document, {"fetch": "ok", "note": "ok", "unpack": "failed"})
    assert (taken(resumption), resumption.again) == ([], ["fetch", "note"])


def test_a_volume_of_the_object_is_still_there() -> None:
    document = pipeline(
        step("fetch", volumes={"saves": "/saves:rw"}),
        step("unpack", volumes={"saves": "/saves"}),
        volumes={"saves": {"scope": "object"}},
    )
    resumption = plan(document, {"fetch": "ok", "unpack": "failed"})
    assert (taken(resumption), resumption.again) == (["fetch"], [])


def test_a_volume_that_nobody_needs_any_more_is_not_filled_again() -> None:
    document = pipeline(
        step("fetch", volumes={"build": "/build:rw"}),
        step("unpack", volumes={"build": "/build"}),
        step("start"),
        volumes={"build": {}},
    )
    assert taken(plan(document, {"fetch": "ok", "unpack": "ok", "start": "failed"})) == ["fetch", "unpack"]


def test_what_is_not_idempotent_is_carried_out_again_only_if_somebody_asks() -> None:
    document = pipeline(
        step("fetch", volumes={"build": "/build:rw"}),
        step("unpack", volumes={"build": "/build"}),
        volumes={"build": {}},
    )
    states = {"fetch": "ok", "unpack": "failed"}
    with pytest.raises(Conflict, match=r"step fetch .* would have to be carried out again") as refused:
        plan(document, states, idempotent=False)
    assert "outrider runs retry rold --from fetch" in refused.value.hint
    assert taken(plan(document, states, idempotent=False, from_step="fetch")) == []


def test_while_a_step_is_unknown_nothing_is_decided() -> None:
    document = pipeline(step("a"), step("b"))
    with pytest.raises(Conflict, match="what became of step a") as refused:
        plan(document, {"a": "unknown", "b": "skipped"})
    assert "outrider runs resolve rold a --as" in refused.value.hint


def test_a_run_that_could_not_begin_fills_the_volumes_for_what_it_never_decided() -> None:
    document = pipeline(
        step("fetch", volumes={"build": "/build:rw"}),
        step("unpack", volumes={"build": "/build"}, **{"if": "true"}),
        volumes={"build": {}},
    )
    assert taken(plan(document, {"fetch": "ok", "unpack": "skipped"})) == []
    # Settled by an operator: what was skipped for its sake will run, and needs the volume.
    document = pipeline(
        step("fetch", volumes={"build": "/build:rw"}),
        step("odd"),
        step("unpack", volumes={"build": "/build"}),
        step("other", needs=[]),
        volumes={"build": {}},
    )
    states = {"fetch": "ok", "odd": "ok", "unpack": "skipped", "other": "failed"}
    assert taken(plan(document, states)) == ["fetch", "odd"]
    assert taken(plan(document, states, settled="odd")) == []


def test_a_step_that_is_not_there_is_said_to_be_so() -> None:
    with pytest.raises(NotFound, match="no step 'fetsh'") as refused:
        plan(pipeline(step("fetch")), {"fetch": "failed"}, from_step="fetsh")
    assert refused.value.hint == "did you mean fetch?"


@st.composite
def ended_runs(draw: st.DrawFn) -> tuple[Pipeline, dict[str, str], str]:
    """A run as it can have ended: a graph, states, and a step to begin from or none."""
    count = draw(st.integers(1, 7))
    names = [f"s{number}" for number in range(count)]
    volumes = ["v", "w"]
    steps = []
    for number, name in enumerate(names):
        mounts = draw(st.dictionaries(st.sampled_from(volumes), st.sampled_from(["", ":rw"])))
        steps.append(
            step(
                name,
                needs=draw(st.lists(st.sampled_from(names[:number]), unique=True)) if number else [],
                volumes={volume: f"/{volume}{mode}" for volume, mode in mounts.items()},
            )
        )
    states = {name: draw(st.sampled_from(["ok", "ok", "failed", "skipped", "cancelled"])) for name in names}
    return pipeline(*steps, volumes={"v": {}, "w": {}}), states, draw(st.sampled_from(["", *names]))


@given(ended_runs())
@settings(max_examples=300, deadline=None)
def test_what_is_taken_over_never_rests_on_something_that_runs_again(run: tuple[Pipeline, dict[str, str], str]) -> None:
    document, states, from_step = run
    resumption = plan(document, states, from_step=from_step)
    kept = set(taken(resumption))
    before = ancestors(document)
    runs_again = {name for name in states if name not in kept and states[name] != "skipped"}
    for name in kept:
        assert states[name] == "ok"
        assert before[name].isdisjoint(runs_again), name
    assert from_step not in kept
    # Whoever runs finds in the run's volumes what was written there before it: the writers run, too.
    for name in runs_again:
        for volume in document.step(name).volumes:
            writers = {each.name for each in document.steps if volume in each.volumes and each.volumes[volume].writable}
            assert writers.isdisjoint(kept), (name, volume)
