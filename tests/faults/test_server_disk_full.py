"""The server's disk fills up: it says so clearly, keeps what it acknowledged, and goes on once there is room."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from outrider.errors import OutriderError
from outrider.v1 import control_service_pb2 as cs
from outrider.v1 import types_pb2 as types
from outrider.wire import from_rpc_error
from tests.faults.launcher import Launcher
from tests.faults.rig import Rig, pipeline, step_of

MIB = 1024**2
DISK_BYTES = 24 * MIB
RESERVE_BYTES = 4 * MIB
WITH_RESERVE = {"OUTRIDER_SERVER_DISK_RESERVE_BYTES": str(RESERVE_BYTES)}

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[None]:
    """A disk of 24 MiB at ``place``, in place of the folder that is there, with its content."""
    kept = place.with_name("kept")
    place.rename(kept)
    place.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", "none", place], check=True)
    try:
        subprocess.run(["cp", "-a", f"{kept}/.", place], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture(scope="module")
def place(launcher: Launcher) -> Iterator[Rig]:
    """Its server's data directory is on a small disk."""
    with Rig.start(launcher=launcher, running=False) as made, small_disk(made.folder / "server"):
        made.server_env = WITH_RESERVE
        made.start_server()
        made.start_agent()
        made.until_online()
        yield made
        made.server.kill()


@pytest.fixture
def rig(place: Rig) -> Rig:
    """The same for each test; what the former left does no harm."""
    place.server.kill()
    place.server_env = WITH_RESERVE
    place.start_server()
    place.until_online()
    (place.marks / "go-a").unlink(missing_ok=True)
    return place


@pytest.fixture
def ballast(rig: Rig) -> Path:
    return rig.folder / "server/ballast"


def free(rig: Rig) -> int:
    found = os.statvfs(rig.folder / "server")
    return found.f_bavail * found.f_frsize


def fill(ballast: Path, *, leave: int) -> None:
    """Take all of the disk but so many bytes."""
    found = os.statvfs(ballast.parent)
    size = found.f_bavail * found.f_frsize - leave
    with ballast.open("ab", buffering=0) as file:
        while size > 0:
            try:
                size -= file.write(b"\0" * size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                # The server has taken of it meanwhile.
                size = 0
                file.truncate(max(0, file.tell() - leave))


def refusal(rig: Rig, name: str) -> OutriderError | None:
    """Why an object can't be set; None if it can."""
    request = cs.SetObjectRequest(attributes_json=b'{"note": "%s"}' % (b"x" * 20_000))
    request.ref.kind, request.ref.name = "game", name
    try:
        rig.operator.call("SetObject", request, within_s=0)
    except grpc.RpcError as error:
        return from_rpc_error(error)
    return None


def test_new_work_is_refused_before_the_disk_is_full_and_what_runs_is_recorded_to_its_end(
    rig: Rig, ballast: Path
) -> None:
    run_id = rig.execute(pipeline(step_of("a", held=True), step_of("b")))
    rig.until_running(run_id, "a")
    fill(ballast, leave=RESERVE_BYTES - MIB)
    error = rig.until(lambda: refusal(rig, "first"))
    assert error.code == "store_disk_low"
    assert str(rig.folder / "server") in error.message
    assert "MiB are free" in error.message
    assert "make room" in error.hint
    rig.release("a")
    # The steps go on and are recorded; their logs wait on the node.
    rig.until(
        lambda: all(step.state == types.STEP_STATE_SUCCEEDED for step in rig.run(run_id).steps), what="both steps done"
    )
    ballast.unlink()
    rig.set_object("game/first", note="there is room")
    assert rig.ended(run_id).state == types.RUN_STATE_SUCCEEDED
    rig.check()


def test_disk_that_is_full_to_the_last_byte_loses_nothing_that_was_acknowledged(rig: Rig, ballast: Path) -> None:
    run_id = rig.execute(pipeline(step_of("a", held=True), step_of("b")), key="once")
    rig.until_running(run_id, "a")
    rig.set_object("game/before", slots=16)
    # Below the reserve nothing new comes in; so that writes meet the end of the disk, there is none now.
    rig.server.stop()
    rig.server_env = {"OUTRIDER_SERVER_DISK_RESERVE_BYTES": "0"}
    rig.start_server()
    rig.until_online()
    fill(ballast, leave=16 * 1024)
    acknowledged = 0
    while True:
        fill(ballast, leave=16 * 1024)  # what a checkpoint gave back
        try:
            rig.operator.call(
                "SetObject",
                cs.SetObjectRequest(
                    ref=types.ObjectRef(kind="game", name=f"n{acknowledged}"),
                    attributes_json=b'{"note": "%s"}' % (b"x" * 60_000),
                ),
                within_s=0,
            )
        except grpc.RpcError as caught:
            error = from_rpc_error(caught)
            break
        acknowledged += 1
        assert acknowledged < 2000, "the disk does not fill up"
    assert error.code == "store_unwritable"
    assert "full" in error.message
    assert "make room" in error.hint
    # It still answers, and ends without a word lost; the step ends while nothing can be written.
    assert run_id in {run.run_id for run in rig.operator.call("ListRuns", cs.ListRunsRequest()).runs}
    rig.release("a")
    rig.until(lambda: (rig.marks / f"ran-{run_id}-b").exists(), what="the second step running")
    rig.server.kill()
    ballast.unlink()
    rig.start_server()
    assert rig.ended(run_id).state == types.RUN_STATE_SUCCEEDED
    assert rig.execute(pipeline(step_of("a", held=True), step_of("b")), key="once") == run_id
    listed = {each.ref.name for each in rig.operator.call("ListObjects", cs.ListObjectsRequest(kind="game")).objects}
    assert {"before", *(f"n{number}" for number in range(acknowledged))} <= listed
    rig.check()


def test_server_on_a_full_disk_starts_or_says_why_not_and_starts_once_there_is_room(rig: Rig, ballast: Path) -> None:
    run_id = rig.execute(pipeline(step_of("a", held=True)))
    rig.until_running(run_id, "a")
    rig.server.kill()
    fill(ballast, leave=0)
    before = len(rig.output())
    status = None
    server = rig.start_server()
    with contextlib.suppress(AssertionError):
        status = server.wait(3)
    if status is None:
        # What is there can be read, and what can't be done is a sentence.
        assert rig.run(run_id).run_id == run_id
        error = refusal(rig, "full")
        assert error is not None
        assert error.code in ("store_disk_low", "store_unwritable")
        server.kill()
    else:
        assert status == 4
        said = rig.output()[-max(1, len(rig.output()) - before) :]
        assert "Traceback" not in said
        assert "are free on its disk" in said
    ballast.unlink()
    rig.start_server()
    rig.release("a")
    assert rig.ended(run_id).state == types.RUN_STATE_SUCCEEDED
    rig.check()
