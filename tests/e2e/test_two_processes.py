"""Server and agent as processes of their own, with file, environment and flags; either of them ends and comes back."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import OUTRIDER, Dev
from tests.e2e.pipelines import BASE, pipeline, python, steps_of
from tests.second_engine import second_engine

FAILED, INVALID = 1, 4
LINES = 40
COUNT = f"""
token = os.urandom(8).hex()
print(token)
for number in range({LINES}):
    print(number)
    time.sleep(0.1)
out(token=token)
"""


@dataclass
class Site:
    """A server process, agent processes, and an operator's command line with a context for them."""

    folder: Path
    address: str
    cli: Dev
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *arguments: object, **env: str) -> None:
        """Start `outrider` with these arguments as the process ``name``."""
        with (self.folder / "dev.log").open("ab") as log:
            command = [str(OUTRIDER), *map(str, arguments)]
            self.running[name] = subprocess.Popen(command, env=self.cli.env | env, stdout=log, stderr=log)

    def end(self, name: str, how: int = signal.SIGTERM) -> None:
        process = self.running.pop(name)
        process.send_signal(how)
        assert process.wait(30) == (0 if how == signal.SIGTERM else -how), self.cli.log()

    def start_server(self) -> None:
        # The port from the file, the interval from the environment, the folder from a flag.
        self.start(
            "server", "server", "run", "--config", self.folder / "server.yaml", "--data-dir", self.folder / "server",
            OUTRIDER_SERVER_HEARTBEAT_INTERVAL_S="1",
        )  # fmt: skip

    def agent_options(self) -> tuple[object, ...]:
        return ("--config", self.folder / "agent.yaml", "--token-file", self.folder / "token")

    def start_agent(self) -> None:
        self.start("agent", "agent", "run", *self.agent_options(), OUTRIDER_AGENT_STATE_DIR=str(self.folder / "agent"))

    def node(self, name: str = "two") -> dict[str, Any]:
        node: dict[str, Any] = self.cli.json("node", "show", name)
        return node

    def detached(self, text: str) -> str:
        return self.cli.ok("run", self.cli.pipeline(text), "--node", "two", "--detach").strip()

    def ended(self, run_id: str) -> dict[str, Any]:
        """The run once it is over."""
        self.cli.ok("logs", "run", run_id, "-f")  # ends with the run; cheaper than asking again and again
        run: dict[str, Any] = self.cli.json("runs", "show", run_id)
        return run


def until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"it did not come to hold within {seconds:g} s"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("two")
    env = {name: value for name, value in os.environ.items() if not name.startswith("OUTRIDER_")}
    env["OUTRIDER_CONTEXT"] = str(folder / "context.yaml")
    nothing = subprocess.Popen([sys.executable, "-c", ""])
    nothing.wait()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    made = Site(folder, address, Dev(nothing, folder, env))
    (folder / "dev.log").touch()
    (folder / "server.yaml").write_text(json.dumps({"listen": address, "data_dir": "/not/here", "log_level": "info"}))
    config = ["--config", folder / "server.yaml", "--data-dir", folder / "server"]
    ca = made.cli.json("server", "init", *config, "--write-context", "two")["ca"]
    settings = {"node_id": "two", "server": address, "ca_file": ca, "labels": {"zone": "eu"}, "log_level": "info"}
    (folder / "agent.yaml").write_text(json.dumps(settings))
    made.start_server()
    until(lambda: made.cli.outrider("node", "add", "two", "--token-file", folder / "token").returncode == 0)
    made.start_agent()
    until(lambda: bool(made.node()["online"]))
    yield made
    for name in reversed(list(made.running)):
        made.end(name)


def running_container(run_id: str) -> str:
    """The id of the one container that a run has."""
    command = ["docker", "ps", "--quiet", "--no-trunc", f"--filter=label=outrider.run={run_id}"]
    command += ["--filter=label=outrider.kind=step"]
    ids = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return ids[0] if len(ids) == 1 else ""


