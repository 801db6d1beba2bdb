"""What a plugin's code may do while runs go on: its own step fails with a sentence, and nothing else is affected."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, field_validator

from agent_core.runtimes.fake import FakeProcess, FakeRuntime
from outrider.steps import StepContext, StepPlan, StepType, hookimpl
from outrider.v1 import types_pb2 as types
from tests.agent_rig import BASE_IMAGE, Rig, rig

RELEASED = threading.Event()


class Params(BaseModel, extra="forbid"):
    how: str = "well"

    @field_validator("how")
    @classmethod
    def _hostile(cls, value: str) -> str:
        if value == "validator-exits":
            sys.exit(3)
        if value == "validator-hangs":
            _spin()
        if value == "validator-refuses":
            raise ValueError("not today")
        return value


class Outputs(BaseModel, extra="allow"):
    word: str = ""

    @field_validator("word")
    @classmethod
    def _hostile(cls, value: str) -> str:
        if value == "exit":
            sys.exit(3)
        if value == "hang":
            _spin()
        return value


def _spin() -> None:
    while True:
        time.sleep(0.01)


def resolve(params: Params, context: StepContext) -> Any:
    match params.how:
        case "exits":
            sys.exit(3)
        case "asserts":
            raise AssertionError
        case "hangs":
            _spin()
        case "nothing":
            return None
        case "waits":
            RELEASED.wait(20)
        case "inputs":
            return StepPlan(image=BASE_IMAGE, inputs={"x": object()})
        case "nul":
            return StepPlan(image=BASE_IMAGE, args=("a\0b",))
        case "surrogate":
            return StepPlan(image=BASE_IMAGE, env={"A": "\ud800"})
        case "mutates":
            context.node["arch"] = "stolen"  # type: ignore[index]
            params.how = "changed"
    return StepPlan(image=BASE_IMAGE, args=(params.how,))


class Plugin:
    @hookimpl
    def outrider_step_types(self) -> list[StepType]:
        return [StepType(name="odd.step", params=Params, outputs=Outputs, resolve=resolve)]


@pytest.fixture(autouse=True)
def held() -> Iterator[None]:
    RELEASED.clear()
    yield
    RELEASED.set()


async def program(process: FakeProcess) -> int:
    outrider = next(Path(mount.source) for mount in process.spec.mounts if mount.target == "/outrider")
    inputs = json.loads((outrider / "inputs.json").read_text())
    with (outrider / "outputs").open("a") as file:
        file.write(json.dumps({"word": process.spec.args[0].removeprefix("outputs-"), "inputs": inputs}) + "\n")
    return 0


async def pause(process: FakeProcess) -> int:
    await process.signalled.wait()
    return 0


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Rig]:
    runtime = FakeRuntime({BASE_IMAGE: program, "outrider/pause:1": pause}, images=set())
    async with rig(tmp_path / "state", runtime, node_id="n1") as started:
        plugins = started.services.plugins
        plugins.register(Plugin(), name="odd", distribution="outrider-odd", version="1")
        plugins.limit_s = 1
        yield started


def pipeline(*hows: str) -> str:
    # `if` keeps a step from being planned, and refused, before the run has begun.
    steps = [
        {"name": f"s{n}", "uses": "odd.step", "with": {"how": how}, "if": "always()"} for n, how in enumerate(hows)
    ]
    return json.dumps({"name": "p", "steps": steps})


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("exits", "step type odd.step can't make a plan for step s0: SystemExit: 3"),
        ("asserts", "step type odd.step can't make a plan for step s0: AssertionError"),
        ("hangs", "step type odd.step can't make a plan for step s0: it had not ended after 1 s"),
        ("nothing", "step type odd.step made no StepPlan for step s0"),
        ("inputs", "inputs are to be a JSON object"),
        ("nul", "it has a NUL character in it"),
        ("surrogate", "surrogates not allowed"),
        ("validator-exits", "the parameters of step s0 can't be checked by odd.step: SystemExit: 3"),
        ("validator-hangs", "the parameters of step s0 can't be checked by odd.step: it had not ended after 1 s"),
        ("validator-refuses", "not today"),
        ("outputs-exit", "the outputs of step s0 can't be checked by odd.step: SystemExit: 3"),
        ("outputs-hang", "the outputs of step s0 can't be checked by odd.step: it had not ended after 1 s"),
    ],
)
async def test_a_step_type_that_misbehaves_fails_its_step_alone(agent: Rig, how: str, says: str) -> None:
    told = await agent.run(pipeline(how, "well"))
    bad, good = told.steps["s0"], told.steps["s1"]
    assert bad.state == types.STEP_STATE_FAILED
    assert says in bad.failure.message
    assert "Traceback" not in bad.failure.message
    assert good.state == types.STEP_STATE_SUCCEEDED


async def test_a_slow_plan_holds_nobody_up(agent: Rig) -> None:
    """It waits for what the agent's loop does afterwards: on the loop itself it would wait for ever."""
    agent.services.plugins.limit_s = 30
    asyncio.get_running_loop().call_later(0.1, RELEASED.set)
    began = time.monotonic()
    told = await agent.run(pipeline("waits"))
    assert told.steps["s0"].state == types.STEP_STATE_SUCCEEDED
    assert time.monotonic() - began < 15


async def test_what_a_plan_does_to_what_it_was_given_is_seen_by_nobody(agent: Rig) -> None:
    before = dict(agent.services.facts)
    told = await agent.run(pipeline("mutates"))
    assert told.steps["s0"].state == types.STEP_STATE_SUCCEEDED
    assert agent.services.facts == before
    assert json.loads(told.steps["s0"].outputs_json)["inputs"] == {"how": "mutates"}


async def test_what_is_refused_before_a_run_begins_is_told_at_once(agent: Rig) -> None:
    told = await agent.run(pipeline("nothing").replace('"if": "always()"', '"timeout": "1m"'))
    assert "made no StepPlan" in told.failure.message


def test_a_plan_says_what_is_wrong_with_it() -> None:
    with pytest.raises(ValueError, match="NUL"):
        StepPlan(image="i", entrypoint=("a\0",))
    with pytest.raises(ValueError, match="JSON object"):
        StepPlan(image="i", inputs={"a": float("nan")})
