"""A node's environment, made from its role and switched while a step runs: server, launcher and agents as processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_core.status import read_status
from outrider import launcher
from outrider.cli._client import Client, request_id
from outrider.cli._main import App
from outrider.cli._output import plain
from outrider.errors import Unavailable
from outrider.v1 import control_service_pb2 as pb
from outrider.v1 import types_pb2 as types
from tests.e2e.conftest import OUTRIDER, Dev
from tests.e2e.pipelines import pipeline, python
from tests.e2e.test_two_processes import Site, running_container, until
from tests.wheels import dependencies_wheel, lock_of, outrider_wheel, plugin_wheel, write_wheel

pytestmark = pytest.mark.timeout(400)  # environments are made: on a busy machine that takes a while
PATIENCE_S = 300.0
FAILED, INVALID = 1, 4
HOLD = "print('begin')\nwhile not os.path.exists('/area/go'): time.sleep(0.1)\nprint('end')\n"
MUTE = "\n\nasync def _mute(self):\n    self.asked.set()\n    await asyncio.Event().wait()\n\n\nSession.run = _mute\n"
BOOM = "\n\nasync def _boom(self):\n    raise RuntimeError('boom')\n\n\nAgent.run = _boom\n"


class RoleSite(Site):
    """A site whose node `roles` is started by the launcher, and wheels to make environments of."""

    wheels: Path
    locked: tuple[Path, ...]

    @property
    def state(self) -> Path:
        return self.folder / "agent"

    def options(self) -> list[object]:
        return [
            "--config",
            self.folder / "agent.yaml",
            "--token-file",
            self.folder / "token",
            "--state-dir",
            self.state,
        ]

    def start_launcher(self) -> None:
        command = [sys.executable, "-IS", launcher.__file__, "--environments", self.state / "environments"]
        command += ["--initial", OUTRIDER, "--ready-within", "60", "--steady", "0.5", "--tries", "1"]
        command += ["--connect-within", "20"]
        with (self.folder / "dev.log").open("ab") as log:
            self.running["agent"] = subprocess.Popen(
                [*map(str, command), "--", "agent", "run", *map(str, self.options())],
                env=self.cli.env,
                stdout=log,
                stderr=log,
            )

    def set_role(self, agent: str, plugins: dict[str, str], *wheels: Path) -> int:
        """Let role game have these, and be locked to these wheels; its version."""
        role = {"name": "game", "agent": agent, "plugins": plugins}
        (self.folder / "game.yaml").write_text(json.dumps(role))
        (self.folder / "game.lock").write_text(lock_of(*wheels))
        version: int = self.cli.json("node", "role", "set", self.folder / "game.yaml")["version"]
        return version

    def sync(self, *more: object) -> subprocess.CompletedProcess[str]:
        given = ["agent", "plugins", "sync", *self.options(), "--find-links", self.wheels, "-o", "json", *more]
        command = [str(OUTRIDER), *map(str, given)]
        return subprocess.run(
            command, env=self.cli.env, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )

    def node(self, name: str = "roles") -> dict[str, Any]:
        with self.client() as client:
            return plain(client.call(client.stub.GetNode, pb.GetNodeRequest(node_id=name)))

    def agent(self) -> dict[str, Any]:
        """What the agent says of itself; empty while there is none."""
        try:
            return read_status(self.state)
        except Unavailable:
            return {}

    def client(self) -> Client:
        return App(str(self.folder / "context.yaml")).client()

    def held(self) -> tuple[str, str]:
        """A run whose step waits in its container until `release`: run and container."""
        text = pipeline(python("hold", HOLD, volumes={"work": "/area:rw"}), volumes={"work": {}}).encode()
        request = pb.ExecutePipelineRequest(request_id=request_id(), pipeline_yaml=text, node_id="roles")
        with self.client() as client:
            run_id = client.call(client.stub.ExecutePipeline, request).run_id
        until(lambda: running_container(run_id) != "", PATIENCE_S)
        return run_id, running_container(run_id)

    def release(self, run_id: str, container: str) -> None:
        """It is still in the same container, and ends as a step that nobody disturbed."""
        assert running_container(run_id) == container
        (self.state / "volumes/run" / run_id / "work/go").touch()
        with self.client() as client:
            *_, run = client.stream(client.stub.WatchRun, pb.WatchRunRequest(run_id=run_id))
            chunks = list(client.stream(client.stub.StreamRunLogs, pb.StreamRunLogsRequest(run_id=run_id)))
        assert run.state == types.RUN_STATE_SUCCEEDED, self.cli.log()
        assert run.steps[0].attempt == 1
        assert b"".join(chunk.data for chunk in chunks) == b"begin\nend\n"


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RoleSite]:
    folder = tmp_path_factory.mktemp("roles")
    env = {name: value for name, value in os.environ.items() if not name.startswith("OUTRIDER_")}
    env["OUTRIDER_CONTEXT"] = str(folder / "context.yaml")
    nothing = subprocess.Popen([sys.executable, "-c", ""])
    nothing.wait()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    made = RoleSite(folder, address, Dev(nothing, folder, env))
    (folder / "dev.log").touch()
    made.wheels = folder / "wheels"
    made.wheels.mkdir()
    made.locked = (dependencies_wheel(made.wheels), plugin_wheel(made.wheels, "container"))
    (folder / "server.yaml").write_text(json.dumps({"listen": address, "log_level": "info"}))
    config = ["--config", folder / "server.yaml", "--data-dir", folder / "server"]
    ca = made.cli.json("server", "init", *config, "--write-context", "roles")["ca"]
    (folder / "agent.yaml").write_text(json.dumps({"node_id": "roles", "server": address, "ca_file": ca}))
    made.start_server()
    wheel = outrider_wheel(made.wheels, "0.1.1")
    until(lambda: answers(int(address.rpartition(":")[2])), PATIENCE_S)
    made.set_role(">=0.1,<0.2", {"outrider-step-container": ">=0.1"}, wheel, *made.locked)
    made.cli.ok("node", "add", "roles", "--role", "game", "--token-file", folder / "token")
    made.start_launcher()
    until(lambda: bool(made.node()["online"]), PATIENCE_S)
    yield made
    for name in reversed(list(made.running)):
        made.end(name)


@pytest.fixture
def site(launched: RoleSite) -> RoleSite:
    """Its node is in an environment of its role's."""
    if launched.agent()["environment"] == sys.prefix:
        done = launched.sync()
        assert done.returncode == 0, done.stderr + launched.cli.log()
    return launched


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False