def test_a_node_with_a_wrong_token_or_authority_does_not_get_in_and_says_why(site: Site, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("not-the-token\n")
    options = ["--config", site.folder / "agent.yaml", "--state-dir", tmp_path / "a"]
    refused = site.cli.outrider("agent", "run", *options, "--token-file", tmp_path / "token")
    assert refused.returncode == FAILED
    assert "token" in refused.stderr
    assert "two" in refused.stderr
    assert "Traceback" not in refused.stderr
    missing = site.cli.outrider("agent", "run", *options, "--token-file", tmp_path / "none")
    assert missing.returncode == INVALID
    assert str(tmp_path / "none") in missing.stderr
    second = site.cli.outrider("agent", "run", *site.agent_options(), "--state-dir", site.folder / "agent")
    assert second.returncode == FAILED
    assert str(site.folder / "agent") in second.stderr
    assert site.node()["online"]


def test_a_killed_agent_adopts_its_running_step_when_it_is_started_again(site: Site) -> None:
    hold = "\nwait_for('/area/go')\nprint('end')\n"
    work = {"work": "/area:rw"}
    text = pipeline(python("count", COUNT + hold, volumes=work), python("next", ""), volumes={"work": {}})
    run_id = site.detached(text)
    until(lambda: running_container(run_id) != "")
    container = running_container(run_id)
    site.end("agent", signal.SIGKILL)
    assert running_container(run_id) == container
    time.sleep(0.5)
    site.start_agent()
    until(lambda: bool(site.node()["online"]))
    assert running_container(run_id) == container
    (site.folder / "agent/volumes/run" / run_id / "work/go").touch()
    run = site.ended(run_id)
    steps = steps_of(run)
    assert run["state"] == "succeeded", site.cli.log()
    assert steps["count"]["attempt"] == 1
    # Of a step that was run again there would be another token.
    expected = [steps["count"]["outputs"]["token"], *map(str, range(LINES)), "end"]
    assert site.cli.ok("logs", "run", run_id, "count").split("\n")[:-1] == expected
    assert steps["next"]["state"] == "succeeded"


def test_a_run_ends_and_its_log_is_whole_though_the_server_was_away(site: Site) -> None:
    run_id = site.detached(pipeline(python("count", COUNT.replace("0.1", "0.05"))))
    follow = [OUTRIDER, "logs", "run", run_id, "-f"]
    with subprocess.Popen(follow, env=site.cli.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as follower:
        assert follower.stdout is not None
        first = follower.stdout.readline() + follower.stdout.readline()
        site.end("server")
        offline = site.cli.outrider("runs", "show", run_id)
        assert offline.returncode == FAILED
        assert site.address in offline.stderr
        status = site.cli.json("agent", "status", "--state-dir", site.folder / "agent")
        assert not status["server"]["connected"]
        assert status["server"]["error"]
        until(lambda: running_container(run_id) == "")  # the step ends while nobody is there to hear of it
        site.start_server()
        followed = first + follower.stdout.read()
        assert follower.wait(30) == 0
    run = site.ended(run_id)
    assert run["state"] == "succeeded"
    assert steps_of(run)["count"]["attempt"] == 1
    token = steps_of(run)["count"]["outputs"]["token"]
    expected = "".join(f"{line}\n" for line in (token, *range(LINES)))
    assert followed.decode() == expected
    assert site.cli.ok("logs", "run", run_id) == expected


def test_an_offline_node_is_told_with_the_time_since_when(site: Site) -> None:
    until(lambda: bool(site.node()["online"]))
    site.end("agent")
    until(lambda: not site.node()["online"], 10)
    file = site.cli.pipeline(pipeline(python("hello", "print('hello')")))
    refused = site.cli.outrider("run", file, "--node", "two")
    assert refused.returncode == FAILED
    assert re.search(r"node two is offline since \d{4}-\d\d-\d\d.\d\d:\d\d", refused.stderr), refused.stderr
    assert re.search(r"^two +offline", site.cli.ok("node", "list"), re.MULTILINE)
    waiting = site.cli.ok("run", file, "--node", "two", "--allow-offline", "--detach").strip()
    site.start_agent()
    assert site.ended(waiting)["state"] == "succeeded"


def test_managed_containers_are_stopped_started_restarted_and_removed_by_name(site: Site) -> None:
    name = f"web-{os.getpid()}-{time.time_ns() % 10**9}"
    start = {
        "name": "start",
        "uses": "container.start",
        "envs": ["managed.TOKEN"],
        "with": {
            "name": name,
            "image": BASE,
            "args": ["sh", "-c", "echo token $TOKEN; exec python3 -um http.server $(ports.http)"],
            "env_from": ["TOKEN"],
            "ports": [{"name": "http"}],
            "ready": {"tcp": "http", "timeout": "20s"},
            "stop_grace": "1s",
            "init": True,
        },
    }
    cli = site.cli
    cli.ok("env", "set", "managed", "TOKEN=token-of-the-game")
    run = cli.json("run", cli.pipeline(pipeline(start, envs=[{"set": "managed"}])), "--node", "two")
    port = steps_of(run)["start"]["outputs"]["ports"]["http"]
    try:
        assert answers(port)
        listed = next(item for item in cli.json("container", "list", "two") if item["name"] == name)
        assert (listed["state"], listed["owner"]) == ("running", "managed")
        assert [item["host"] for item in listed["ports"]] == [port]
        cli.ok("container", "stop", "two", name, "--grace", "1s")
        assert not answers(port)
        cli.ok("container", "start", "two", name)
        until(lambda: answers(port), 10)
        cli.ok("container", "restart", "two", name, "--grace", "1s")
        until(lambda: answers(port), 10)
        log = cli.ok("logs", "container", "two", name)
        assert log.count("token ***") == 3  # what it said at each of its starts
        assert "GET / " in log
        assert "token-of-the-game" not in log + cli.ok("container", "inspect", "two", name, "-o", "json")
        refused = cli.outrider("container", "rm", "two", name)
        assert refused.returncode == FAILED
        assert name in refused.stderr
        assert answers(port)
    finally:
        cli.ok("container", "rm", "two", name, "--force")
    assert not answers(port)
    gone = cli.outrider("container", "inspect", "two", name)
    assert gone.returncode == INVALID
    assert name in gone.stderr


def answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return connection.recv(100).startswith(b"HTTP/1.0 200")
    except OSError:
        return False


@pytest.mark.skipif(os.geteuid() != 0, reason="starts a container engine of its own")
def test_an_agent_without_an_engine_stays_up_says_so_and_goes_on_when_it_is_back(site: Site, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("networks: {}\nwarm_none: 1\n")
    cli, state = site.cli, tmp_path / "agent"
    cli.ok("node", "add", "lone", "--token-file", tmp_path / "token")
    options = ["--node-id", "lone", "--token-file", tmp_path / "token", "--state-dir", state, "--policy-file", policy]
    config = ["--config", site.folder / "agent.yaml"]
    with second_engine() as engine:
        engine.stop()
        site.start("lone", "agent", "run", *config, *options, OUTRIDER_AGENT_ENGINE_SOCKET=engine.socket)
        try:
            until(lambda: bool(site.node("lone")["online"]))
            assert re.search(r"^lone +online .* error ", cli.ok("node", "list"), re.MULTILINE)
            assert engine.socket in cli.ok("node", "show", "lone")
            status = cli.json("agent", "status", "--state-dir", state)
            assert not status["engine"]["ok"]
            assert engine.socket in status["engine"]["error"]
            file = cli.pipeline(pipeline(python("hello", "print('hello')")))
            waiting = cli.ok("run", file, "--node", "lone", "--detach").strip()
            time.sleep(1)
            assert cli.json("runs", "show", waiting)["state"] not in ("failed", "succeeded")
            engine.start()
            assert site.ended(waiting)["state"] == "succeeded"
            until(lambda: cli.json("agent", "status", "--state-dir", state)["engine"]["ok"], 10)
            until(lambda: bool(site.node("lone")["brief"]["engine_ok"]), 10)
        finally:
            site.end("lone")
