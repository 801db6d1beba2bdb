"""The server is killed before and after every commit that it makes, and each commit meets a full disk.

Scenarios are what needs the commits; `SCENARIOS` says which scenario reaches which. Each runs in the default suite
with a SIGKILL at all its commits, one after another, and the greatest with a disk that is full at each. The long form
has that for all of them, and one run of the scenario for each commit and side alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import shutil
import signal
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from outrider.v1 import control_service_pb2 as cs
from outrider.v1 import node_service_pb2 as npb
from outrider.v1 import types_pb2 as types
from server_core import backup
from server_core.config import ServerConfig
from server_core.store import events, logs, retention, runs
from server_core.store.commits import Commit
from server_core.store.sqlite import SqliteDatabase
from tests.faults.attack import Attack
from tests.faults.launcher import Launcher
from tests.faults.rig import BASE, Operator, Rig, pipeline, step_of
from tests.integration.server_rig import PIPELINE, FakeAgent

pytestmark = pytest.mark.timeout(300)  # thirty deaths in a row take a while on a slow machine

HISTORY = Path(__file__).parents[1] / "unit/server/histories/store-0001.sql"
HISTORY_KEY = bytes(range(32))


@pytest.fixture(scope="module")
def rig(launcher: Launcher) -> Iterator[Rig]:
    """One for all: what earlier scenarios left must survive the later ones, too."""
    with Rig.start(launcher=launcher) as made:
        yield made


def fresh(word: str) -> str:
    return f"{word}-{secrets.token_hex(3)}"


# -- scenarios with a real agent


def deploy(rig: Rig, attack: Attack) -> None:
    """A run with everything that belongs to it, asked for once and repeated until it is answered."""
    name, key = fresh("arena"), fresh("key")
    env = rig.operator.call("SetEnvSet", cs.SetEnvSetRequest(name=name, values={"KEY": "v"}))
    assert env.version == 1
    rig.set_object(f"game/{name}", slots=16)
    text = pipeline(
        step_of("a", held=True),
        step_of("b"),
        writeback=[{"attribute": "slots", "value": "${{ args.slots }}"}],
        args={"slots": {"type": "integer"}},
    )
    run_id = rig.execute(text, key=key, object_=f"game/{name}")
    rig.until_running(run_id, "a")
    rig.release("a")
    run = rig.ended(run_id)
    (rig.marks / "go-a").unlink()
    assert run.state == types.RUN_STATE_SUCCEEDED
    ref = types.ObjectRef(kind="game", name=name)
    found = rig.operator.call("GetObject", cs.GetObjectRequest(ref=ref))
    assert (found.version, found.status_version, found.status_json) == (1, 1, b'{"slots":16}')
    assert rig.execute(text, key=key, object_=f"game/{name}") == run_id
    # A connection that is lost ahead of the acknowledgement makes it needless: the node says that it has the run.
    while any(Commit.RUN_ACKNOWLEDGED in point for point in attack.left):
        assert rig.ended(rig.execute(pipeline(step_of("b")))).state == types.RUN_STATE_SUCCEEDED
    # What is not part of a run: what the node reports of its managed containers, and that it was seen.
    game = fresh("game")
    labels = [f"--label=outrider.node={rig.node_id}", "--label=outrider.kind=managed"]
    rig.docker("run", "--rm", "--name", game, *labels, BASE, "true")
    rig.until(lambda: told(rig, "container.exited", game), what="the end of the game")
    attack.until_spent()
    assert told(rig, "container.exited", game) == 1


def queue_and_cancel(rig: Rig, attack: Attack) -> None:
    """A run that waits for another of its object, which is cancelled; then the object and a set go."""
    name = fresh("arena")
    rig.set_object(f"game/{name}", slots=16)
    rig.operator.call("SetEnvSet", cs.SetEnvSetRequest(name=name, values={"KEY": "v"}))
    held = fresh("held")
    first = rig.execute(pipeline(step_of(held, held=True)), object_=f"game/{name}")
    rig.until_running(first, held)
    second = rig.execute(pipeline(step_of("b")), object_=f"game/{name}")
    rig.until(lambda: first in rig.run(second).reason, what="the second run waiting for the first")
    rig.cancel(first)
    assert rig.ended(first).state == types.RUN_STATE_CANCELLED
    assert rig.ended(second).state == types.RUN_STATE_SUCCEEDED
    ref = types.ObjectRef(kind="game", name=name)
    rig.operator.call("RemoveObject", cs.RemoveObjectRequest(ref=ref))
    rig.operator.call("RemoveEnvSet", cs.RemoveEnvSetRequest(name=name))
    assert refusal(rig, "GetObject", cs.GetObjectRequest(ref=ref)) is grpc.StatusCode.NOT_FOUND
    for type_, subject in (("object.removed", f"game/{name}"), ("env.removed", name), ("run.cancel_requested", first)):
        assert told(rig, type_, subject) == 1


def retry(rig: Rig, attack: Attack) -> None:
    """A failed run that is carried out again from the step that failed: one new run."""
    first = rig.execute(pipeline(step_of("a"), step_of("b", then="exit 1")))
    assert rig.ended(first).state == types.RUN_STATE_FAILED
    again = rig.operator.call("RetryRun", cs.RetryRunRequest(run_id=first, reason="a test", allow_offline=True))
    rig.accepted[again.run_id] = {}
    assert rig.ended(again.run_id).state == types.RUN_STATE_FAILED
    assert rig.run(first).retried_by == again.run_id
    assert told(rig, "run.retried", first) == 1


def drain(rig: Rig, attack: Attack) -> None:
    """A node that is drained with a deadline, and says so once it is true."""
    held = fresh("held")
    run_id = rig.execute(pipeline(step_of(held, held=True)))
    rig.until_running(run_id, held)
    request = cs.DrainNodeRequest(node_id=rig.node_id, reason="a test")
    request.deadline.FromMilliseconds(500)
    before = told(rig, "node.drained", rig.node_id)
    rig.operator.call("DrainNode", request)
    try:
        assert rig.ended(run_id).state == types.RUN_STATE_CANCELLED
        rig.until(lambda: told(rig, "node.drained", rig.node_id) > before, what="the node drained")
        attack.until_spent()
        assert told(rig, "node.drained", rig.node_id) == before + 1
        assert told(rig, "run.cancel_requested", run_id) == 1
    finally:
        rig.operator.call("DrainNode", cs.DrainNodeRequest(node_id=rig.node_id, undo=True))


def add_and_remove_nodes(rig: Rig, attack: Attack) -> None:
    """A node whose token works as soon as it was shown, until it is removed."""
    name = fresh("node")
    added = rig.operator.call("AddNode", cs.AddNodeRequest(node_id=name))
    assert added.token
    rig.operator.call("RemoveNode", cs.RemoveNodeRequest(node_id=name))
    assert refusal(rig, "GetNode", cs.GetNodeRequest(node_id=name)) is grpc.StatusCode.NOT_FOUND
    for type_ in ("node.added", "node.removed"):
        assert told(rig, type_, name) == 1


def assign_roles(rig: Rig, attack: Attack) -> None:
    """A role that a node gets and loses again; made once, changed once, removed once."""
    node, role = fresh("node"), fresh("role")
    rig.operator.call("AddNode", cs.AddNodeRequest(node_id=node))
    lock = f"outrider==0.1.0 --hash=sha256:{'0' * 64}\n".encode()
    made = rig.operator.call("SetNodeRole", cs.SetNodeRoleRequest(role=types.NodeRole(name=role, lock=lock)))
    assert made.version == 1
    given = rig.operator.call("AssignNodeRole", cs.AssignNodeRoleRequest(node_id=node, role=role))
    assert (given.role, given.version) == (role, 2)
    assert rig.operator.call("AssignNodeRole", cs.AssignNodeRoleRequest(node_id=node)).role == ""
    rig.operator.call("RemoveNodeRole", cs.RemoveNodeRoleRequest(name=role))
    assert refusal(rig, "GetNodeRole", cs.GetNodeRoleRequest(name=role)) is grpc.StatusCode.NOT_FOUND
    for type_, times in (("node_role.changed", 1), ("node_role.removed", 1)):
        assert told(rig, type_, role) == times
    assert told(rig, "node.role_changed", node) == 2


# -- scenarios with an agent that does as it is told


class Stub(FakeAgent):
    """Refuses runs, or says that it can't know what became of them; stops containers."""

    def __init__(self, rig: Rig, node_id: str, token: str, seen: set[str], *, refuses: bool) -> None:
        place: Any = SimpleNamespace(address=rig.address, ca=(rig.folder / "server/tls/ca.pem").read_bytes())
        super().__init__(place, node_id, token, on_command=Stub._carry_out, acknowledges=False)
        self._seen = seen
        self._refuses = refuses

    async def _take(self, message: npb.ServerMessage) -> None:
        await super()._take(message)
        if not message.HasField("command"):
            return
        command = message.command
        self._seen.add(command.command_id)
        ack = npb.CommandAck(command_id=command.command_id)
        if command.HasField("run_pipeline") and self._refuses:
            ack.refused.CopyFrom(types.Failure(error_class=types.ERROR_CLASS_PERMANENT, code="no", message="not here"))
        await self.send(command_ack=ack)
        if command.HasField("run_pipeline") and not self._refuses:
            unknown = types.StepStatus(name="say", state=types.STEP_STATE_UNKNOWN, attempt=1)
            await self.report(command.run_pipeline, types.RUN_STATE_UNKNOWN, unknown)

    def _carry_out(self, command: npb.Command) -> npb.CommandResult | None:
        if not command.HasField("container"):
            return None
        stopped = types.Container(name=command.container.name, state="exited")
        return npb.CommandResult(command_id=command.command_id, containers=[stopped])

    async def live(self) -> None:
        """One connection, from registration to whatever ends it."""
        try:
            await self.register()
            await self.connect()
            assert self.reader is not None
            while not self.reader.done():
                await self.heartbeat()
                await asyncio.wait({self.reader}, timeout=0.3)
        finally:
            await self.stop()


