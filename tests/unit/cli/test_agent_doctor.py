"""`outrider agent doctor` as a process: what it says of a machine where all is well, and of each thing that is not."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any

import pytest

from tests.plugin_fixtures import install
from tests.unit.cli.conftest import OUTRIDER, Scripted, certificate


class Engine(BaseHTTPRequestHandler):
    """As much of a container engine as answers who it is."""

    version = "24.0.7"
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        answers = {
            "info": {"ServerVersion": self.server.version, "ID": "e1", "DockerRootDir": "/data", "Driver": "overlay2"},
            "version": {"Version": self.server.version, "ApiVersion": "1.41", "MinAPIVersion": "1.12"},
            "_ping": {},
        }
        body = json.dumps(answers.get(self.path.rpartition("/")[2].partition("?")[0], [])).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Api-Version", "1.41")
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *_: Any) -> None:
        pass


class EngineServer(ThreadingUnixStreamServer):
    daemon_threads = True
    version = "24.0.7"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[EngineServer]:
    with EngineServer(str(tmp_path / "engine.sock"), Engine) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@dataclass
class Machine:
    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)

    def doctor(self, **environ: str) -> tuple[int, dict[str, list[dict[str, str]]]]:
        config = self.folder / "agent.yaml"
        config.write_text(json.dumps(self.settings))
        env = {**os.environ, **environ}
        command = [OUTRIDER, "agent", "doctor", "--config", config, "-o", "json"]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
        assert done.stdout, done.stderr
        found: dict[str, list[dict[str, str]]] = {}
        for each in json.loads(done.stdout):
            found.setdefault(each["what"], []).append(each)
        return done.returncode, found


@pytest.fixture
def machine(tmp_path: Path, scripted: Scripted, engine: EngineServer) -> Machine:
    token = tmp_path / "token"
    token.write_text("the-token\n")
    token.chmod(0o600)
    settings = {
        "node_id": "n7",
        "server": f"127.0.0.1:{scripted.port}",
        "ca_file": str(scripted.ca),
        "token_file": str(token),
        "state_dir": str(tmp_path / "state"),
        "engine_socket": str(tmp_path / "engine.sock"),
        "plugins": ["container"],
    }
    return Machine(tmp_path, settings)


def test_a_machine_where_all_is_well(machine: Machine) -> None:
    code, found = machine.doctor()
    states = {what: [each["state"] for each in findings] for what, findings in found.items()}
    assert code == 0, found
    assert states.pop("agent") == ["warning"]  # none runs
    assert states == {what: ["ok"] for what in ("settings", "token", "policy", "disk", "engine", "server", "plugins")}
    assert found["engine"][0]["says"] == "docker 24.0.7, data in /data"
    assert "good until" in found["server"][0]["says"]


def test_everything_that_is_wrong_is_said_at_once(machine: Machine, engine: EngineServer) -> None:
    other_ca, _ = certificate(machine.folder / "other")
    (machine.folder / "token").chmod(0o644)
    policy = machine.folder / "policy.yaml"
    policy.write_text("disk_reserve_bytes: 1152921504606846976\n")
    engine.version = "19.3.1"
    machine.settings |= {"ca_file": str(other_ca), "policy_file": str(policy), "plugins": ["misspelt-hook"]}
    code, found = machine.doctor(PYTHONPATH=str(install(machine.folder / "site", "misspelt-hook")))
    assert code == 1
    said = {what: (each["state"], each["says"], each["fix"]) for what, (each, *_) in found.items()}
    assert said["token"] == (
        "warning",
        f"{machine.folder / 'token'} can be read by others than its owner",
        f"chmod 600 {machine.folder / 'token'}",
    )
    assert said["disk"][0] == "error"
    assert "no volume would be allotted" in said["disk"][1]
    assert said["engine"] == ("error", "docker 19.3.1 is too old", "upgrade it to 20.10 or newer")
    assert said["server"][0] == "error"
    assert "its certificate is not good: self-signed certificate" in said["server"][1].replace(
        "self signed", "self-signed"
    )
    assert said["plugins"][1] == "this node would have no step type"
    assert said["plugin"][2] == "did you mean outrider_step_types?"


def test_what_is_missing_is_said_with_the_way_to_mend_it(machine: Machine) -> None:
    (machine.folder / "token").unlink()
    blocked = machine.folder / "file"
    blocked.touch()
    machine.settings |= {
        "server": "127.0.0.1:1",
        "policy_file": str(machine.folder / "nowhere.yaml"),
        "engine_socket": str(machine.folder / "nowhere.sock"),
        "state_dir": str(blocked / "state"),
    }
    code, found = machine.doctor()
    assert code == 1
    for what in ("token", "policy", "state", "engine", "server"):
        (each,) = found[what]
        assert each["state"] == "error", each
        assert each["fix"], each
    assert found["server"][0]["says"].startswith("127.0.0.1:1 can't be reached: ")
    assert found["plugins"][0]["state"] == "ok"


def test_settings_that_are_wrong_end_it(machine: Machine) -> None:
    machine.settings["nod_id"] = "x"
    code, found = machine.doctor()
    assert code == 1
    assert list(found) == ["settings"]
