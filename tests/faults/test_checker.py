"""The checker finds what it is there to find: each wrong that the promises forbid, put into facts that are right."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest

from outrider.v1 import types_pb2 as types
from tests.faults.checker import Facts, Log, compare
from tests.faults.rig import expected_of

RUN, CONTAINER = "r1", "outrider-r1-a-1"


def right() -> Facts:
    wrote = expected_of("a")
    run = types.Run(run_id=RUN, state=types.RUN_STATE_SUCCEEDED)
    run.steps.add(
        name="a",
        state=types.STEP_STATE_SUCCEEDED,
        attempt=1,
        stdout_bytes=len(wrote.stdout),
        stderr_bytes=len(wrote.stderr),
    )
    return Facts(
        accepted={RUN: {"a": wrote}},
        runs={RUN: run},
        finished_events=Counter({RUN: 1}),
        logs={(RUN, "a", 1, "stdout"): Log(wrote.stdout), (RUN, "a", 1, "stderr"): Log(wrote.stderr)},
        starts={CONTAINER: ["id1"]},
        marks={(RUN, "a"): [1]},
        containers=[("outrider-pause-none-1", "pause", "running")],
    )


def log_of(facts: Facts) -> Log:
    return facts.logs[RUN, "a", 1, "stdout"]


WRONGS: dict[str, Callable[[Facts], object]] = {
    "was restarted once and started 3 times": lambda f: (
        setattr(f, "restarted", [CONTAINER]),
        f.starts[CONTAINER].extend(["id1", "id1"]),
    ),
    "is lost": lambda f: f.runs.clear(),  # type: ignore[attr-defined]
    "is not over": lambda f: setattr(f.runs[RUN], "state", types.RUN_STATE_RUNNING),
    "was told 2 times": lambda f: f.finished_events.update([RUN]),
    "its step a is not": lambda f: setattr(f.runs[RUN].steps[0], "state", types.STEP_STATE_RUNNING),
    "succeeded though its steps did not": lambda f: setattr(f.runs[RUN].steps[0], "state", types.STEP_STATE_UNKNOWN),
    "nobody was told of it": lambda f: f.runs.update(r2=types.Run(state=types.RUN_STATE_FAILED)),  # type: ignore[attr-defined]
    "the agent still holds": lambda f: f.held.update(r1=types.RUN_STATE_RUNNING),  # type: ignore[attr-defined]
    "was started 2 times": lambda f: f.starts[CONTAINER].append("id1"),
    "more than once": lambda f: f.marks[RUN, "a"].append(1),
    "the server knows of 1": lambda f: f.starts.update({"outrider-r1-a-2": ["id2"]}),  # type: ignore[attr-defined]
    "never started": lambda f: f.starts.clear(),  # type: ignore[attr-defined]
    "left no mark": lambda f: f.marks.clear(),  # type: ignore[attr-defined]
    "has a gap": lambda f: log_of(f).gaps.append((3, 5)),
    "does not follow": lambda f: log_of(f).wrong.append("a chunk does not follow"),
    "is not what it wrote": lambda f: setattr(log_of(f), "data", log_of(f).data.replace(b"5", b"6")),
    "and the step says": lambda f: setattr(log_of(f), "data", log_of(f).data[:-1]),
    "left in the engine": lambda f: f.containers.append((CONTAINER, "step", "exited")),
    "pause containers are there": lambda f: f.containers.append(("outrider-pause-none-2", "pause", "running")),
    "left on the disk": lambda f: f.leftovers.append("attempts/r1"),
    "rows are left in outbox": lambda f: f.rows.update(outbox=1),  # type: ignore[attr-defined]
    "is gone": lambda f: setattr(f, "managed", ["game"]),
}


def test_what_is_right_passes() -> None:
    assert compare(right()) == []


@pytest.mark.parametrize("sentence", WRONGS)
def test_every_wrong_is_found(sentence: str) -> None:
    facts = copy.deepcopy(right())
    WRONGS[sentence](facts)
    found = compare(facts)
    assert any(sentence in each for each in found), found


def test_a_gap_that_says_so_passes_where_gaps_may_be() -> None:
    facts = right()
    log_of(facts).gaps.append((3, 5))
    assert compare(facts, gaps=True) == []
