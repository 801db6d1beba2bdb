"""Server and agent as services of a real systemd: installed, watched, frozen, killed, upgraded, and removed again.

One machine for all tests, in the order of its life; see tests/faults/systemd_box.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.pipelines import BASE, pipeline, python, steps_of
from tests.faults.systemd_box import STEP_IMAGES, Box, systemd_box

AGENT, SERVER = "outrider-agent.service", "outrider-server.service"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "operations.md"

pytestmark = [
    pytest.mark.skipif(
        os.geteuid() != 0
        or shutil.which("docker") is None
        or subprocess.run(["docker", "image", "inspect", *STEP_IMAGES], capture_output=True).returncode != 0,
        reason="needs root, an engine and the step images (make images)",
    ),
    pytest.mark.timeout(900),  # the first time, the machine's image is made
]


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    with systemd_box() as made:
        yield made


@pytest.fixture(scope="module")
def server(box: Box) -> Box:
    """With the server installed, and a context that finds it."""
    box.ok("outrider", "server", "install", "--name", "box.example")
    box.ok("outrider", "server", "init", "--write-context", "box")
    box.ok("systemctl", "start", SERVER)
    return box


@pytest.fixture(scope="module")
def node(server: Box) -> Box:
    """With the agent installed, too, and its node online."""
    token = server.ok("outrider", "node", "add", "n1")
    server.write("/root/n1.token", token)
    server.ok(
        "outrider", "agent", "install", "--server", "localhost:8443", "--node-id", "n1",
        "--token-file", "-", "--ca-file", "/var/lib/outrider-server/tls/ca.pem", stdin=token,
    )  # fmt: skip
    server.until(lambda: connected(server))
    return server


class Step:
    """A run whose one step says so, waits until the test lets it go, and says that, too."""

    CODE = "print('begin', os.urandom(8).hex())\nopen('/area/begun', 'w')\nwait_for('/area/go')\nprint('end')\n"

    def __init__(self, box: Box) -> None:
        self.box = box
        text = pipeline(python("hold", self.CODE, volumes={"work": "/area:rw"}), volumes={"work": {}})
        box.write("/root/hold.yaml", text)
        self.run_id = box.ok(
            "outrider", "run", "/root/hold.yaml", "--node", "n1", "--allow-offline", "--detach"
        ).strip()
        self.work = f"/var/lib/outrider/volumes/run/{self.run_id}/work"
        box.until(lambda: box.run("test", "-e", f"{self.work}/begun").returncode == 0)
        self.container = self.containers()
        assert self.container.endswith(" running"), self.container

    def containers(self) -> str:
        """Id and state of its container; a second one would be a second line."""
        ids = ["--filter", f"label=outrider.run={self.run_id}", "--filter", "label=outrider.kind=step"]
        return self.box.ok("docker", "ps", "--all", "--no-trunc", "--format", "{{.ID}} {{.State}}", *ids).strip()

    def ends_well(self) -> None:
        """It is still the same container, and what it wrote is there once."""
        assert self.containers() == self.container
        self.box.ok("touch", f"{self.work}/go")
        log = self.box.ok("outrider", "logs", "run", self.run_id, "-f", timeout=100)  # ends with the run
        run = self.box.json("runs", "show", self.run_id)
        assert run["state"] == "succeeded", self.box.outrider()
        assert steps_of(run)["hold"]["attempt"] == 1
        assert re.fullmatch(r"begin [0-9a-f]{16}\nend\n", log)


def connected(box: Box) -> bool:
    return bool(re.match(r"connected to localhost:8443; engine \d+\.", box.show(AGENT, "StatusText")))


def pid(box: Box, unit: str = AGENT) -> int:
    """The process that does the work: the agent's is the child of its launcher."""
    main = int(box.show(unit, "MainPID"))
    if unit == SERVER or not main:
        return main
    children = box.run("pgrep", "--parent", main).stdout.split()
    return int(children[0]) if children else 0


def exposure(box: Box, unit: str) -> str:
    last = box.ok("systemd-analyze", "security", "--no-pager", unit).strip().splitlines()[-1]
    found = re.search(r"Overall exposure level for \S+: (\d+\.\d)", last)
    assert found, last
    return found[1]


def test_a_server_is_installed_initialised_and_started(server: Box) -> None:
    assert server.show(SERVER, "ActiveState") == "active"
    assert server.show(SERVER, "User") == "outrider-server"
    assert server.show(SERVER, "StatusText") == "serving on port 8443; 0 nodes online"
    owners = server.ok("find", "/var/lib/outrider-server", "!", "-user", "outrider-server")
    assert owners == ""
    assert server.show(SERVER, "UnitFileState") == "enabled"


def test_an_agent_is_installed_and_ready_means_that_engine_and_server_are_known(node: Box) -> None:
    assert node.show(AGENT, "ActiveState") == "active"
    assert re.fullmatch(r"connected to localhost:8443; engine \d+\.\S+; 0 runs", node.show(AGENT, "StatusText"))
    assert node.show(AGENT, "KillMode") == "process"
    assert node.ok("stat", "--format", "%a %U", "/etc/outrider/token") == "600 root\n"
    before = pid(node)
    again = node.json("agent", "install", "--ca-file", "/var/lib/outrider-server/tls/ca.pem")
    assert again["changes"] == []
    assert pid(node) == before