@contextlib.asynccontextmanager
async def stub_node(rig: Rig, *, refuses: bool) -> AsyncIterator[tuple[str, set[str]]]:
    """A node of its own that comes back as often as it is cut off; its name, and the ids of commands it got."""
    name, seen = fresh("stub"), set[str]()
    added = await asyncio.to_thread(rig.operator.call, "AddNode", cs.AddNodeRequest(node_id=name))

    async def keep() -> None:
        while True:
            with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
                await Stub(rig, name, added.token, seen, refuses=refuses).live()
            await asyncio.sleep(0.1)

    task = asyncio.create_task(keep())
    try:
        yield name, seen
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.to_thread(rig.operator.call, "RemoveNode", cs.RemoveNodeRequest(node_id=name))


def refuse_a_run(rig: Rig, attack: Attack) -> None:
    """A run that its node refuses fails once, with the node's reason."""

    async def scenario() -> None:
        async with stub_node(rig, refuses=True) as (node, _):
            run = await executed(rig, node)
            ended = await asyncio.to_thread(rig.ended, run.run_id)
            assert (ended.state, ended.failure.code) == (types.RUN_STATE_FAILED, "no")
            assert told(rig, "run.finished", run.run_id) == 1

    asyncio.run(scenario())


def resolve(rig: Rig, attack: Attack) -> None:
    """A run of which nobody knows what became is settled once."""

    async def scenario() -> None:
        async with stub_node(rig, refuses=False) as (node, _):
            run = await executed(rig, node)
            assert (await asyncio.to_thread(rig.ended, run.run_id)).state == types.RUN_STATE_UNKNOWN
            request = cs.ResolveRunRequest(
                run_id=run.run_id, verdict=types.Settlement.VERDICT_SUCCEEDED, reason="I have looked"
            )
            await asyncio.to_thread(rig.operator.call, "ResolveRun", request)
            assert rig.run(run.run_id).state == types.RUN_STATE_SUCCEEDED
            assert told(rig, "run.resolved", run.run_id) == 1

    asyncio.run(scenario())