def stands(node: dict[str, Any]) -> dict[str, str]:
    return {each["distribution"]: each["drift"] for each in node["role_state"]["plugins"] if each["drift"]}


def test_a_node_is_switched_to_what_its_role_says_while_a_step_runs(launched: RoleSite) -> None:
    before = launched.node()
    assert stands(before)["outrider"] == "lock"  # 0.1.0 runs, 0.1.1 is locked
    assert stands(before)["outrider-step-s3"] == "extra"
    assert before["environment"]["name"] == ""
    other = launched.sync("--role", "builder")
    assert other.returncode == FAILED
    assert "node roles has the role game at the server, not builder" in other.stderr
    planned = json.loads(launched.sync("--dry-run").stdout)
    assert {"package": "outrider", "now": "", "then": "0.1.1"} in planned["changes"]
    run_id, container = launched.held()
    former = launched.agent()["pid"]
    done = launched.sync()
    assert done.returncode == 0, done.stderr + launched.cli.log()
    made = json.loads(done.stdout)
    assert (made["environment"], made["current"]) == (planned["environment"], True)
    agent = launched.agent()
    assert (agent["version"], agent["pid"] != former) == ("0.1.1", True)
    assert agent["environment"] == str(launched.state / "environments" / made["environment"])
    until(lambda: launched.node()["environment"]["name"] == made["environment"])
    after = launched.node()
    assert (after["role_state"]["drift"], after["role_state"]["problem"]) == (False, "")
    launched.release(run_id, container)
    again = launched.sync()
    assert json.loads(again.stdout)["environment"] == made["environment"]
    assert launched.agent()["pid"] == agent["pid"]  # nothing to do is nothing done


