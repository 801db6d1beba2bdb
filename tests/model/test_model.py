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
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from outrider.v1 import types_pb2 as types
from tests.model.driver import Driver
from tests.model.judge import judge, settle
from tests.model.pipelines import ALL
from tests.model.world import World

# Who is killed leaves coroutines behind that nobody awaits.
pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

HISTORIES = sorted((Path(__file__).parent / "histories").glob("*.json"))
EXAMPLES = int(os.environ.get("OUTRIDER_MODEL_EXAMPLES") or 0)

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
    """Every rule is one word of `Driver`; the promises are judged when all is mended.

    No rule depends on what happened: a word that does not apply does nothing. So a history can be shrunk at will.
    """

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.world.__enter__()
        self.driver = Driver(self.world)

    # What people and programs do.

    @rule(pipeline=pipelines, name=st.sampled_from(["", "a", "a", "b"]))
    def submit(self, pipeline: str, name: str) -> None:
        if len(self.world.submitted) < 8:
            self.driver.act("submit", pipeline, name)

    @rule(pipeline=pipelines)
    def submit_for_an_object(self, pipeline: str) -> None:
        if len(self.world.submitted) < 8:
            self.driver.act("submit", pipeline, "a")

    @rule(index=index, times=st.integers(1, 3))
    def submit_again(self, index: int, times: int) -> None:
        self.driver.act("submit_again", index, times)

    @rule(index=index)
    def cancel(self, index: int) -> None:
        self.driver.act("cancel", index)

    @rule(index=index, verdict=st.sampled_from(VERDICTS))
    def resolve(self, index: int, verdict: int) -> None:
        self.driver.act("resolve", index, verdict)

    @rule(index=index)
    def retry(self, index: int) -> None:
        self.driver.act("retry", index)

    @rule(undo=st.booleans(), deadline_s=st.sampled_from([0.0, 0.0, 20.0]))
    def drain(self, undo: bool, deadline_s: float) -> None:
        self.driver.act("drain", undo, 0.0 if undo else deadline_s)

    @rule(index=index, code=st.sampled_from([0, 0, 0, 0, 1, 75]))
    def finish(self, index: int, code: int) -> None:
        self.driver.act("finish", index, code)

    @rule(index=index)
    def finish_well(self, index: int) -> None:
        self.driver.act("finish", index, 0)

    @rule(index=index)
    def finish_for_now(self, index: int) -> None:
        self.driver.act("finish", index, 75)

    @rule(index=index, text=texts)
    def write(self, index: int, text: str) -> None:
        self.driver.act("write", index, text)

    @rule(seconds=st.sampled_from([0.05, 2.0, 12.0, 45.0, 200.0]))
    def let(self, seconds: float) -> None:
        self.driver.act("let", seconds)

    @rule(yes=st.booleans())
    def stubborn(self, yes: bool) -> None:
        self.driver.act("stubborn", yes)

    # What befalls the agent, the server, the link, the engine and the machine.

    @rule()
    def kill_agent(self) -> None:
        self.driver.act("kill_agent")

    @rule(instants=st.integers(1, 60))
    def kill_agent_within(self, instants: int) -> None:
        self.driver.act("kill_agent_within", instants)

    @rule()
    def stop_agent(self) -> None:
        self.driver.act("stop_agent")

    @rule(seconds=st.sampled_from([0.0, 0.0, 5.0]))
    def start_agent(self, seconds: float) -> None:
        self.driver.act("start_agent")
        self.driver.act("let", seconds)

    @rule()
    def have_agent(self) -> None:
        self.driver.act("start_agent")

    @rule(instants=st.integers(1, 40))
    def kill_server_within(self, instants: int) -> None:
        self.driver.act("kill_server_within", instants)

    @rule(kill=st.booleans())
    def end_server(self, kill: bool) -> None:
        self.driver.act("kill_server" if kill else "stop_server")

    @rule()
    def start_server(self) -> None:
        self.driver.act("start_server")

    @rule()
    def have_server(self) -> None:
        self.driver.act("start_server")

    @rule()
    def cut(self) -> None:
        self.driver.act("cut")

    @rule(directions=st.sampled_from([["up"], ["down"], ["up", "down"]]))
    def hush(self, directions: list[str]) -> None:
        self.driver.act("hush", *directions)

    @rule()
    def heal(self) -> None:
        self.driver.act("heal")

    @rule(stop=st.booleans())
    def engine(self, stop: bool) -> None:
        self.driver.act("stop_engine" if stop else "start_engine")

    @rule()
    def have_everything(self) -> None:
        for word in ("heal", "start_engine", "start_server", "start_agent"):
            self.driver.act(word)

    @rule()
    def forget_start(self) -> None:
        self.driver.act("forget_start")

    @rule(seconds=st.sampled_from([0.5, 3.0, 30.0]))
    def late_start(self, seconds: float) -> None:
        self.driver.act("late_start", seconds)

    @rule(index=index, remove=st.booleans())
    def meddle(self, index: int, remove: bool) -> None:
        self.driver.act("meddle", index, remove)

    @rule(seconds=st.sampled_from([-86400.0, 3600.0, 1e6]))
    def jump(self, seconds: float) -> None:
        self.driver.act("jump", seconds)

    @rule()
    def reboot(self) -> None:
        self.driver.act("reboot")

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


@pytest.mark.timeout(0 if EXAMPLES else 600)
def test_no_order_of_events_breaks_a_promise() -> None:
    try:
        run_state_machine_as_test(Model, settings=_settings(EXAMPLES or 30, repeatable=not EXAMPLES))
    finally:
        print(f"model: {json.dumps(TALLY)}")
    assert TALLY["attempts"] > TALLY["histories"] / 2, "hardly anything ran: the histories prove nothing"


@pytest.mark.parametrize("history", HISTORIES, ids=lambda path: path.stem)
def test_what_once_broke_a_promise_does_not_any_more(history: Path) -> None:
    with World() as world:
        Driver(world).replay(json.loads(history.read_text()))
        settle(world)
        judge(world)