def stop_a_container(rig: Rig, attack: Attack) -> None:
    """An operator's stop is one command to the node, however often it is repeated, and answered."""

    async def scenario() -> None:
        async with stub_node(rig, refuses=False) as (node, seen):
            request = cs.ContainerRequest(node_id=node, name="web", request_id=fresh("stop"))
            for _ in range(2):
                stopped = await asyncio.to_thread(rig.operator.call, "StopContainer", request)
                assert (stopped.name, stopped.state) == ("web", "exited")
            assert len(seen) == 1

    asyncio.run(scenario())


async def executed(rig: Rig, node: str) -> types.Run:
    def execute() -> types.Run:
        # It has to have registered once before anything can be checked against it.
        rig.until(lambda: rig.operator.call("GetNode", cs.GetNodeRequest(node_id=node)).epoch, what="the stub's epoch")
        request = cs.ExecutePipelineRequest(node_id=node, pipeline_yaml=PIPELINE, allow_offline=True)
        run: types.Run = rig.operator.call("ExecutePipeline", request)
        return run

    return await asyncio.to_thread(execute)


# -- scenarios without a node


def keep_house(rig: Rig, attack: Attack) -> None:
    """Old events and logs go, and runs stay."""
    rig.until(lambda: told(rig, "store.retired", "store"), what="old logs and events removed")
    attack.until_spent()
    db = rig.store.with_name("copy.db")
    with contextlib.closing(sqlite3.connect(rig.store)) as source, contextlib.closing(sqlite3.connect(db)) as target:
        source.backup(target)
    copy = SqliteDatabase(db)
    try:
        for number in range(3):
            assert copy.write_now(Commit.SERVER_START, lambda c, n=number: runs.get(c, f"old{n}")).run_id  # type: ignore[misc]
            [gap], _ = copy.write_now(Commit.SERVER_START, lambda c, n=number: logs.read(c, f"old{n}", after=0))  # type: ignore[misc]
            assert (gap.gap_bytes, gap.data) == (6, b"")
        assert not copy.write_now(Commit.SERVER_START, retention.runs_with_oldest_logs)
    finally:
        copy.close()


