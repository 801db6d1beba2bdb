"""The promises, against whatever can happen, in any order: a state machine over commands, programs, kills and cuts.

Agent and server are the real ones, on journals and stores on disk; the engine is the fake one, time is virtual and the
wire is in memory, so that thousands of steps take a minute and the same steps give the same history. A failure prints
its history: put it into tests/model/histories, where it is replayed for ever.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from outrider.v1 import types_pb2 as types
from tests.model.driver import Driver
from tests.model.judge import judge, settle
from tests.model.pipelines import ALL
from tests.model.world import World

HISTORIES = sorted((Path(__file__).parent / "histories").glob("*.json"))
EXAMPLES = int(os.environ.get("OUTRIDER_MODEL_EXAMPLES") or 0)

UNKNOWN = types.RUN_STATE_UNKNOWN
ENDED_ILL = ([UNKNOWN], [types.RUN_STATE_FAILED], [types.RUN_STATE_CANCELLED])
VERDICTS = (
    types.Settlement.VERDICT_SUCCEEDED,
    types.Settlement.VERDICT_FAILED,
    types.Settlement.VERDICT_RETRY,
)
TALLY: Counter[str] = Counter()

index = st.integers(0, 5)
pipelines = st.sampled_from([each.name for each in ALL])
texts = st.sampled_from(["x", "line\n", "hunter2-hunter2\n", "hunter2-", "hunter2\n", "\u00e4" * 2000])


class Model(RuleBasedStateMachine):
    """Every rule is one word of `Driver`; the promises are judged when all is mended."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.world.__enter__()
        self.driver = Driver(self.world)

    def up(self) -> bool:
        return self.world.agent_up

    def served(self) -> bool:
        return self.world.server_up

    def busy(self) -> bool:
        return bool(self.world.engine.running())

    @precondition(served)
    @rule(pipeline=pipelines, name=st.sampled_from(["", "a", "a", "b"]))
    def submit(self, pipeline: str, name: str) -> None:
        if len(self.world.submitted) < 8:
            self.driver.act("submit", pipeline, name)

    @precondition(lambda self: self.served() and self.world.submitted)
    @rule(index=index, times=st.integers(1, 3))
    def submit_again(self, index: int, times: int) -> None:
        self.driver.act("submit_again", index, times)

    @precondition(lambda self: self.served() and self.world.submitted)
    @rule(index=index)
    def cancel(self, index: int) -> None:
        self.driver.act("cancel", index)

    @precondition(lambda self: self.served() and any(each.states[-1:] == [UNKNOWN] for each in self.world.submitted))
    @rule(index=index, verdict=st.sampled_from(VERDICTS))
    def resolve(self, index: int, verdict: int) -> None:
        self.driver.act("resolve", index, verdict)

    @precondition(lambda self: self.served() and any(each.states[-1:] in ENDED_ILL for each in self.world.submitted))
    @rule(index=index)
    def retry(self, index: int) -> None:
        self.driver.act("retry", index)

    @precondition(served)
    @rule(undo=st.booleans(), deadline_s=st.sampled_from([0.0, 0.0, 20.0]))
    def drain(self, undo: bool, deadline_s: float) -> None:
        self.driver.act("drain", undo, 0.0 if undo else deadline_s)

    @rule()
    def reboot(self) -> None:
        self.driver.act("reboot")

    @precondition(busy)
    @rule(index=index, code=st.sampled_from([0, 0, 0, 0, 1, 75]))
    def finish(self, index: int, code: int) -> None:
        self.driver.act("finish", index, code)

    @precondition(busy)
    @rule(index=index, code=st.sampled_from([0, 0, 75]))
    def finish_more(self, index: int, code: int) -> None:
        self.driver.act("finish", index, code)

    @precondition(busy)
    @rule(index=index, text=texts)
    def write(self, index: int, text: str) -> None:
        self.driver.act("write", index, text)

    @rule(seconds=st.sampled_from([0.05, 2.0, 12.0, 45.0, 200.0]))
    def let(self, seconds: float) -> None:
        self.driver.act("let", seconds)

    @rule(yes=st.booleans())
    def stubborn(self, yes: bool) -> None:
        self.driver.act("stubborn", yes)

    @precondition(up)
    @rule()
    def kill_agent(self) -> None:
        self.driver.act("kill_agent")

    @precondition(up)
    @rule(instants=st.integers(1, 60))
    def kill_agent_within(self, instants: int) -> None:
        self.driver.act("kill_agent_within", instants)

    @precondition(up)
    @rule()
    def stop_agent(self) -> None:
        self.driver.act("stop_agent")

    @precondition(lambda self: not self.world.agent_up)
    @rule()
    def start_agent(self) -> None:
        self.driver.act("start_agent")

    @precondition(served)
    @rule(instants=st.integers(1, 40))
    def kill_server_within(self, instants: int) -> None:
        self.driver.act("kill_server_within", instants)

    @precondition(served)
    @rule(kill=st.booleans())
    def end_server(self, kill: bool) -> None:
        self.driver.act("kill_server" if kill else "stop_server")

    @precondition(lambda self: not self.world.server_up)
    @rule()
    def start_server(self) -> None:
        self.driver.act("start_server")

    @rule()
    def cut(self) -> None:
        self.driver.act("cut")

    @rule(directions=st.sampled_from([["up"], ["down"], ["up", "down"]]))
    def hush(self, directions: list[str]) -> None:
        self.driver.act("hush", *directions)

    @precondition(lambda self: self.world.link.silent)
    @rule()
    def heal(self) -> None:
        self.driver.act("heal")

    @precondition(lambda self: self.world.engine.up)
    @rule()
    def stop_engine(self) -> None:
        self.driver.act("stop_engine")

    @precondition(lambda self: not self.world.engine.up)
    @rule()
    def start_engine(self) -> None:
        self.driver.act("start_engine")

    @rule(seconds=st.sampled_from([0.5, 3.0, 30.0]))
    def late_start(self, seconds: float) -> None:
        self.driver.act("late_start", seconds)

    @precondition(busy)
    @rule(index=index, remove=st.booleans())
    def meddle(self, index: int, remove: bool) -> None:
        self.driver.act("meddle", index, remove)

    @rule(seconds=st.sampled_from([-86400.0, 3600.0, 1e6]))
    def jump(self, seconds: float) -> None:
        self.driver.act("jump", seconds)

    def teardown(self) -> None:
        note(f"history: {self.driver.told()}")
        try:
            settle(self.world)
            judge(self.world)
        finally:
            self.world.__exit__()
            TALLY["histories"] += 1
            TALLY["steps"] += len(self.driver.done)
            TALLY["runs"] += len(self.world.submitted)
            TALLY["attempts"] += len(self.world.engine.executions)
            TALLY["kills"] += self.world.kills
            TALLY["cuts"] += self.world.cuts


def _settings(examples: int, *, repeatable: bool) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=40,
        deadline=None,
        derandomize=repeatable,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.timeout(600)
def test_no_order_of_events_breaks_a_promise() -> None:
    try:
        run_state_machine_as_test(Model, settings=_settings(EXAMPLES or 40, repeatable=not EXAMPLES))
    finally:
        print(f"model: {json.dumps(TALLY)}")
    assert TALLY["attempts"] > TALLY["histories"] / 2, "hardly anything ran: the histories prove nothing"


@pytest.mark.parametrize("history", HISTORIES, ids=lambda path: path.stem)
def test_what_once_broke_a_promise_does_not_any_more(history: Path) -> None:
    with World() as world:
        Driver(world).replay(json.loads(history.read_text()))
        settle(world)
        judge(world)
