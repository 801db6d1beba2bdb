"""The program of the container steps, on the control socket of an agent with the fake engine."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from outrider_stepkit import Step, StepFailure

from agent_core.container_spec import ManagedSpec
from agent_core.control import SOCKET_NAME, ControlSocket
from agent_core.runtimes.fake import FakeProcess

if TYPE_CHECKING:
    from conftest import Parts

SOURCE = Path(__file__).parents[3] / "plugins/container/program/__main__.py"
START = {"env_from": [], "files": {}} | {
    "request": {"name": "arena", "image": "wordy:1", "env": {}, "ready": {"log": "is up"}, "replace": "stop-first"}
}
EXEC = {"name": "arena", "args": ["save"], "env": {}, "env_from": [], "workdir": None, "user": None} | {
    "timeout": 60.0, "ok": [0], "capture": True
}  # fmt: skip


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    found = importlib.util.spec_from_file_location("container_program", SOURCE)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    monkeypatch.setattr(module, "_AGAIN_S", 0.01)
    return module


Carry = Callable[[Callable[[Step], None], dict[str, Any]], Any]


@pytest.fixture
async def carried_out(parts: Parts) -> AsyncIterator[Carry]:
    """Carries an action out as one attempt: gives its outputs, or raises what it ends with."""
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        control = ControlSocket(parts.containers, parts.scope, directory)
        await control.start()

        async def carry(action: Callable[[Step], None], params: dict[str, Any]) -> dict[str, Any]:
            step = Step(params, directory, {"OUTRIDER_CONTROL": str(directory / SOCKET_NAME)}, ())
            await asyncio.to_thread(action, step)
            outputs: dict[str, Any] = json.loads((directory / "outputs").read_text())
            return outputs

        yield carry
        await control.aclose(attempt_over=True)


async def start(parts: Parts) -> None:
    spec = ManagedSpec.parse({"name": "arena", "image": "game:1", "ready": {"log": "is up"}})
    await parts.containers.start(spec, parts.scope)


async def test_program_that_took_too_long_is_not_run_again(
    program: ModuleType, parts: Parts, carried_out: Carry
) -> None:
    """Exit code 75 would have the step tried again, whose type is not one that may be done twice."""

    async def endless(process: FakeProcess, args: Sequence[str]) -> tuple[int, bytes]:
        await asyncio.sleep(60)
        return 0, b""

    parts.runtime.executed["save"] = endless
    await start(parts)
    with pytest.raises(StepFailure, match=r"did not end within 0\.1 s") as failed:
        await carried_out(program.execute, EXEC | {"timeout": 0.1})
    assert (failed.value.code, failed.value.temporary) == ("exec_timeout", False)


async def test_engine_that_does_not_answer_is_asked_how_the_program_ended_and_not_to_run_it_again(
    program: ModuleType, parts: Parts, carried_out: Carry
) -> None:
    saves = 0

    async def save(process: FakeProcess, args: Sequence[str]) -> tuple[int, bytes]:
        nonlocal saves
        saves += 1
        return 0, b""

    parts.runtime.executed["save"] = save
    await start(parts)
    parts.runtime.unanswered["exec_inspect", "arena"] = False
    assert (await carried_out(program.execute, EXEC | {"capture": False}))["exit_code"] == 0
    assert saves == 1


async def test_restart_that_nobody_saw_the_end_of_is_not_done_again(
    program: ModuleType, parts: Parts, carried_out: Carry
) -> None:
    await start(parts)
    parts.runtime.unanswered["stop", "arena"] = False
    with pytest.raises(StepFailure, match="whether arena was restarted is not known") as failed:
        await carried_out(program.restart, {"name": "arena", "grace": None})
    assert failed.value.temporary is False


async def test_start_that_fails_is_told_with_the_end_of_the_log_and_what_became_of_the_former(
    program: ModuleType, parts: Parts, carried_out: Carry
) -> None:
    async def wordy(process: FakeProcess) -> int:
        for number in range(20):
            process.write(f"{number}: {'word ' * 32}\n".encode())
        process.write(b"bye\nFATAL: no such map\n")
        return 7

    parts.runtime.programs["wordy:1"] = wordy
    await start(parts)
    with pytest.raises(StepFailure, match=r" \| bye \| FATAL: no such map$") as failed:
        await carried_out(program.start, START)
    assert "(the former container runs again); its log ends with: | …" in str(failed.value)