HOUSE = {
    "OUTRIDER_SERVER_HOUSEKEEPING_INTERVAL_S": "0.2",
    "OUTRIDER_SERVER_KEEP_EVENTS": "1",
    "OUTRIDER_SERVER_KEEP_STORE_BYTES": "1",
}


def furnish(store: Path) -> None:
    """Runs that are over, with logs, and events."""
    db = SqliteDatabase(store)
    for number in range(3):
        run_id, steps = f"old{number}", [types.StepStatus(name="a")]
        new = runs.NewRun(run_id, "l", "operator:a", run_id, b"", "p", b"", b"", "n", None, {}, [], 0, steps)
        chunk = types.RunLogChunk(run_id=run_id, step="a", attempt=1, stream=types.LOG_STREAM_STDOUT, data=b"hello\n")

        def work(connection: Any, new: runs.NewRun = new, chunk: types.RunLogChunk = chunk) -> None:
            runs.accept(connection, new)
            logs.append(connection, "n", [logs.measure(chunk)])
            runs.settle(connection, new.run_id, runs.FAILED, None)
            for _ in range(5):
                events.add(connection, "run.accepted", new.run_id)

        db.write_now(Commit.RUN_ACCEPT, work)
    db.close()


Scenario = Callable[[Rig, Attack], None]
SCENARIOS: dict[Scenario, tuple[Commit, ...]] = {
    deploy: (
        Commit.SERVER_START, Commit.OBJECT_SET, Commit.ENV_SET, Commit.RUN_ACCEPT, Commit.RUN_SENT,
        Commit.RUN_ACKNOWLEDGED, Commit.SESSION_BEGIN, Commit.RECONCILED, Commit.NODE_PRESENCE, Commit.NODES_SEEN,
        Commit.RUN_REPORT, Commit.LOGS, Commit.EVENTS, Commit.WRITE_BACK,
    ),
    queue_and_cancel: (Commit.RUN_WAITS, Commit.RUN_CANCEL, Commit.OBJECT_REMOVE, Commit.ENV_REMOVE),
    retry: (Commit.RUN_RETRY,),
    drain: (Commit.NODE_DRAIN, Commit.NODE_DRAINED, Commit.DRAIN_DEADLINE),
    add_and_remove_nodes: (Commit.NODE_ADD, Commit.NODE_REMOVE),
    assign_roles: (Commit.NODE_ROLE_SET, Commit.NODE_ASSIGN, Commit.NODE_ROLE_REMOVE),
    refuse_a_run: (Commit.RUN_SETTLED,),
    resolve: (Commit.RUN_RESOLVE,),
    stop_a_container: (Commit.CONTAINER_ANSWER,),
    keep_house: (Commit.REQUESTS_FORGOTTEN, Commit.EVENTS_RETIRED, Commit.LOGS_RETIRED),
}  # fmt: skip
COMMANDS = (Commit.SERVER_INIT, Commit.SCHEMA_UPGRADE, Commit.STORE_RESTORED)
"""Not made by a server that serves: each has a test of its own below."""