@pytest.mark.parametrize("unit", [AGENT, SERVER])
def test_systemd_finds_no_fault_and_the_recorded_exposure(node: Box, unit: str) -> None:
    verified = node.run("systemd-analyze", "verify", unit)
    assert verified.returncode == 0, verified.stderr
    assert "outrider" not in verified.stderr
    recorded = re.search(rf"`{re.escape(unit)}` \| (\d+\.\d) \|", PAGE.read_text())
    assert recorded, f"{PAGE.name} does not record the exposure of {unit}"
    assert exposure(node, unit) == recorded[1]


def test_steps_volumes_and_games_work_for_an_agent_that_may_do_so_little(node: Box) -> None:
    """The whole of what an agent does to its machine, under the restrictions of its unit."""
    saves = {"saves": "/saves:rw"}
    write = python("write", "open('/saves/world', 'w').write('1'); out(uid=os.getuid())", volumes=saves)
    start = {
        "name": "start",
        "uses": "container.start",
        "with": {
            "name": "game",
            "image": BASE,
            "args": ["sh", "-c", "cd /saves; exec python3 -um http.server $(ports.http)"],
            "ports": [{"name": "http"}],
            "ready": {"http": {"port": "http", "path": "/world"}, "timeout": "30s"},
            "volumes": saves,
            "files": {"/etc/game.cfg": "rcon\n"},
            "init": True,
        },
        "volumes": saves,
    }
    node.ok("outrider", "object", "set", "game/one", "players=1")
    node.write("/root/game.yaml", pipeline(write, start, volumes={"saves": {"keep": True, "scope": "object"}}))
    command = ["outrider", "run", "/root/game.yaml", "--node", "n1", "--object", "game/one", "-o", "json"]
    done = node.run(*command)
    run: dict[str, Any] = json.loads(done.stdout)
    assert run["state"] == "succeeded", f"{json.dumps(run, indent=1)}\n{node.journal(AGENT)}"
    assert steps_of(run)["write"]["outputs"]["uid"] >= 1000
    look = {"name": "look", "uses": "container.exec", "with": {"name": "game", "args": ["cat", "/etc/game.cfg"]}}
    hang = {"name": "hang", "uses": "container.exec"}
    hang["with"] = {"name": "game", "args": ["sleep", "1000"], "timeout": "2s"}  # type: ignore[assignment]
    node.write("/root/inside.yaml", pipeline(look, hang))
    inside = json.loads(node.run("outrider", "run", "/root/inside.yaml", *command[3:]).stdout)
    assert steps_of(inside)["look"]["state"] == "succeeded", inside
    assert "did not end within 2 s, and was killed" in json.dumps(steps_of(inside)["hang"]), inside
    modes = node.ok("sh", "-c", "stat --format '%a' /var/lib/outrider /var/lib/outrider/journal.db")
    assert modes == "711\n600\n"


@pytest.fixture(scope="module")
def hasty(node: Box) -> Box:
    """With services that are watched more closely, and come back sooner, so that tests need not wait."""
    for unit in (AGENT, SERVER):
        node.write(f"/etc/systemd/system/{unit}.d/test.conf", "[Service]\nWatchdogSec=4\nRestartSec=1\n")
    node.ok("systemctl", "daemon-reload")
    node.ok("systemctl", "restart", SERVER, AGENT)
    return node


def test_a_frozen_agent_is_ended_by_the_watchdog_and_its_successor_adopts_the_step(hasty: Box) -> None:
    step = Step(hasty)
    frozen = pid(hasty)
    hasty.ok("kill", "-STOP", frozen)
    hasty.until(lambda: pid(hasty) not in (0, frozen))
    hasty.until(lambda: hasty.show(AGENT, "ActiveState") == "active")
    journal = hasty.journal(AGENT, 200)
    assert f"{AGENT}: Watchdog timeout" in journal
    assert "Fatal Python error: Aborted" in journal  # and where each thread stood
    assert int(hasty.show(AGENT, "NRestarts")) == 1
    step.ends_well()


@pytest.mark.long
def test_a_frozen_server_is_ended_by_the_watchdog_and_its_successor_has_the_node(hasty: Box) -> None:
    frozen = pid(hasty, SERVER)
    hasty.ok("kill", "-STOP", frozen)
    hasty.until(lambda: pid(hasty, SERVER) not in (0, frozen))
    hasty.until(lambda: hasty.show(SERVER, "StatusText") == "serving on port 8443; 1 node online")
    assert f"{SERVER}: Watchdog timeout" in hasty.journal(SERVER, 200)
    assert hasty.show(AGENT, "ActiveState") == "active"


@pytest.mark.long
def test_a_killed_agent_comes_back_by_itself_and_adopts_the_step(hasty: Box) -> None:
    step = Step(hasty)
    killed = pid(hasty)
    hasty.ok("kill", "-KILL", killed)
    hasty.until(lambda: pid(hasty) not in (0, killed))
    step.ends_well()


