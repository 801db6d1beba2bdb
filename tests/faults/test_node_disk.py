"""The disk of a node gets full, or its spool does: steps fail in a sentence, logs count what is missing, and the agent
goes on through it, is killed and started in it, and recovers from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from outrider.v1 import types_pb2 as types
from tests.faults.checker import read_logs
from tests.faults.launcher import Launcher
from tests.faults.rig import BASE, Rig, expected_of, pipeline, step_of
from tests.second_engine import second_engine
from tests.small_disk import fill, small_disk

RESERVE = 16 * 1024**2


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    # Of the tests' own: one that was there before need not see what is mounted now.
    with second_engine() as made:
        yield f"unix://{made.socket}"


@contextmanager
def node_on_a_small_disk(launcher: Launcher, engine: str) -> Iterator[tuple[Rig, Path]]:
    """A server and an agent, whose state directory is a disk of 96 MiB."""
    policy = {"disk_reserve_bytes": RESERVE}
    with contextlib.ExitStack() as stack:
        rig = stack.enter_context(Rig.start(launcher=launcher, engine=engine, policy=policy, running=False))
        disk = stack.enter_context(small_disk(rig.state_dir, 96))
        try:
            rig.start_server()
            rig.start_agent()
            rig.until_online()
            yield rig, disk
        finally:
            with contextlib.suppress(AttributeError):
                rig.agent.kill()


def shell(name: str, script: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "uses": "container.run", "with": {"image": BASE, "args": ["sh", "-c", script]}} | fields


def failure(run: types.Run, step: str) -> types.Failure:
    return next(each.failure for each in run.steps if each.name == step)


@pytest.mark.long
def test_a_step_that_fills_the_disk_fails_and_the_agent_does_not(launcher: Launcher, engine: str) -> None:
    with node_on_a_small_disk(launcher, engine) as (rig, disk):
        pid = rig.agent.pid
        # Not before the other has left its mark, which needs room as well.
        begin = "until [ -s /marks/ran-$OUTRIDER_RUN_ID-beside ]; do sleep 0.05; done; "
        mounts = {"v": "/v:rw", "marks": "/marks"}
        hog = shell("hog", f"{begin}cat /dev/zero > /v/fill", volumes=mounts, needs=[])
        run = rig.execute(pipeline(step_of("beside", held=True, needs=[]), hog, volumes={"v": {}}))
        rig.until_running(run, "beside")
        rig.until(lambda: rig.step_state(run, "hog") == types.STEP_STATE_FAILED, what="the hog's end")
        assert rig.step_state(run, "beside") == types.STEP_STATE_RUNNING
        rig.release("beside")
        ended = rig.ended(run)
        assert ended.state == types.RUN_STATE_FAILED
        assert failure(ended, "hog").code == "disk_full"
        assert "the node's disk is full" in failure(ended, "hog").message
        assert next(each.state for each in ended.steps if each.name == "beside") == types.STEP_STATE_SUCCEEDED
        # Its volume goes with the run, and with it what filled the disk.
        rig.until(lambda: rig.status()["disk"][0]["level"] == "ok", what="room on the disk")
        again = rig.execute(pipeline(step_of("after")))
        assert rig.ended(again).state == types.RUN_STATE_SUCCEEDED
        rig.check(gaps=True)
        assert rig.agent.poll() is None
        assert rig.status()["pid"] == pid
        assert (disk / "reserve.bin").exists()


def test_a_disk_that_somebody_else_fills_refuses_new_work_and_keeps_the_old(launcher: Launcher, engine: str) -> None:
    with node_on_a_small_disk(launcher, engine) as (rig, disk):
        run = rig.execute(pipeline(step_of("held", held=True), shell("then", "true")))
        rig.until_running(run, "held")
        hog = fill(disk)
        refused = rig.ended(rig.execute(pipeline(step_of("new"))))
        assert (refused.state, refused.failure.code) == (types.RUN_STATE_FAILED, "disk_full")
        assert "can't take on run" in refused.failure.message
        # Killed and started again without a byte to spare, it finds its step and sees it to its end.
        rig.kill_agent()
        rig.until_online()
        assert rig.step_state(run, "held") == types.STEP_STATE_RUNNING
        assert rig.status()["disk"][0]["level"] == "full"
        rig.release("held")
        ended = rig.ended(run)
        states = {each.name: each.state for each in ended.steps}
        assert states == {"held": types.STEP_STATE_SUCCEEDED, "then": types.STEP_STATE_FAILED}
        assert failure(ended, "then").code == "disk_full"
        hog.unlink()
        rig.until(lambda: rig.status()["disk"][0]["level"] == "ok", what="room on the disk")
        assert rig.ended(rig.execute(pipeline(step_of("after")))).state == types.RUN_STATE_SUCCEEDED
        rig.check(gaps=True)


def test_a_full_spool_cuts_logs_and_says_by_how_much(launcher: Launcher) -> None:
    with Rig.start(launcher=launcher, agent={"spool_max_bytes": 1024**2}) as rig:
        lines = 100_000
        run = rig.execute(
            pipeline(step_of("loud", lines=lines, held=True), step_of("next")),
            expected={"loud": expected_of("loud", lines)},
        )
        rig.until_running(run, "loud")
        rig.server.kill()
        rig.release("loud")
        rig.until(lambda: rig.status()["runs"] == [], what="the end of the run, without a server")
        assert rig.status()["spool_bytes"] <= 1024**2
        rig.start_server()
        assert rig.ended(run).state == types.RUN_STATE_SUCCEEDED
        rig.check(gaps=True)
        whole = expected_of("loud", lines).stdout
        log = read_logs(rig, run)[run, "loud", 1, "stdout"]
        assert len(log.gaps) == 1
        (offset, missing) = log.gaps[0]
        assert offset == len(log.data) >= 700_000
        assert log.data == whole[:offset]
        assert offset + missing == len(whole)
        assert next(each.stdout_bytes for each in rig.run(run).steps if each.name == "loud") == len(whole)