def test_every_commit_of_the_server_has_a_scenario() -> None:
    reached = [commit for commits in SCENARIOS.values() for commit in commits] + list(COMMANDS)
    assert sorted(reached) == sorted(Commit)


def points(*commits: Commit) -> list[str]:
    return [point for commit in commits for point in (commit.before, commit.after)]


def attacked(rig: Rig, launcher: Launcher, scenario: Scenario, armed: list[str], action: str) -> Attack:
    """Run a scenario under attack and compare everything afterwards."""
    if scenario is not keep_house:
        with Attack(rig, armed, action=action) as attack:
            scenario(rig, attack)
            attack.until_spent()
        rig.until_online()
        rig.check()
        return attack
    with Rig.start(launcher=launcher, running=False) as own:
        furnish(own.store)
        own.start_server(**HOUSE)
        with Attack(own, armed, action=action, **HOUSE) as attack:
            scenario(own, attack)
        return attack


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_server_killed_at_one_commit_after_another_loses_and_repeats_nothing(
    rig: Rig, launcher: Launcher, scenario: Scenario
) -> None:
    armed = points(*SCENARIOS[scenario])
    attack = attacked(rig, launcher, scenario, armed, "kill")
    assert attack.deaths == [-signal.SIGKILL] * len(armed), attack.said


@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(scenario, id=scenario.__name__, marks=[] if scenario is deploy else pytest.mark.long)
        for scenario in SCENARIOS
    ],
)
def test_disk_that_is_full_at_one_commit_after_another_loses_and_repeats_nothing(
    rig: Rig, launcher: Launcher, scenario: Scenario
) -> None:
    attack = attacked(rig, launcher, scenario, points(*SCENARIOS[scenario]), "fail")
    # Only what can't even start ends, with a sentence; what serves goes on.
    assert all(status > 0 for status in attack.deaths)
    assert len(attack.deaths) <= 2 * (Commit.SERVER_START in SCENARIOS[scenario])


@pytest.mark.long
@pytest.mark.parametrize(
    ("scenario", "point"),
    [
        pytest.param(scenario, point, id=point)
        for scenario, commits in SCENARIOS.items()
        for point in points(*commits)
    ],
)  # fmt: skip
def test_server_killed_at_a_commit_loses_and_repeats_nothing(
    rig: Rig, launcher: Launcher, scenario: Scenario, point: str
) -> None:
    attack = attacked(rig, launcher, scenario, [point], "kill")
    assert attack.deaths == [-signal.SIGKILL]


# -- commands


def killed(launcher: Launcher, folder: Path, *arguments: object, at: str) -> None:
    """Run `outrider` with these arguments, armed; it must die at that point."""
    env = {"OUTRIDER_FAILPOINTS": f"{at}=kill", "PATH": "/usr/bin:/bin"}
    assert launcher.start(arguments, env, folder / "output.log").wait() == -signal.SIGKILL