def test_a_stop_ends_the_agent_alone_and_a_start_goes_on_with_the_step(hasty: Box) -> None:
    step = Step(hasty)
    hasty.ok("systemctl", "stop", AGENT)
    assert hasty.show(AGENT, "Result") == "success"
    assert hasty.ok("docker", "ps", "--quiet", "--filter", "name=^game$")
    assert step.containers() == step.container
    hasty.ok("systemctl", "start", AGENT)
    step.ends_well()


def test_an_upgrade_of_both_while_a_step_runs_takes_nothing_from_it(hasty: Box) -> None:
    step = Step(hasty)
    hasty.install(2, version="0.1.0+next")
    hasty.ok("systemctl", "restart", SERVER)
    assert step.containers() == step.container
    hasty.ok("systemctl", "restart", AGENT)
    assert hasty.json("agent", "status")["version"] == "0.1.0+next"
    step.ends_well()


@pytest.mark.long
def test_environments_are_changed_within_the_running_service(node: Box) -> None:
    """The launcher under its unit: a good environment is taken, one whose agent ends is left, and nothing stops."""
    home, public = "/var/lib/outrider/environments", node.ok("readlink", "/opt/outrider").strip()
    node.install(7, version="7.0.0")
    node.ok("ln", "-sfn", public, "/opt/outrider")
    node.ok("ln", "-s", "/opt/outrider-7", f"{home}/seven")
    node.write(f"{home}/bad/bin/outrider", "#!/bin/sh\nexit 3\n")
    node.ok("chmod", "755", f"{home}/bad/bin/outrider")
    step, main, former = Step(node), node.show(AGENT, "MainPID"), pid(node)

    def state() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(node.ok("cat", f"{home}/state.json"))
        return found

    def want(name: str) -> None:
        node.write(f"{home}/wanted.json", json.dumps({"environment": name, "request": f"for {name}"}))
        node.ok("kill", "-HUP", main)

    want("bad")
    node.until(lambda: state()["refused"].get("reason") == "its agent ended with exit code 3")
    node.until(lambda: pid(node) not in (0, former))
    want("seven")
    node.until(lambda: state()["current"] == "seven", 120)
    assert (state()["former"], state()["trial"]) == ("", {})
    assert node.json("agent", "status")["version"] == "7.0.0"
    assert node.show(AGENT, "ActiveState") == "active"
    assert node.show(AGENT, "MainPID") == main
    step.ends_well()
    want("")
    node.until(lambda: state()["current"] == "", 120)


def test_an_agent_is_ready_without_engine_and_server_and_says_what_it_lacks(node: Box) -> None:
    node.ok("systemctl", "stop", "docker.socket", "docker.service", SERVER)
    node.ok("systemctl", "restart", AGENT)
    status = node.show(AGENT, "StatusText")
    assert status.startswith("not connected to localhost:8443 ("), status
    assert "engine missing" in status
    node.ok("systemctl", "start", "docker.service", SERVER)
    node.until(lambda: connected(node))


def test_a_reload_serves_the_certificate_that_is_on_the_disk(node: Box) -> None:
    ask = ["/opt/outrider/bin/python", "-c", "import ssl; print(ssl.get_server_certificate(('localhost', 8443)))"]
    before = node.ok(*ask)
    assert ssl.PEM_cert_to_DER_cert(before)
    served = pid(node, SERVER)
    node.ok("rm", "/var/lib/outrider-server/tls/server.pem")
    node.ok("systemctl", "reload", SERVER)
    node.until(lambda: node.run(*ask).stdout not in ("", before))
    assert pid(node, SERVER) == served


@pytest.mark.long
def test_after_a_boot_both_services_and_the_game_are_there_again(node: Box) -> None:
    subprocess.run(["docker", "restart", "--time", "60", node.name], check=True, capture_output=True, timeout=120)
    node.until(lambda: node.run("systemctl", "is-active", AGENT, SERVER).stdout.split() == ["active", "active"])
    node.until(lambda: connected(node))
    node.until(lambda: bool(node.ok("docker", "ps", "--quiet", "--filter", "name=^game$")))


def test_a_removed_agent_leaves_its_state_and_the_games(node: Box) -> None:
    node.ok("outrider", "agent", "install", "--uninstall")
    assert node.run("systemctl", "is-active", AGENT).stdout.strip() == "inactive"
    assert node.run("test", "-e", f"/etc/systemd/system/{AGENT}").returncode == 1
    assert node.ok("docker", "ps", "--quiet", "--filter", "name=^game$")
    node.ok("test", "-f", "/var/lib/outrider/journal.db")
    assert node.json("agent", "install", "--uninstall")["changes"] == []
    # Whoever gives a wrong token is told at once, by an agent that ends or by one that has something to look after.
    refused = node.run("outrider", "agent", "install", "--token-file", "-", stdin="orn_wrong")
    assert "the token is not one that this server knows" in refused.stderr
    # It is installed again with what it left: its settings, its token, its state.
    node.ok("outrider", "agent", "install", "--token-file", "-", stdin=node.ok("cat", "/root/n1.token"))
    node.until(lambda: connected(node))