@pytest.mark.long
def test_an_environment_with_a_broken_plugin_is_not_switched_to(site: RoleSite) -> None:
    bad = write_wheel(
        site.wheels,
        "outrider-step-bad",
        "0.1",
        {"outrider_step_bad.py": "import no_such_module\n"},
        entry_points={"outrider.steps": {"bad": "outrider_step_bad"}},
    )
    wheel = site.wheels / "outrider-0.1.1-py3-none-any.whl"
    before = site.agent()["pid"]
    plugins = {"outrider-step-container": "", "outrider-step-bad": ""}
    site.set_role("", plugins, wheel, bad, *site.locked)
    refused = site.sync()
    assert refused.returncode == INVALID, refused.stderr
    assert "outrider-step-bad 0.1 can't be used" in refused.stderr
    assert "no_such_module" in refused.stderr
    assert site.agent()["pid"] == before
    assert stands(site.node()) == {"outrider-step-bad": "missing"}
    assert len(list((site.state / "environments").glob("game-*"))) == 1
    file = site.cli.pipeline(json.dumps({"name": "p", "steps": [{"name": "a", "uses": "s3.download", "with": {}}]}))
    impossible = site.cli.outrider("run", file, "--node", "roles")
    assert impossible.returncode == INVALID
    assert "it comes from outrider-step-s3, which role game does not have" in impossible.stderr


@pytest.mark.long
def test_a_wheel_that_is_not_the_locked_one_is_refused(site: RoleSite) -> None:
    wheel = site.wheels / "outrider-0.1.1-py3-none-any.whl"
    lock = lock_of(wheel, *site.locked)
    digest = lock.partition("sha256:")[2][:64]
    (site.folder / "game.yaml").write_text(json.dumps({"name": "game", "plugins": {"outrider-step-container": ""}}))
    (site.folder / "game.lock").write_text(lock.replace(digest, "0" * 64))
    site.cli.ok("node", "role", "set", site.folder / "game.yaml")
    refused = site.sync()
    assert refused.returncode == FAILED
    assert "can't be installed" in refused.stderr
    assert "hash" in refused.stderr.lower()


@pytest.mark.long
def test_an_agent_that_does_not_get_well_is_left_again_by_itself_while_a_step_runs(site: RoleSite) -> None:
    wheel = outrider_wheel(site.wheels, "0.1.2", {"agent_core/agent.py": BOOM})
    site.set_role(">=0.1.2", {"outrider-step-container": ""}, wheel, *site.locked)
    former = site.agent()["environment"]
    run_id, container = site.held()
    refused = site.sync()
    assert refused.returncode == FAILED, refused.stderr
    assert "was tried and left again: its agent ended with exit code 1" in refused.stderr
    until(lambda: site.agent().get("environment") == former)
    until(lambda: bool(site.node()["environment"]["refused"]))
    node = site.node()
    assert node["online"]
    assert node["environment"]["refused_reason"] == "its agent ended with exit code 1"
    assert "the last try was taken back" in node["role_state"]["problem"]
    site.release(run_id, container)
    listed = site.cli.json("agent", "plugins", "list", *site.options())
    assert listed["launcher_pid"] == site.running["agent"].pid
    assert sorted(each["state"] for each in listed["environments"]) == ["current", "former", "refused"]


@pytest.mark.long
def test_an_agent_that_never_connects_is_left_again_by_itself_while_a_step_runs(site: RoleSite) -> None:
    """It is ready, and stays so: only that the server hears nothing of it is wrong."""
    wheel = outrider_wheel(site.wheels, "0.1.3", {"agent_core/session.py": MUTE})
    site.set_role(">=0.1.3", {"outrider-step-container": ""}, wheel, *site.locked)
    former = site.agent()["environment"]
    run_id, container = site.held()
    refused = site.sync()
    assert refused.returncode == FAILED, refused.stderr
    assert "was tried and left again: it did not connect to the server" in refused.stderr
    until(lambda: site.agent().get("environment") == former)
    until(lambda: bool(site.node()["online"]))
    site.release(run_id, container)


@pytest.mark.long
def test_a_person_can_go_back_to_the_former_environment(site: RoleSite) -> None:
    back = site.cli.json("agent", "plugins", "back", *site.options())
    assert back == {"environment": "", "current": True}
    assert site.agent()["version"] == "0.1.0"
    assert site.agent()["environment"] == sys.prefix


@pytest.mark.long
def test_a_killed_launcher_takes_its_agent_along_and_the_next_one_adopts(launched: RoleSite) -> None:
    run_id, container = launched.held()
    launched.end("agent", signal.SIGKILL)
    launched.start_launcher()
    until(lambda: bool(launched.agent()) and launched.agent()["server"]["connected"])
    launched.release(run_id, container)