def succeeds(launcher: Launcher, folder: Path, *arguments: object) -> str:
    """Run `outrider` with these arguments; what it says from now on."""
    output = folder / "output.log"
    before = output.stat().st_size if output.exists() else 0
    status = launcher.start(arguments, {"PATH": "/usr/bin:/bin"}, output).wait()
    said = output.read_bytes()[before:].decode()
    assert status == 0, said
    return said


@pytest.mark.parametrize("at", points(Commit.SERVER_INIT))
def test_killed_init_is_done_again(launcher: Launcher, tmp_path: Path, at: str) -> None:
    data_dir = tmp_path / "server"
    killed(launcher, tmp_path, "server", "init", "--data-dir", data_dir, at=at)
    # A token that was stored and never shown is of no use: it is replaced.
    again = [] if at == Commit.SERVER_INIT.before else ["--new-token"]
    assert "oro_" in succeeds(launcher, tmp_path, "server", "init", "--data-dir", data_dir, *again)


@pytest.mark.parametrize("at", points(Commit.SCHEMA_UPGRADE))
def test_server_killed_while_it_brings_its_store_up_to_date_starts_with_all_that_is_in_it(
    launcher: Launcher, at: str
) -> None:
    with Rig.start(launcher=launcher, running=False) as rig:
        rig.store.unlink()
        (rig.folder / "server/store.db.seal").unlink()
        with contextlib.closing(sqlite3.connect(rig.store)) as db:
            db.executescript(HISTORY.read_text())
        (rig.folder / "server/master.key").write_bytes(HISTORY_KEY)
        assert rig.start_server(failpoints=f"{at}=kill").wait() == -signal.SIGKILL
        rig.start_server()
        ca = (rig.folder / "server/tls/ca.pem").read_bytes()
        operator = Operator(rig.address, ca, "oro_fixture")
        listed = operator.call("ListRuns", cs.ListRunsRequest()).runs
        operator.close()
        assert sorted(run.run_id for run in listed) == ["r0", "r1", "r2"]


@pytest.mark.parametrize("at", [*points(Commit.STORE_RESTORED), "restore.keys.after", "restore.aside.after"])
def test_killed_restore_is_done_again_and_loses_nothing_of_what_was_there(
    launcher: Launcher, tmp_path: Path, at: str
) -> None:
    data_dir, file, word = tmp_path / "server", tmp_path / "backup", tmp_path / "word"
    succeeds(launcher, tmp_path, "server", "init", "--data-dir", data_dir)
    word.write_text("correct horse battery\n")
    made = backup.make(ServerConfig(data_dir=data_dir), file, passphrase=word.read_bytes().strip())
    former = (data_dir / "store.db").read_bytes()
    restore = ["server", "restore", file, "--data-dir", data_dir, "--passphrase-file", word, "--replace"]
    killed(launcher, tmp_path, *restore, at=at)
    succeeds(launcher, tmp_path, *restore)
    assert any(kept.read_bytes() == former for kept in data_dir.glob("replaced-*/store.db"))
    assert not (data_dir / ".restore").exists()
    db = SqliteDatabase(data_dir / "store.db")
    found = db.write_now(Commit.SERVER_START, lambda c: events.after(c, 0, cs.EventFilter(types=["store.restored"]), 9))
    db.close()
    assert json.loads(found[0].data_json)["backup_made_at"] == made.made_at.isoformat()
    shutil.rmtree(data_dir)


# -- what scenarios ask


def told(rig: Rig, type_: str, subject: str) -> int:
    """How often the server says that this happened."""
    with contextlib.closing(sqlite3.connect(f"file:{rig.store}?mode=ro", uri=True, timeout=10)) as db:
        sql = "SELECT count(*) FROM events WHERE type = ? AND subject = ?"
        return int(db.execute(sql, (type_, subject)).fetchone()[0])


def refusal(rig: Rig, method: str, request: Any) -> grpc.StatusCode:
    """With which status a call is refused."""
    with pytest.raises(grpc.RpcError) as caught:
        rig.operator.call(method, request)
    error = caught.value
    assert isinstance(error, grpc.Call)
    return error.code()
