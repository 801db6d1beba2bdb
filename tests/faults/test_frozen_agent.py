"""An agent that stands still takes no game with it, though it reads the game's log."""

from __future__ import annotations

import contextlib
import itertools
import json
import time

from outrider.v1 import control_service_pb2 as cs
from outrider.v1 import types_pb2 as types
from tests.faults.rig import BASE, Rig, pipeline

LOUD = """
import os, sys, time
while not os.path.exists("/marks/go-game"):
    print("waiting", flush=True)
    time.sleep(0.1)
for _ in range(32 * 1024):
    sys.stdout.buffer.write(b"x" * 1023 + b"\\n")
"""


def test_a_game_that_writes_much_beside_a_frozen_agent_comes_to_its_end(rig: Rig) -> None:
    name = f"{rig.node_id}-game"
    start = {
        "name": "start",
        "uses": "container.start",
        "with": {
            "name": name,
            "image": BASE,
            "args": ["python3", "-c", LOUD],
            "volumes": {"marks": "/marks"},
            "live": {"log": "never said"},  # the agent reads along
            "restart": "no",
            "ready": {"log": "waiting"},
        },
        "volumes": {"marks": "/marks:rw"},
    }
    run = rig.ended(rig.execute(pipeline(start), expected={}))
    assert run.state == types.RUN_STATE_SUCCEEDED, run
    # Somebody watches, too. Two pieces: what was there, and what the agent has read since.
    watching = rig.operator.stream(
        "StreamContainerLogs", cs.ContainerLogsRequest(node_id=rig.node_id, name=name, follow=True), timeout_s=60
    )
    with contextlib.closing(watching):
        assert [b"waiting" in piece.data for piece in itertools.islice(watching, 2)] == [True, True]
        rig.agent.freeze()
        rig.release("game")
        state = ("inspect", "--format", "{{.State.Status}}", name)
        rig.until(lambda: rig.docker(*state).strip() == "exited", 30, "its end")
        begun = time.monotonic()
        (found,) = json.loads(rig.docker("inspect", name))
        assert time.monotonic() - begun < 5
        assert found["State"]["ExitCode"] == 0
        assert found["Config"]["Labels"]["outrider.kind"] == "managed"
        written = rig.docker("logs", name)
        assert written.count("x" * 1023 + "\n") == 32 * 1024
        assert rig.agent.poll() is None
    rig.agent.thaw()
    rig.until_online()
    rig.operator.call("RemoveContainer", cs.ContainerRequest(node_id=rig.node_id, name=name))
    rig.check()
